"""`rfclip serve` in a real browser: what a visitor does, and what goes wrong."""

import base64
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import linux_only
from PIL import Image
from serving import free_port, leftovers, started, stopped

import rfclip
from rfclip.methods import find_protocol
from rfclip.towers.loading import tiny_folder

gradio = pytest.importorskip("gradio", reason='no Gradio: pip install "rfclip[serve]"')
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
expect = playwright.expect
expect.set_options(timeout=60_000)  # milliseconds: the first answer waits for the model
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

SCENE = tiny_folder() / "scene.png"
NAMES = "tiger, mushroom, pizza, cake, grass, sky"
SCREENSHOT = Path(__file__).parents[2] / "build" / "serve.png"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    port = free_port()
    process = started(port, folder)
    yield f"http://127.0.0.1:{port}/"
    assert stopped(process, signal.SIGTERM) == (0, "")
    assert leftovers(folder) == []


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = visit(browser, address)
    yield page
    page.context.close()


def visit(browser, address, **options):
    page = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}} | options).new_page()
    page.goto(address)
    expect(page.get_by_role("button", name="Segment")).to_be_enabled()
    return page


def upload(page, path):
    page.set_input_files("#file input[type=file]", path)
    expect(page.locator("#preview img")).to_be_visible()


def ask(page, classes):
    page.get_by_label("Class names").fill(classes)
    page.get_by_role("button", name="Segment").click()


def legend(page):
    expect(page.locator("#legend li").first).to_be_visible()
    expect(page.locator("#overlay img")).to_be_visible()
    return page.locator("#legend li").all_inner_texts()


def refused(page, *words):
    """The page says what is wrong, and reveals nothing about the machine that serves it."""
    said = page.get_by_test_id("toast-body").filter(has_text=words[0])
    expect(said).to_be_visible()
    text = said.inner_text()
    for word in words:
        assert word in text
    assert "/gradio/" not in text and "Traceback" not in text and "--" not in text
    for gone in ("#legend li", "#overlay img", "#maps img", "#attention img"):
        expect(page.locator(gone)).to_have_count(0)
    expect(page.get_by_role("button", name="Mask")).to_be_hidden()
    expect(page.get_by_role("button", name="Show attention")).to_be_hidden()


def shares(classes, **options):
    segmentation = rfclip.Segmenter(cache=False, **options)(SCENE, classes)
    rows = sorted(segmentation.shares.items(), key=lambda row: -row[1])
    return segmentation, [f"{name} {100 * share:.1f} %" for name, share in rows]


def picture_of(page, name):
    """A picture shown on the page, RGB."""
    shown = page.locator(f"#{name} img").first
    expect(shown).to_be_visible()
    source = shown.get_attribute("src")
    data = base64.b64decode(source.partition(",")[2]) if source.startswith("data:") else page.request.get(source).body()
    return Image.open(io.BytesIO(data)).convert("RGB")


def changed(page, name, before):
    """The picture shown in place of one with that address."""
    expect(page.locator(f"#{name} img").first).not_to_have_attribute("src", before)
    return picture_of(page, name)


def simulate(page, share):
    page.get_by_role("button", name="Settings").click()
    simulated = page.get_by_label("number input for Simulate distraction")
    slider = page.get_by_label("range slider for Simulate distraction")
    for _ in range(20):  # where there is much to do, Gradio may take the first value back
        simulated.fill(share)
        simulated.press("Enter")
        page.wait_for_timeout(500)  # milliseconds
        if slider.input_value() == share:
            break
    expect(slider).to_have_value(share)


def test_upload_and_read_the_legend(page):
    """Legend, overlay, mask and JSON are what the segmenter makes of the same picture."""
    upload(page, SCENE)
    ask(page, f"{NAMES}, ")
    segmentation, rows = shares(NAMES)
    assert legend(page) == rows
    expect(page.locator("#summary")).to_contain_text(re.compile(r"320 x 320 pixels: \d+\.\d\d s with rf-clip"))
    with page.expect_download() as download:
        page.get_by_role("button", name="Mask").click()
    assert download.value.suggested_filename == "scene.mask.png"
    assert np.array_equal(np.asarray(Image.open(download.value.path())), segmentation.labels)
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    record = json.loads(Path(download.value.path()).read_text())
    assert download.value.suggested_filename == "scene.json"
    assert record["image"] == "scene.png" and record["model"] == "rfclip-tiny" and record["method"] == "rf-clip"
    assert {entry["name"]: entry["share"] for entry in record["classes"]} == segmentation.shares


def test_click_a_point(page):
    """A click marks a place and draws what it attends to; another place, something else. The screenshot is kept."""
    upload(page, SCENE)
    simulate(page, "0.1")
    ask(page, NAMES)
    legend(page)
    expect(page.locator("#summary")).to_contain_text("RF-CLIP finds 20 distraction tokens in 1 of 6 blocks")
    expect(page.locator("#maps")).to_contain_text("where nothing is moved: 2, 3, 6.")
    expect(page.locator("#maps img")).to_have_count(3)  # of block 4 alone
    plain, seen = np.asarray(picture_of(page, "overlay"), int), set()
    box = page.locator("#overlay img").bounding_box()
    for right, down in ((0.85, 0.2), (0.1, 0.9)):
        before = page.locator("#overlay img").get_attribute("src")
        page.locator("#overlay img").click(position={"x": right * box["width"], "y": down * box["height"]})
        marked = np.argwhere((np.asarray(changed(page, "overlay", before), int) != plain).any(axis=-1))
        assert marked.mean(axis=0) == pytest.approx((320 * down, 320 * right), abs=2)
        assert 8 <= np.ptp(marked, axis=0).max() <= 16
        expect(page.get_by_label("X, from the left")).to_have_value(str(int(320 * right)))
        seen.add(hashlib.sha256(picture_of(page, "attention").tobytes()).hexdigest())
        expect(page.locator("#attention img").first).to_be_in_viewport(ratio=1)
    assert len(seen) == 2
    expect(page.locator("#attention figcaption")).to_have_text(
        ["block 2", "block 3", "block 4 before", "block 4 after", "block 6 before", "block 6 after"]
    )
    SCREENSHOT.parent.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOT, full_page=True)


def test_by_keyboard(page):
    """Enter asks; a place is given by its pixel, and is the one that a click on it gives."""
    upload(page, SCENE)
    page.get_by_label("Class names").fill(NAMES)
    page.get_by_label("Class names").press("Enter")
    legend(page)
    expect(page.locator("#attention img")).to_have_count(0)
    for label, value in (("X, from the left", "272"), ("Y, from the top", "64")):
        page.get_by_label(label).fill(value)
    before = page.locator("#overlay img").get_attribute("src")
    page.get_by_role("button", name="Show attention").press("Enter")
    given = changed(page, "overlay", before)
    expect(page.locator("#attention")).to_contain_text("Refocusing changes nothing here")
    expect(page.locator("#attention img")).to_have_count(4)
    box, clicked = page.locator("#overlay img").bounding_box(), []
    for right, down in ((0.5, 0.9), (0.85, 0.2)):
        before = page.locator("#overlay img").get_attribute("src")
        page.locator("#overlay img").click(position={"x": right * box["width"], "y": down * box["height"]})
        clicked.append(changed(page, "overlay", before))
    assert clicked[0] != given and clicked[1] == given
    page.get_by_label("X, from the left").fill("")
    page.get_by_role("button", name="Show attention").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("X and Y: expected from 0 to 319 and from 0 to 319")
    expect(page.locator("#attention img")).to_have_count(0)


def test_without_distraction(page):
    """One line says that there is none; where attention goes is shown in place of empty maps."""
    page.locator("#scenes .thumbnail-item").first.click()
    expect(page.get_by_label("Class names")).to_have_value(re.compile("tiger, mushroom"))
    expect(page.locator("#preview img")).to_be_visible()  # a new picture clears the results, in its own time
    page.get_by_role("button", name="Segment").click()
    legend(page)
    expect(page.locator("#summary")).to_contain_text("This small model has none of its own; the settings can simulate")
    expect(page.locator("#maps")).to_contain_text("No block has distraction tokens, so RF-CLIP moves nothing")
    expect(page.locator("#maps img")).to_have_count(4)
    assert "none" not in page.locator("#maps").inner_text()


def test_colours_of_the_legend(page):
    """A swatch has the mean colour of its class in the overlay; a class keeps it when others are asked for."""
    upload(page, SCENE)
    swatches = {}
    for names in (NAMES, "banana, owl, tiger, sky, grass"):
        ask(page, names)
        expect(page.locator("#legend")).to_contain_text(names.split(", ")[0])
        segmentation = shares(names)[0]
        overlay = np.asarray(picture_of(page, "overlay"), float)
        for row in page.locator("#legend li").all():
            name = row.inner_text().rsplit(" ", 2)[0]
            style = row.locator("span").evaluate("e => getComputedStyle(e).backgroundColor")
            colour = tuple(map(int, re.findall(r"\d+", style)))
            area = segmentation.labels == segmentation.classes.index(name)
            assert area.sum() < 100 or overlay[area].mean(axis=0) == pytest.approx(colour, abs=4)
            assert swatches.setdefault(name, colour) == colour
    assert len(set(swatches.values())) == len(swatches) == 8


def test_contours(page):
    upload(page, SCENE)
    ask(page, NAMES)
    legend(page)
    plain, before = picture_of(page, "overlay"), page.locator("#overlay img").get_attribute("src")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Contours").check()
    ask(page, NAMES)
    drawn = changed(page, "overlay", before)
    white = (np.asarray(drawn) == 255).all(axis=-1)
    assert 200 < white.sum() < 5000 and not (np.asarray(plain) == 255).all(axis=-1).any()


CONTRAST = """elements => elements.map(element => {
    const parts = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    let below = element;
    while (below.parentElement && parts(getComputedStyle(below).backgroundColor)[3] === 0) below = below.parentElement;
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(below).backgroundColor].map(parts).map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})"""


def test_a_photograph(page, tmp_path):
    """The page says that the bundled model knows none, and what to do here, not on the command line."""
    Image.effect_noise((64, 64), 90).save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    ask(page, NAMES)
    legend(page)
    said = page.get_by_test_id("toast-body").filter(has_text="demonstration")
    expect(said).to_contain_text("Choose another model on this page.")
    assert "--" not in said.inner_text() and "Segmenter(" not in said.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, address, scheme):
    """Result and attention come into view, words can be read, pictures have names, and nothing is wider than it."""
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme, "is_mobile": True, "has_touch": True}
    page = visit(browser, address, **phone)
    assert not page.locator("#file label").is_visible() or page.locator("#file label").bounding_box()["width"] <= 1
    upload(page, SCENE)
    ask(page, NAMES)
    legend(page)
    expect(page.locator("#overlay img")).to_be_in_viewport(ratio=1)
    page.locator("#overlay img").click()
    expect(page.locator("#attention img").first).to_be_in_viewport(ratio=1)
    for words in ("button:visible", "#attention", "#maps", "figcaption", ".scale", "#legend li", "#summary p"):
        contrasts = page.locator(words).evaluate_all(CONTRAST)
        assert contrasts and min(contrasts) >= 4.5, words
    sizes = page.locator("#results figcaption, #results .scale").evaluate_all(
        "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    assert page.locator("img").evaluate_all("all => all.filter(e => !e.alt).length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    if scheme == "dark":  # no light ground behind the maps
        grounds = "all => all.map(e => getComputedStyle(e).backgroundColor)"
        assert set(page.locator("#results figure").evaluate_all(grounds)) == {"rgba(0, 0, 0, 0)"}
    page.context.close()


@pytest.mark.parametrize(
    "said, shown",
    [
        (
            "the weights of 'x' could not be had: no\nThis needs a network once. Without one, pass --pretrained F.",
            "once.",
        ),
        ("dims are not known (a, b). Find them with `rfclip calibrate IMAGES --model ...`.", "(a, b)."),
        ("a demo: its labels mean nothing. For photographs: rfclip segment a.jpg, in Python x", "nothing."),
    ],
)
def test_messages_do_not_speak_of_the_command_line(said, shown):
    from rfclip.app.serve import for_page

    text = for_page(said)
    assert text.endswith(f"{shown} Choose another model on this page.")
    assert text.startswith(said[:10]) and "--" not in text and "rfclip " not in text


@pytest.mark.parametrize("said", ["no class names: type some.", "'a -- b' given twice.", "--odd"])
def test_other_messages_stay(said):
    from rfclip.app.serve import for_page

    assert for_page(said) == said


def test_pick_a_scene_and_another_method(page):
    page.locator("#scenes .thumbnail-item").first.click()
    expect(page.get_by_label("Class names")).to_have_value(re.compile("tiger, mushroom"))
    expect(page.locator("#preview img")).to_be_visible()
    page.get_by_label("Method").click()
    page.get_by_role("option", name="maskclip", exact=True).click()
    ask(page, NAMES)
    assert legend(page) == shares(NAMES, method="maskclip")[1]


def test_the_browser_blocks_nothing(browser, address):
    """The page needs nothing that its Content-Security-Policy forbids, and another page cannot frame it."""
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(address)
    upload(page, SCENE)
    ask(page, NAMES)
    legend(page)
    page.locator("#overlay img").click()
    expect(page.locator("#attention img").first).to_be_visible()
    assert [text for text in said if "Content Security Policy" in text or "MIME" in text] == []
    with page.expect_console_message(lambda message: re.search("frame-ancestors|X-Frame-Options", message.text)):
        page.set_content(f'<iframe src="{address}"></iframe>')
    page.close()


def test_synonyms_and_no_markup(page):
    """Synonyms are one class, and a name that is HTML is text."""
    upload(page, SCENE)
    name = "<b id=bold>dog</b>"
    ask(page, f"mushroom, pizza; {name}; /etc/passwd")
    rows = legend(page)
    assert {row.rpartition(" ")[0].rpartition(" ")[0] for row in rows} == {"mushroom", name, "/etc/passwd"}
    assert page.locator("#bold").count() == 0


def test_a_bad_file(page, tmp_path):
    broken = tmp_path / "notes.png"
    broken.write_text("not a picture")
    page.set_input_files("#file input[type=file]", broken)
    refused(page, "notes.png cannot be read as an image")
    expect(page.locator("#preview img")).to_have_count(0)


def test_too_many_pixels(page, tmp_path):
    Image.new("1", (6000, 5000)).save(tmp_path / "huge.png")
    page.set_input_files("#file input[type=file]", tmp_path / "huge.png")
    refused(page, "6000 x 5000 pixels", "25000000")


def test_a_strip(page, tmp_path):
    Image.new("RGB", (5000, 20)).save(tmp_path / "strip.png")
    page.set_input_files("#file input[type=file]", tmp_path / "strip.png")
    refused(page, "a strip of 5000 x 20 pixels: at most 16 times")


def test_too_many_bytes(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2700, 2700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png", compress_level=0)
    page.set_input_files("#file input[type=file]", tmp_path / "large.png")
    refused(page, "exceed the maximum allowed size of 20", "large.png")


def test_no_picture(page):
    ask(page, NAMES)
    refused(page, "no picture: upload one")


@pytest.mark.parametrize(
    "classes, said", [("  ", "no class names"), (" ;,", "no class names"), ("dog, dog", "given more than once")]
)
def test_class_lists(page, classes, said):
    """The results of an earlier question are gone."""
    upload(page, SCENE)
    ask(page, NAMES)
    legend(page)
    ask(page, classes)
    refused(page, said)


def test_a_model_that_cannot_be_had(page):
    """Offline, the other models say how to get them; the page keeps the bundled one."""
    upload(page, SCENE)
    page.get_by_label("Model").click()
    page.get_by_role("option", name="ViT-B-16, openai").click()
    ask(page, NAMES)
    refused(page, "could not be downloaded")
    page.get_by_label("Model").click()
    page.get_by_role("option", name="rfclip-tiny").click()
    page.get_by_role("button", name="Segment").click()
    assert legend(page) == shares(NAMES)[1]


def test_folders_of_the_server_are_not_shown(tmp_path):
    from rfclip.segment.job import Job

    weights = tmp_path / "weights.safetensors"
    weights.touch()
    assert str(Job("ViT-B-16", str(weights))) == "ViT-B-16, weights.safetensors"
    assert Job(f"transformers:{tmp_path}", None).shown == (f"transformers:{tmp_path.name}", None)
    assert str(Job("transformers:openai/clip-vit-base-patch16", None)).endswith(":openai/clip-vit-base-patch16")
    assert str(Job("ViT-B-16", "openai")) == "ViT-B-16, openai"


def test_two_visitors_at_once(page, browser, address):
    """Each gets the answer to their own question, and a click in one page looks at the picture of that page."""
    other = visit(browser, address)
    questions = {page: "tiger, grass, sky", other: "mushroom, cake, sky, grass"}
    for visitor in questions:
        upload(visitor, SCENE)
    for visitor, classes in questions.items():
        ask(visitor, classes)
    for visitor, classes in questions.items():
        assert legend(visitor) == shares(classes)[1]
    other.context.close()


def test_requests_that_pass_the_line_by():
    """Requests sent straight to the server wait for their turn as well."""
    from rfclip.app.serve import ErrorsOnPage

    inside, most = 0, 0

    def work(_):
        nonlocal inside, most
        with ErrorsOnPage():
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert most == 1


def test_a_picture_that_is_gone(tmp_path):
    from rfclip.app.serve import _preview

    with pytest.raises(gradio.Error, match="^'?gone.png is no longer kept here"):
        list(_preview(str(tmp_path / "gone.png")))


def test_the_settings_start_from_the_config(tmp_path):
    from rfclip.app.serve import Page
    from rfclip.segment.job import Job

    config = rfclip.RefocusConfig((5, 37), tau=1.5, beta=0.2, layers=(3, 4))
    blocks = Page([Job("rfclip-tiny", None, config)], tmp_path).blocks(print).blocks.values()
    values = {getattr(block, "label", None): getattr(block, "value", None) for block in blocks}
    for label, value in (("tau", 1.5), ("beta", 0.2), ("Layers", "3, 4")):
        assert [found for name, found in values.items() if name and name.startswith(label)] == [value]


class Quiet:
    """Progress that nobody sees."""

    def __call__(self, *said, **more):
        pass

    def tqdm(self, values, **more):
        return values


@pytest.mark.filterwarnings("ignore:rfclip-tiny")
@pytest.mark.parametrize("protocol", ["own", "own:cityscapes"])
def test_a_method_by_its_own_protocol_and_a_list_by_name(tmp_path, monkeypatch, protocol):
    """As `rfclip segment` does it."""
    from rfclip.app import serve

    job = serve.choices("rfclip-tiny", None, None, protocol=protocol)[0]
    picture, saved, save = tiny_folder() / "scene.png", [], serve.save
    monkeypatch.setattr(serve, "save", lambda *given: saved.append(given) or save(*given))
    page = serve.Page([job], tmp_path)
    settings = (str(picture), "cityscapes", "released", str(job), 5.0, 0.7, "all", "own", 0.0, False, False, ())
    next(page.segment(*settings, Quiet()))
    ((found, record, _),) = saved
    with rfclip.Segmenter(method="released", protocol=find_protocol(protocol, "released")) as segmenter:
        want = segmenter(picture, "cityscapes")
    assert np.array_equal(found.labels, want.labels)
    assert found.classes == want.classes and len(want.classes) == 19
    rule = "AdjustedNames" if protocol == "own" else "AdjustedNamesByWindow"
    assert record["protocol"]["rule"] == f"released:{rule}"


@pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
def test_attention_across_windows(tmp_path, monkeypatch):
    from rfclip.app import serve

    job, picture, saved, save = serve.choices("rfclip-tiny", None, None)[0], tiny_folder() / "scene.png", [], serve.save
    monkeypatch.setattr(serve, "save", lambda *given: saved.append(given) or save(*given))
    page = serve.Page([job], tmp_path)
    settings = (str(job), 5.0, 0.7, "all", "own", 0.0, False, True, ())
    next(page.segment(str(picture), NAMES, "clearclip", *settings, Quiet()))
    ((found, record, _),) = saved
    with rfclip.Segmenter(method="clearclip", across_windows=True) as segmenter:
        want = segmenter(picture, NAMES)
    assert np.array_equal(found.labels, want.labels) and record["across_windows"] is True
    with pytest.raises(serve.gr.Error, match="no self-attention"):
        for _ in page.segment(str(picture), NAMES, "clip", *settings, Quiet()):
            pass
    offered = {method: serve._across(method).visible for method in ("rf-clip", "clearclip", "naclip")}
    assert offered == {"rf-clip": True, "clearclip": True, "naclip": False}


@pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
@pytest.mark.parametrize("size", [(1, 16), (16, 1), (250, 4000), (4000, 3000), (5000, 5000)])
def test_the_work_is_bounded_by_what_is_shown(tmp_path, monkeypatch, size):
    """However many pixels an upload has, and however long it is, little is segmented and drawn; masks fit it."""
    from rfclip.app import serve
    from rfclip.segment.job import Job
    from rfclip.segment.segmenter import Segmenter

    segmented, explained, masks = [], [], []
    segment, explain, save = Segmenter.segment, serve.explain, serve.save
    monkeypatch.setattr(
        Segmenter,
        "segment",
        lambda self, rgb, *rest, **more: segmented.append(rgb.size) or segment(self, rgb, *rest, **more),
    )
    monkeypatch.setattr(serve, "save", lambda found, *rest: masks.append(found.mask().size) or save(found, *rest))

    def watched(*given, **named):
        explained.append(explain(*given, **named))
        return explained[-1]

    monkeypatch.setattr(serve, "explain", watched)
    Image.new("RGB", size, "green").save(tmp_path / "picture.png")
    job = Job("rfclip-tiny", None)
    page = serve.Page([job], tmp_path)
    settings = (str(job), 2.0, 0.3, "all", "own", 0.0, True, False, ())
    picture = str(tmp_path / "picture.png")
    _, overlay, *_, seen, _, _, _ = next(page.segment(picture, "grass, sky", "rf-clip", *settings, Quiet()))
    place = page.place(seen, SimpleNamespace(index=(overlay.width - 1, overlay.height - 1)))
    assert all(side - side // 100 - 1 <= at < side for at, side in zip(place, size, strict=True))
    marked, _ = next(page.point(overlay, seen, *place))
    assert segmented == [overlay.size] and max(overlay.size) <= serve.SHOWN_SIDE
    assert masks == [size]
    trained = (224 // 16) ** 2
    assert [found.grid[0] * found.grid[1] <= 2.5 * trained for found in explained] == [True, True]
    assert marked.size == overlay.size and max(max(found.image.size) for found in explained) <= 2000


@linux_only
def test_only_this_machine(address):
    """The server listens on loopback and nowhere else."""
    port = int(address.rstrip("/").rpartition(":")[2])
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_no_file_of_this_machine(page, address):
    for path in ("/etc/passwd", Path(rfclip.__file__), "/proc/self/environ"):
        assert page.request.get(f"{address}gradio_api/file={path}").status in (403, 404)


def test_a_port_that_is_taken(address, tmp_path):
    port = address.rstrip("/").rpartition(":")[2]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "rfclip", "serve", "--port", port], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and port in done.stderr, done.stderr
    assert time.monotonic() - began < 60
