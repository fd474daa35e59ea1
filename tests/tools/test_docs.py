"""The documentation site, opened from the disk as a person would."""

import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from documentation import ROOT

pytest.importorskip("zensical", reason="no zensical: pip install zensical")
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")

from tools.docs import build  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Addresses(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found.get("id"), found.get("name")}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("img", "script", "link") and (found.get("src") or found.get("href")):
            self.loads.append(found.get("src") or found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "mkdocs.yml", root)  # whose folder, links followed, is where the site goes
    for name in ("README.md", "docs", "rfclip", "rfclip_kernels", "tests", "tools"):
        (root / name).symlink_to(ROOT / name)
    build(root)
    assert (root / "build/site/index.html").is_file()
    return root / "build" / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Addresses(path.read_text("utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    page.close()


def test_every_link_leads_to_a_file_and_an_anchor(site, pages):
    for path, addresses in pages.items():
        for address in [*addresses.links, *addresses.loads]:
            if re.match(r"https?:|mailto:|data:", address):
                continue
            file, _, anchor = unquote(address).partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), (path, address)
            if anchor and target.suffix == ".html" and not anchor.startswith("__"):
                assert anchor in pages[target].anchors, (path, address)


def test_a_page_asks_no_other_host(site, pages):
    for path, addresses in pages.items():
        assert not [address for address in addresses.loads if "//" in address], path


def test_sources_and_the_reference(site, pages):
    """A name leads to the line that defines it, and an entry of the reference has become what its docstring says."""
    (link,) = {link for link in pages[site / "method.html"].links if "ops/reference" in link and link.endswith("-22")}
    file, _, line = link.partition("#")
    text = (site / file).read_text("utf-8")
    assert re.search(rf'id="{line}"[^§]*?dimension_weights', text)
    assert "rfclip.plugin.refocus" in pages[site / "reference/refocus.html"].anchors
    assert "equation" in (site / "method.html").read_text("utf-8")
    assert "arithmatex" not in (site / "method.html").read_text("utf-8")


@needs_chromium
def test_links_and_search_from_the_disk(site, page):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto((site / "index.html").as_uri())
    page.get_by_role("navigation").get_by_role("link", name="The method", exact=True).first.click()
    page.wait_for_url("**/method.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("calibrate")
    # What Enter opens, no longer the first of the results for "c".
    page.get_by_role("option", name="calibrate", exact=True, selected=True).wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url("**/reference/refocus.html*")
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.asked)


WIDE = """
[...document.querySelectorAll("table, math[display=block], pre")].filter(part => {
  const scrolls = element =>
    element && (/auto|scroll/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement))
  return part.getBoundingClientRect().width > innerWidth && !scrolls(part)
}).length
"""


@needs_chromium
def test_every_page_fits_a_phone(site, pages, page):
    for path in pages:
        if "source" not in path.parts:
            page.goto(path.as_uri(), wait_until="domcontentloaded")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
            assert page.evaluate(WIDE) == 0, path  # what is wider than the screen scrolls


@needs_chromium
def test_subscripts_are_below_the_line(site, page):
    page.goto((site / "method.html").as_uri())
    page.evaluate("document.fonts.ready")
    assert page.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
    base, below = page.evaluate(
        "[...document.querySelector('msub').children].map(part => part.getBoundingClientRect().bottom)"
    )
    assert below > base + 1
