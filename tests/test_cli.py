"""The `rfclip` command, end to end on real files and bad ones."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import rfclip
import rfclip.methods
from rfclip import RefocusConfig
from rfclip.cli import app
from rfclip.models import tiny_folder
from rfclip.scenes import CLASSES, make_scene

NAMES = ["cat", "grass", "sky"]
METHODS = ["clip", "kk", "kk-mean", "rf-clip"]


def run(*arguments):
    """What the command does with these arguments; it never ends in a traceback."""
    try:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        logging.disable(logging.NOTSET)  # the command is the process's only guest, the tests are not
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def segment(*arguments, classes="cat, grass, sky"):
    return run("segment", *arguments, "--classes", classes)


def refused(result, *words):
    """The command stopped with one message, which has these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "\n\n" not in result.stderr
    for word in words:
        assert word in result.stderr


def scene(number, height=56, width=64):
    return Image.fromarray(make_scene(number, 64, object_size=(24, 40)).image[:height, :width])


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def results(*stems):
    return {f"{stem}{suffix}" for stem in stems for suffix in (".mask.png", ".overlay.png", ".json")}


def state(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder: every path below is relative."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pictures(folder):
    """a.png, b.jpg and deep/c.PNG in the folder pictures, among files that are no pictures."""
    at = folder / "pictures"
    (at / "deep").mkdir(parents=True)
    scene(1).save(at / "a.png")
    scene(2, 64, 40).save(at / "b.jpg")
    scene(3).save(at / "deep" / "c.PNG")
    (at / "notes.txt").write_text("no picture")
    (at / "deep" / "figures.json").write_text("{}")
    return at


@pytest.fixture(scope="module")
def segmenter():
    return rfclip.Segmenter(cache=False)


# Segmenting: what comes out ------------------------------------------------------------------------------------------


def check_result(stem, picture, classes):
    """The mask, the overlay and the record agree with each other; returns the labels and the record."""
    mask, overlay = Image.open(f"{stem}.mask.png"), Image.open(f"{stem}.overlay.png")
    record = json.loads(Path(f"{stem}.json").read_text("utf-8"))
    assert (mask.format, mask.mode, mask.size) == ("PNG", "P", picture.size)
    assert (overlay.format, overlay.mode) == ("PNG", "RGB")
    assert overlay.width >= picture.width and overlay.height >= picture.height
    assert [entry["index"] for entry in record["classes"]] == list(range(len(classes)))
    assert [[entry["name"], *entry["synonyms"]] for entry in record["classes"]] == classes
    labels = np.asarray(mask)
    for entry in record["classes"]:
        assert entry["share"] == pytest.approx(np.mean(labels == entry["index"]), abs=1e-12)
    shares = sum(entry["share"] for entry in record["classes"]) + np.mean(labels == record["nothing"])
    assert shares == pytest.approx(1)
    assert (record["width"], record["height"]) == picture.size
    assert record["seconds"] > 0
    assert record["rfclip"] == rfclip.__version__
    return labels, record


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg", "picture.v2.png", "ein Bild [1].png"])
def test_one_file(segmenter, name):
    scene(1).save(name)
    result = segment(name, "--out", "results/new")
    assert result.exit_code == 0
    assert "1 segmented into" in result.stderr
    stem = f"results/new/{name[:-4]}"
    labels, record = check_result(stem, scene(1), [[name] for name in NAMES])
    assert np.array_equal(labels, segmenter(name, NAMES).labels)
    assert (record["image"], record["model"], record["pretrained"]) == (name, "rfclip-tiny", None)
    assert RefocusConfig.from_json(json.dumps(record["config"])) == segmenter.config
    assert record["threshold"] is None


def test_a_turned_picture_comes_out_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(1, 40, 64).save("turned.jpg", exif=exif)
    assert segment("turned.jpg").exit_code == 0
    check_result("rfclip-out/turned", Image.new("RGB", (40, 64)), [[name] for name in NAMES])


def test_the_overlay_shows_the_masks_colours():
    Image.new("RGB", (64, 56), "gray").save("picture.png")
    assert segment("picture.png", classes="sky").exit_code == 0
    colour = np.array(Image.open("rfclip-out/picture.mask.png").getpalette()[:3])
    row = np.asarray(Image.open("rfclip-out/picture.overlay.png"))[28].astype(int)
    seen = row[len(row) // 2]
    assert np.all(np.sign(seen - 128) == np.sign(colour - 128))


@pytest.mark.parametrize(
    "given, expected",
    [
        (["pictures"], ["a", "b", "deep/c"]),
        (["pictures/"], ["a", "b", "deep/c"]),
        (["pictures/*.png"], ["a"]),
        (["pictures/**/*.[pP][nN][gG]"], ["a", "c"]),
        (["pictures/a.png", "pictures/b.jpg"], ["a", "b"]),
        (["pictures/b.jpg", "pictures/deep"], ["b", "c"]),
        (["pictures", "pictures/a.png", "pictures/?.png"], ["a", "b", "deep/c"]),
    ],
    ids=["folder", "slash", "glob", "recursive-glob", "files", "mixed", "given-twice"],
)
def test_what_is_segmented(pictures, given, expected):
    result = segment(*given, classes="cat, dog")
    assert result.exit_code == 0, result.output
    assert files_below(pictures.parent / "rfclip-out") == results(*expected)
    assert f"{len(expected)} segmented" in result.stderr


@pytest.mark.parametrize("given", ["pictures", "pictures/*.*g"], ids=["folder", "glob"])
def test_results_are_not_segmented_again(pictures, given):
    for out in ("pictures", "pictures/deep"):
        segment("pictures/a.png", "--out", out)
    result = segment(given, "--out", "again")
    assert result.exit_code == 0, result.output
    expected = results("a", "b", "deep/c") if given == "pictures" else results("a", "b")
    assert files_below(pictures.parent / "again") == expected


@pytest.mark.parametrize(
    "classes, expected",
    [
        ("cat, kitten; dog", [["cat", "kitten"], ["dog"]]),
        (" cat ,dog", [["cat"], ["dog"]]),
        ("cat", [["cat"]]),
        ("names.txt", [["cat", "kitten"], ["dog"], ["green grass"]]),
    ],
    ids=["synonyms", "spaces", "one", "file"],
)
def test_classes(folder, classes, expected):
    (folder / "names.txt").write_text("cat, kitten\n\ndog\n  green   grass\n", "utf-8")
    scene(1).save("picture.png")
    assert segment("picture.png", classes=classes).exit_code == 0
    check_result("rfclip-out/picture", scene(1), expected)


def test_threshold(segmenter):
    scene(1).save("picture.png")
    want = segmenter("picture.png", NAMES, probabilities=True)
    largest = want.probabilities.max(axis=0)
    threshold = float(np.median(largest))
    assert segment("picture.png", "--threshold", repr(threshold)).exit_code == 0
    labels, record = check_result("rfclip-out/picture", scene(1), [[name] for name in NAMES])
    assert np.array_equal(labels, np.where(largest < threshold, 255, want.labels))
    assert 0 < np.mean(labels == 255) < 1
    assert (record["threshold"], record["nothing"]) == (threshold, 255)


def test_config_from_a_file(segmenter):
    config = RefocusConfig((), proxy="kk")
    Path("config.json").write_text(config.to_json())
    scene(1).save("picture.png")
    assert segment("picture.png", "--config", "config.json", "--backend", "reference").exit_code == 0
    labels, record = check_result("rfclip-out/picture", scene(1), [[name] for name in NAMES])
    assert RefocusConfig.from_json(json.dumps(record["config"])) == config
    with rfclip.Segmenter(config=config, cache=False) as want:
        assert np.array_equal(labels, want("picture.png", NAMES).labels)


def test_the_most_classes(monkeypatch, segmenter):
    width = segmenter.model.visual.output_dim
    random = torch.nn.functional.normalize(torch.randn(255, width))  # to encode so many names would take long
    monkeypatch.setattr(rfclip.Segmenter, "text_embeddings", lambda *_: random)
    scene(1, 16, 16).save("picture.png")
    names = [f"thing {number}" for number in range(255)]
    assert segment("picture.png", classes=", ".join(names)).exit_code == 0
    check_result("rfclip-out/picture", scene(1, 16, 16), [[name] for name in names])


def test_unknown_names_warn_once(pictures):
    result = segment("pictures", classes="cat, unicorn")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr.count("warning:") == 1
    assert "never trained on 'unicorn'" in result.stderr
    assert ", ".join(CLASSES) in result.stderr
    assert "warning" not in segment("pictures", "--overwrite").stderr


# Segmenting: what goes wrong -----------------------------------------------------------------------------------------


def test_bad_files_among_good_ones(pictures):
    (pictures / "empty.png").touch()
    (pictures / "text.jpg").write_text("no picture")
    whole = (pictures / "a.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    result = segment("pictures", "missing.png", "no*.tiff")
    assert result.exit_code == 1
    assert files_below(pictures.parent / "rfclip-out") == results("a", "b", "deep/c")
    assert "3 segmented into rfclip-out; 5 failed" in result.stderr
    for name in ("empty.png", "text.jpg", "cut.png"):
        assert re.search(rf"^failed: pictures/{name}: cannot be read as an image: .", result.stderr, re.MULTILINE)
    for name in ("missing.png", "no*.tiff"):
        assert f"failed: {name}: no such file" in result.stderr


@pytest.mark.parametrize("given", ["missing.png", "*.png", "empty"])
def test_nothing_found(folder, given):
    (folder / "empty").mkdir()
    result = segment(given)
    assert result.exit_code == 1
    assert f"failed: {given}: no" in result.stderr


def test_existing_results_stay(pictures):
    out = pictures.parent / "rfclip-out"
    assert segment("pictures/a.png").exit_code == 0
    before = state(out)
    result = segment("pictures", classes="dog, water")
    assert result.exit_code == 0
    assert "2 segmented into rfclip-out; 1 left as they were" in result.stderr
    assert "--overwrite" in result.stderr
    assert {path: value for path, value in state(out).items() if path in before} == before
    assert segment("pictures", "--overwrite", classes="dog, water").exit_code == 0
    check_result("rfclip-out/a", scene(1), [["dog"], ["water"]])
    assert files_below(out) == results("a", "b", "deep/c")


@pytest.mark.parametrize("kept", sorted(results("picture")))
def test_any_existing_file_stays_and_is_told(folder, kept):
    """Another's file, or one of three that a killed command left."""
    scene(1).save("picture.png")
    (folder / "rfclip-out").mkdir()
    (folder / "rfclip-out" / kept).write_text("mine")
    result = segment("picture.png")
    assert result.exit_code == 1
    assert f"failed: picture.png: {kept} in rfclip-out is another picture's results, or incomplete" in result.stderr
    assert {path.name: value[0] for path, value in state(folder / "rfclip-out").items()} == {kept: b"mine"}
    assert segment("picture.png", "--overwrite").exit_code == 0


@pytest.mark.parametrize("step", ["mask", "overlay"])
def test_saving_that_fails_midway(pictures, monkeypatch, step):
    save = getattr(rfclip.Segmentation, step)

    def full_for_portraits(segmentation):
        if segmentation.image.height > segmentation.image.width:  # b.jpg
            raise OSError("no space left on device")
        return save(segmentation)

    out = pictures.parent / "rfclip-out"
    with monkeypatch.context() as patch:
        patch.setattr(rfclip.Segmentation, step, full_for_portraits)
        result = segment("pictures")
        assert result.exit_code == 1
        assert "failed: pictures/b.jpg: no space left on device" in result.stderr
        assert files_below(out) == results("a", "deep/c")
    assert "1 segmented into rfclip-out; 2 left as they were" in segment("pictures").stderr
    before = state(out)
    assert before.keys() == {out / name for name in results("a", "b", "deep/c")}
    monkeypatch.setattr(rfclip.Segmentation, step, full_for_portraits)
    assert segment("pictures/b.jpg", "--overwrite").exit_code == 1
    assert state(out) == before


def test_pictures_that_differ_in_their_suffix(pictures):
    scene(4).save(pictures / "a.jpg")
    assert segment("pictures").exit_code == 0
    assert files_below(pictures.parent / "rfclip-out") == results("a.png", "a.jpg", "b", "deep/c")
    for name, number in (("a.png", 1), ("a.jpg", 4)):
        _, record = check_result(f"rfclip-out/{name}", scene(number), [[name] for name in NAMES])
        assert record["image"] == f"pictures/{name}"


def test_results_of_another_picture_are_not_taken_for_this_one(folder):
    scene(1).save("a.png")
    scene(2).convert("RGB").save("a.jpg")
    assert segment("a.png").exit_code == 0
    before = state(folder / "rfclip-out")
    second = segment("a.jpg")
    assert second.exit_code == 1
    assert "another picture's results" in second.stderr
    (folder / "b").mkdir()
    scene(3).save("b/a.png")
    third = segment("b/a.png")
    assert third.exit_code == 1
    assert "another picture's results" in third.stderr
    assert state(folder / "rfclip-out") == before
    assert segment("a.jpg", "--overwrite").exit_code == 0


def test_a_picture_given_twice_is_segmented_once(folder):
    scene(1).save("a.png")
    assert "1 segmented" in segment("a.png", folder / "a.png", "./a.png").stderr


def test_square_brackets_are_no_markup(folder):
    scene(1).save("a[b].png")
    assert segment("a[b].png", "--out", "x[/b]y").exit_code == 0
    assert (folder / "x[/b]y" / "a[b].json").is_file()
    assert run("segment", "a[b].png", "--classes", "cat", "--model", "[/x]").exit_code == 2


@pytest.mark.parametrize(
    "given", [["one/a.png", "two/a.png"], ["one", "two"], ["*/a.png"]], ids=["files", "folders", "glob"]
)
def test_equal_names_from_two_folders(folder, given):
    for name in ("one", "two"):
        (folder / name).mkdir()
        scene(1).save(folder / name / "a.png")
    refused(segment(*given), "a.png", "one at a time")
    assert not (folder / "rfclip-out").exists()


ERRORS = {
    "no-class": (["--classes", ""], ["classes", "at least one"]),
    "empty-name": (["--classes", "cat,,dog"], ["classes", "no empty names"]),
    "name-twice": (["--classes", "cat, dog; cat"], ["'cat'", "more than once"]),
    "too-many-classes": (["--classes", ",".join(map(str, range(256)))], ["got 256", "at most 255"]),
    "classes-in-binary": (["--classes", "picture.png"], ["classes file picture.png"]),
    "threshold-above": (["--threshold", "1.5"], ["--threshold 1.5", "from 0 to 1"]),
    "threshold-below": (["--threshold=-0.1"], ["--threshold -0.1", "from 0 to 1"]),
    "threshold-nan": (["--threshold", "nan"], ["--threshold nan", "from 0 to 1"]),
    "backend": (["--backend", "magic"], ["backend='magic'", "auto, eager, reference, triton"]),
    "precision": (["--precision", "fp8"], ["--precision fp8", "fp32, bf16 or fp16"]),
    "device": (["--device", "toaster"], ["--device toaster", "--device cpu"]),
    "device-without-data": (["--device", "meta"], ["--device meta", "--device cpu"]),
    "config-missing": (["--config", "missing.json"], ["missing.json"]),
    "config-malformed": (["--config", "malformed.json"], ["malformed.json", "must be JSON"]),
    "config-unknown-key": (["--config", "unknown.json"], ["unknown.json", "taw", "known:", "tau_attn"]),
    "config-binary": (["--config", "picture.png"], ["--config picture.png"]),
    "config-of-another-model": (["--config", "wide.json"], ["distraction_dims [5000]"]),
    "out-is-a-file": (["--out", "picture.png"], ["picture.png"]),
    "model": (["--model", "ViT-Z-99", "--pretrained", "openai"], ["'ViT-Z-99'", "rfclip models"]),
    "tag": (["--model", "ViT-B-16", "--pretrained", "mine"], ["'mine'", "openai, "]),
    "no-tag": (["--model", "ViT-B-16"], ["needs pretrained weights", "openai, "]),
    "pickle": (["--model", "ViT-B-16", "--pretrained", "weights.pt"], ["weights.pt", "safetensors"]),
    "tiny-with-a-tag": (["--pretrained", "openai"], ["'openai'", "rfclip-tiny"]),
    "tiny-with-a-file": (["--pretrained", "weights.pt"], ["weights.pt", "rfclip-tiny"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(folder, case):
    arguments, words = ERRORS[case]
    scene(1).save("picture.png")
    (folder / "malformed.json").write_text('{"distraction_dims": [1')
    (folder / "unknown.json").write_text('{"distraction_dims": [], "taw": 5}')
    (folder / "wide.json").write_text('{"distraction_dims": [5000]}')
    torch.save({}, "weights.pt")
    before = state(folder)
    refused(run("segment", "picture.png", "--classes", "cat", *arguments), *words)
    assert state(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["segment", "picture.png", "--classes", "cat"], ["calibrate", "picture.png"]])
def test_no_gpu(command):
    scene(1).save("picture.png")
    refused(run(*command, "--device", "cuda"), "--device cuda: not available here", "--device cpu")


@pytest.mark.parametrize("arguments", [[], ["picture.png"], ["--classes", "cat"]], ids=["both", "classes", "images"])
def test_missing_arguments(arguments):
    result = run("segment", *arguments)
    assert result.exit_code == 2
    assert "Missing" in result.stderr


# Other models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [URLError("no route"), OSError("offline"), RuntimeError("offline")], ids=repr)
@pytest.mark.parametrize("command", [["segment", "--classes", "cat"], ["calibrate"]], ids=["segment", "calibrate"])
def test_no_network(monkeypatch, command, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    scene(1).save("picture.png")
    name, *options = command
    result = run(name, "picture.png", *options, "--model", "ViT-B-16-quickgelu", "--pretrained", "openai")
    words = ["'ViT-B-16-quickgelu'", "could not be downloaded", "network", "--pretrained", "safetensors", "rfclip-tiny"]
    refused(result, *words)


@pytest.fixture
def stranger(folder, monkeypatch):
    """The package's weights under a name and a path that nothing is known of."""
    config = json.loads((tiny_folder() / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "stranger", config)
    weights = tiny_folder() / "open_clip_model.safetensors"
    scene(1).save("picture.png")
    return ["--model", "stranger", "--pretrained", str(weights)]


def test_a_checkpoint_whose_dims_are_not_known(stranger):
    refused(segment("picture.png", *stranger), "'stranger'", "not known", "rfclip calibrate", "--config")


def test_a_checkpoint_that_was_calibrated(stranger):
    result = run("calibrate", "picture.png", *stranger, "--out", "config.json")
    assert result.exit_code == 0, result.output
    assert segment("picture.png", *stranger, "--config", "config.json").exit_code == 0
    _, record = check_result("rfclip-out/picture", scene(1), [[name] for name in NAMES])
    assert (record["model"], record["pretrained"]) == (stranger[1], stranger[3])
    assert record["config"] == json.loads(Path("config.json").read_text())


# Calibration ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def scenes(folder):
    (folder / "scenes").mkdir()
    for number in range(18):  # more than one batch
        scene(number).save(folder / "scenes" / f"{number}.png")
    return folder / "scenes"


def test_calibrate(scenes):
    result = run("calibrate", "scenes", "--out", "new/config.json")
    assert result.exit_code == 0, result.output
    assert re.match(r"18 images\. .*distraction dimensions", result.stdout, re.IGNORECASE)
    assert "written: new/config.json" in result.stderr
    config = RefocusConfig.from_json(Path("new/config.json").read_text())
    transformer = rfclip.load_model().visual.transformer
    config.check_tower(transformer.width, transformer.layers)
    assert files_below(scenes.parent / "new") == {"config.json"}


def test_calibrate_does_not_overwrite(scenes):
    config = scenes.parent / "config.json"
    config.write_text("mine")
    before = state(scenes.parent)
    refused(run("calibrate", "scenes", "--out", "config.json"), "config.json exists", "--overwrite")
    assert state(scenes.parent) == before
    assert run("calibrate", "scenes/1.png", "--out", "config.json", "--overwrite").exit_code == 0
    assert RefocusConfig.from_json(config.read_text())


def test_calibrate_with_a_bad_file(scenes):
    (scenes / "bad.png").write_text("no picture")
    result = run("calibrate", "scenes", "missing.png", "--out", "config.json")
    assert result.exit_code == 1
    assert "failed: scenes/bad.png: cannot be read as an image" in result.stderr
    assert "failed: missing.png: no such file" in result.stderr
    assert result.stdout.startswith("18 images. ")
    assert RefocusConfig.from_json(Path("config.json").read_text())


def test_calibrate_without_a_good_file(folder):
    refused(run("calibrate", "missing.png"), "missing.png: no such file")
    (folder / "bad.png").write_text("no picture")
    result = run("calibrate", "bad.png", "--out", "config.json")
    assert result.exit_code == 2
    assert "failed: bad.png: cannot be read as an image" in result.stderr
    assert "at least one" in result.stderr
    assert files_below(folder) == {"bad.png"}


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_every_method_on_the_scenes(folder, monkeypatch):
    """But those that this model cannot have, which is said; and a contact sheet of the others."""

    def offline():
        raise ConnectionError("no network")

    monkeypatch.setattr(rfclip.methods, "load_dino", offline)
    result = run("evaluate", "scenes", "--method", "all", "--count", 1, "--sheet", "new/sheet.png")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [
        name for name in rfclip.methods.METHODS if name not in ("sc-clip", "proxyclip")
    ]
    assert "left out: sc-clip: method 'sc-clip' needs 11 blocks, and this tower has 6" in result.stderr
    assert "left out: proxyclip: no network" in result.stderr
    sheet = np.asarray(Image.open("new/sheet.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    refused(run("evaluate", "scenes", "--sheet", "new/sheet.png"), "new/sheet.png exists", "--overwrite")
    refused(run("evaluate", "scenes", "--method", "kk,gem,sc-clip"), "needs 11 blocks")
    refused(run("evaluate", "scenes", "--method", "kk", "--config", "config.json"), "config.json")


def test_segment_by_another_method(folder):
    scene(1).save("picture.png")
    assert segment("picture.png", "--method", "naclip").exit_code == 0
    record = json.loads(Path("rfclip-out/picture.json").read_text())
    assert (record["method"], record["config"]) == ("naclip", None)
    with rfclip.Segmenter(method="naclip") as segmenter:
        expected = segmenter("picture.png", "cat, grass, sky").labels
    assert np.array_equal(np.asarray(Image.open("rfclip-out/picture.mask.png")), expected)
    refused(segment("picture.png", "--method", "lseg"), "method='lseg'", "naclip")
    assert all(name in run("methods").stdout for name in rfclip.methods.METHODS)


@pytest.mark.parametrize("injected", [0, 0.1], ids=["plain", "injected"])
def test_evaluate(folder, injected):
    options = ["--inject-distraction", injected, "--out", "new/figures.json"] if injected else []
    result = run("evaluate", "scenes", "--count", 2, *options)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == METHODS
    printed = [[float(cell) for cell in row.split("│")[2:5]] for row in rows]
    assert all(0 <= figure <= 100 for figures in printed for figure in figures)
    assert ("simulated" in result.stdout) == bool(injected)
    if not injected:
        assert files_below(folder) == set()
        return

    def no_constants(text):
        raise AssertionError(f"{text} is not JSON")

    record = json.loads(Path("new/figures.json").read_text(), parse_constant=no_constants)
    assert (record["count"], record["seed"], record["inject_distraction"]) == (2, 0, 0.1)
    assert [row["method"] for row in record["rows"]] == METHODS
    for row, figures in zip(record["rows"], printed, strict=True):
        names = ("top1", "miou", "pixel_accuracy")
        assert all(0 <= row[name] <= 1 for name in names)
        assert [round(100 * row[name], 1) for name in names] == pytest.approx(figures, abs=0.11)
        assert list(row["iou"]) == list(CLASSES)
        seen = [value for value in row["iou"].values() if value is not None]
        assert all(0 <= value <= 1 for value in seen)
        assert row["miou"] == pytest.approx(np.mean(seen))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["scenes", "--count", "0"], ["count=0", "at least one"]),
        (["scenes", "--count", "-3"], ["count=-3", "at least one"]),
        (["scenes", "--inject-distraction", "2"], ["inject=2", "from 0 to 1"]),
        (["scenes", "--inject-distraction", "nan"], ["inject=nan", "from 0 to 1"]),
        (["photos"], ["'photos'", "expected scenes"]),
        (["scenes", "--device", "toaster"], ["--device toaster"]),
        (["scenes", "--model", "ViT-Z-99"], ["'ViT-Z-99'", "rfclip models"]),
    ],
    ids=["no-scene", "negative", "share", "share-nan", "name", "device", "model"],
)
def test_evaluate_with_wrong_arguments(folder, arguments, words):
    refused(run("evaluate", *arguments, "--out", "figures.json"), *words)
    assert files_below(folder) == set()


# The rest ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["60", "80", "300"])
def test_models(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    result = run("models")
    assert result.exit_code == 0
    listed = {line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")}
    assert {"rfclip-tiny", "ViT-B-16", "ViT-L-14"} <= listed
    assert not [name for name in listed if re.match(r"RN\d|convnext|ViT-B-16-SigLIP|coca|EVA", name)]
    assert "…" not in result.stdout  # nothing is cut
    if columns != "60":
        assert "commonpool_l_laion_s1b_b8k" in result.stdout


def test_version():
    done = subprocess.run([sys.executable, "-m", "rfclip", "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"rfclip {rfclip.__version__}\n", "")


def test_help_is_quick():
    code = """
import sys
from typer.testing import CliRunner
from rfclip.cli import app
for command in ([], ["segment"], ["calibrate"], ["models"], ["evaluate"]):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.stdout
print({"torch", "open_clip", "numpy", "PIL"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_importing_is_quick():
    code = """
import time
import open_clip
began = time.perf_counter()
import rfclip
rfclip.Segmenter, rfclip.refocus
print(time.perf_counter() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def test_no_command():
    result = run()
    assert "Usage" in result.output
    for command in ("segment", "calibrate", "models", "evaluate"):
        assert command in result.output


def test_serve_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(run("serve"), 'pip install "rfclip[serve]"')


def test_serve_refuses_before_it_listens(tmp_path):
    refused(run("serve", "--model", "RN50"), "RN50")
    refused(run("serve", "--device", "cuda:9"), "cuda:9")
    refused(run("serve", "--config", tmp_path / "none.json"), "none.json")
