"""The pages as a reader of GitHub sees them: nothing that only a site renders, no dead link, no dead anchor."""

import re

import pytest
from documentation import PAGES, ROOT, name_of
from markdown_it import MarkdownIt

import rfclip.app.cli

GITHUB = MarkdownIt("commonmark").enable("table")
# Of mkdocstrings, Markdown's extensions, and unresolved references; what GitHub shows of them is the raw text.
ON_A_SITE_ONLY = re.compile(r"^:::|^!!!|^\?\?\?|^=== \"|\]\[|\{: |\{ ?[.#]\w|\[\[|^\[TOC\]|\\\(|\\\[", re.MULTILINE)
INLINE_MATH = re.compile(r"(?<!\$)\$([^$\n]+)\$(?!\$)")
ENTRY = re.compile(r"^- \[`(\w+)`\]\(((?:\.\./)+[\w/]+\.py)\): ", re.MULTILINE)


def inlines(page):
    """The inline tokens of a page, without code and math."""
    return [token for token in GITHUB.parse(page.read_text("utf-8")) if token.type == "inline"]


def prose(page):
    return "\n".join("".join(part.content for part in token.children if part.type == "text") for token in inlines(page))


def links(page):
    for token in inlines(page):
        for part in token.children:
            address = part.attrGet("href") or part.attrGet("src")
            if address and not re.match(r"[a-z]+:", address):
                yield address


def anchors(page):
    """Those that GitHub gives to a page's headings."""
    found = []
    tokens = GITHUB.parse(page.read_text("utf-8"))
    for heading, inline in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(part.content for part in inline.children if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_nothing_that_github_does_not_render(page):
    assert not ON_A_SITE_ONLY.findall(prose(page))
    text = page.read_text("utf-8")
    assert "$$" not in text  # Markdown eats backslashes there, but not in a fence of math
    for equation in INLINE_MATH.findall(re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)):
        assert not re.search(r"\\[^A-Za-z]", equation), equation


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_relative_links_of_a_page(page):
    for address in links(page):
        path, _, anchor = address.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), address
        assert target.is_relative_to(ROOT), address
        if anchor:
            assert anchor in anchors(target), address


@pytest.mark.parametrize("page", [page for page in PAGES if ENTRY.search(page.read_text("utf-8"))], ids=name_of)
def test_entries_of_the_reference_name_what_their_source_defines(page):
    for name, path in ENTRY.findall(page.read_text("utf-8")):
        source = page.parent / path
        assert source.stem == name or re.search(rf"^(class|def|) ?{name}\b", source.read_text("utf-8"), re.MULTILINE)


def test_the_picture_of_the_scene():
    assert (ROOT / "docs/scene.png").read_bytes() == (ROOT / "rfclip/tiny/scene.png").read_bytes()


def commands(command, name="rfclip"):
    yield name, command
    for below, group in getattr(command, "commands", {}).items():
        yield from commands(group, f"{name} {below}")


def test_the_page_of_the_command_line_has_every_option():
    """Written by `make -B docs/command-line.md`."""
    from typer.main import get_command

    page = (ROOT / "docs/command-line.md").read_text("utf-8")
    titles = re.findall(r"^#+ (?:Command line|`(.*)`)$", page, re.MULTILINE)
    sections = dict(
        zip([title or "rfclip" for title in titles], re.split(r"^#+ .*$", page, flags=re.MULTILINE)[1:], strict=True)
    )
    found = dict(commands(get_command(rfclip.app.cli.app)))
    assert sections.keys() == found.keys()
    for name, command in found.items():
        options = {
            text for item in command.params for text in (*item.opts, *item.secondary_opts) if text.startswith("--")
        }
        shown = set(re.findall(r"--[\w-]+", " ".join(re.findall(r"^\* `([^`]*)`", sections[name], re.MULTILINE))))
        assert shown - {"--help"} == options - {"--help"}, name
