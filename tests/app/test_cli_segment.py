"""`rfclip segment`, end to end on real files and bad ones."""

import errno
import json
import os
import re
from pathlib import Path
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
from commands import NAMES, check_result, files_below, refused, run, segment, state
from miniatures import scene
from PIL import Image

import rfclip
from rfclip import RefocusConfig
from rfclip.methods import METHODS
from rfclip.tiny.scenes import CLASSES, GROUNDS, make_scene
from rfclip.towers.loading import tiny_folder

pytestmark = [pytest.mark.usefixtures("folder"), pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")]


def results(*stems):
    return {f"{stem}{suffix}" for stem in stems for suffix in (".mask.png", ".overlay.png", ".json")}


@pytest.fixture
def pictures(folder):
    """a.png, b.jpg and deep/c.PNG in the folder pictures, among files that are not pictures."""
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


# What comes out -------------------------------------------------------------------------------------------------------


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
        ("cat", [["cat"], ["background", *GROUNDS]]),
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
    random = torch.nn.functional.normalize(torch.randn(255, width))  # encoding that many names would take long
    monkeypatch.setattr(rfclip.Segmenter, "text_embeddings", lambda *_: random)
    scene(1, 16, 16).save("picture.png")
    names = [f"thing {number}" for number in range(255)]
    assert segment("picture.png", classes=", ".join(names)).exit_code == 0
    check_result("rfclip-out/picture", scene(1, 16, 16), [[name] for name in names])


def test_unknown_names_warn_once(pictures):
    result = segment("pictures", classes="cat, unicorn")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr.count("never trained on 'unicorn'") == 1
    assert ", ".join(CLASSES) in result.stderr
    assert "never trained" not in segment("pictures", "--overwrite").stderr


def test_one_class_gets_a_background(folder, segmenter):
    """Which the output says; with --no-background the one class covers the picture."""
    path = tiny_folder() / "scene.png"
    done = segment(path, classes="tiger")
    assert 'grass, sky, water, sand, snow, brick make up a class "background"; --no-background' in done.stderr
    labels, _ = check_result("rfclip-out/scene", Image.open(path), [["tiger"], ["background", *GROUNDS]])
    want = segmenter(path, "tiger", background=True).labels
    assert np.array_equal(labels, want) and set(np.unique(want)) == {0, 1}
    done = segment(path, "--no-background", "--overwrite", classes="tiger")
    assert "background" not in done.stderr
    labels, _ = check_result("rfclip-out/scene", Image.open(path), [["tiger"]])
    assert not labels.any()


def test_a_background_on_demand(folder, segmenter):
    scene(1).save("picture.png")
    assert segment("picture.png", "--background", classes="cat, dog; grass").exit_code == 0
    grounds = ["background", *(name for name in GROUNDS if name != "grass")]
    labels, _ = check_result("rfclip-out/picture", scene(1), [["cat", "dog"], ["grass"], grounds])
    want = segmenter("picture.png", "cat, dog; grass", background=True)
    assert want.classes == ("cat", "grass", "background")
    assert np.array_equal(labels, want.labels)
    refused(segment("picture.png", "--background", classes="cat; background"), "there is such a class already")


def test_pictures_that_are_no_scenes_are_told_what_the_bundled_model_is(folder):
    """Once in a run; scenes, and runs of other models, are told nothing."""
    for name in ("a.png", "b.jpg"):
        scene(1).save(name)
    done = segment("a.png", "b.jpg")
    assert done.stderr.count("rfclip-tiny is a demonstration") == 1
    assert "--model ViT-B-16-quickgelu --pretrained openai" in done.stderr
    make_scene(5, 64, object_size=(24, 40)).save(Path("scene.png"))
    assert "demonstration" not in segment("scene.png").stderr
    assert "demonstration" not in segment(str(tiny_folder() / "scene.png")).stderr


def test_segment_by_another_method(folder):
    scene(1).save("picture.png")
    assert segment("picture.png", "--method", "naclip").exit_code == 0
    record = json.loads(Path("rfclip-out/picture.json").read_text())
    assert (record["method"], record["config"]) == ("naclip", None)
    with rfclip.Segmenter(method="naclip") as segmenter:
        expected = segmenter("picture.png", "cat, grass, sky").labels
    assert np.array_equal(np.asarray(Image.open("rfclip-out/picture.mask.png")), expected)
    refused(segment("picture.png", "--method", "lseg"), "method='lseg'", "naclip")
    assert all(name in run("methods").stdout for name in METHODS)


def test_segment_as_on_a_benchmark(folder):
    """`released` sees pictures of VOC21 as a whole."""
    scene(1).save("picture.png")
    assert segment("picture.png", "--method", "released", "--protocol", "own:voc21", classes="voc21").exit_code == 0
    record = json.loads(Path("rfclip-out/picture.json").read_text())
    assert record["window"] is None and record["protocol"]["options"]["share"] == 0.1
    protocol = METHODS["released"].protocol.on("voc21")
    with (
        rfclip.Segmenter(method="released", protocol=protocol) as segmenter,
        pytest.warns(UserWarning, match="never trained"),
    ):
        expected = segmenter("picture.png", "voc21").labels
    assert np.array_equal(np.asarray(Image.open("rfclip-out/picture.mask.png")), expected)
    refused(segment("picture.png", "--protocol", "own:voc"), "dataset 'voc'", "voc21")


# What goes wrong ------------------------------------------------------------------------------------------------------


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
    result = segment("pictures")
    assert result.exit_code == 0
    assert "2 segmented into rfclip-out; 1 skipped" in result.stderr
    assert "--overwrite" in result.stderr
    assert {path: value for path, value in state(out).items() if path in before} == before
    assert segment("pictures", "--overwrite", classes="dog, water").exit_code == 0
    check_result("rfclip-out/a", scene(1), [["dog"], ["water"]])
    assert files_below(out) == results("a", "b", "deep/c")


@pytest.mark.parametrize("format", ["png", "parquet"])
@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--method", "kk"], "method, config"),
        (["--post", "pamr"], "post"),
        (["--threshold", "0.5"], "threshold"),
        (["--precision", "bf16"], "weights, precision"),
        ([], "classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_results_of_other_settings_are_refused(pictures, format, options, changed):
    """Otherwise one folder would hold two meanings of an index."""
    chosen, out = ["--format", format], pictures.parent / "rfclip-out"
    assert segment("pictures", *chosen).exit_code == 0
    before = state(out)
    result = segment("pictures", *chosen, *options, **({} if options else {"classes": "dog, water"}))
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert f"was made with other {changed}: another --out, or --overwrite" in told
    assert state(out) == before


def test_a_replaced_picture_is_segmented_again(pictures):
    assert segment("pictures").exit_code == 0
    scene(7).save(pictures / "a.png")
    assert "1 segmented into rfclip-out; 2 skipped" in segment("pictures").stderr
    check_result("rfclip-out/a", scene(7), [[name] for name in NAMES])
    os.utime(pictures / "a.png", ns=(1, 1))
    assert "1 segmented into rfclip-out; 2 skipped" in segment("pictures").stderr


def test_a_replaced_picture_of_a_parquet_file_is_refused(pictures):
    assert segment("pictures", "--format", "parquet").exit_code == 0
    scene(7).save(pictures / "a.png")
    result = segment("pictures", "--format", "parquet")
    assert result.exit_code == 2 and "has changed since it was segmented" in " ".join(result.stderr.split())
    assert "3 segmented" in segment("pictures", "--format", "parquet", "--overwrite").stderr


def test_classes_add_up(pictures, folder):
    (folder / "names.txt").write_text("sky, clouds\n")
    given = ("-c", "cat; dog, puppy", "-c", "names.txt", "-o", "out", "-m", "rfclip-tiny")
    assert run("segment", "pictures/a.png", *given).exit_code == 0
    check_result("out/a", scene(1), [["cat"], ["dog", "puppy"], ["sky", "clouds"]])
    for command in ("segment", "explain"):
        given = (
            command,
            "pictures/a.png",
            "--model",
            "rfclip-tiny",
            "--classes",
            "cat; sky",
            "--classes",
            "sky, grass",
        )
        refused(run(*given), "classes: 'sky' stands in more than one list")


def test_json_for_scripts(pictures):
    (pictures / "bad.png").write_text("no picture")
    done = segment("pictures", "--json", "--out", "out")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and (found["out"], found["done"], found["skipped"]) == ("out", 3, 0)
    ((failed, reason),) = [(Path(each["image"]).name, each["reason"]) for each in found["failed"]]
    assert failed == "bad.png" and "cannot be read as an image" in reason
    assert "3 segmented" not in done.stderr
    assert json.loads(segment("pictures/a.png", "--json", "--out", "out").stdout)["skipped"] == 1


def test_the_model_for_what_is_given(monkeypatch, folder):
    """OpenAI's for photographs, the bundled one for its own scenes; what cannot be opened does not decide."""

    def download(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    scene(1).save("photo.png")
    Path("bad.png").write_text("no picture")
    done = run("segment", "bad.png", "photo.png", "-c", "cat")
    assert done.exit_code == 2 and "model: ViT-B-16-quickgelu with OpenAI's weights; --model takes" in done.stderr
    assert "could not be downloaded" in done.stderr
    shipped = str(tiny_folder() / "scene.png")
    done = run("segment", "bad.png", shipped, "photo.png", "-c", "dog, sky")
    assert json.loads(Path("rfclip-out/scene.json").read_text())["model"] == "rfclip-tiny"
    assert "2 segmented" in done.stderr and "rfclip-tiny is a demonstration" in done.stderr


def test_a_slash_in_a_name(pictures):
    assert segment("pictures/a.png", classes="tv/monitor, grass").exit_code == 0
    check_result("rfclip-out/a", scene(1), [["tv/monitor"], ["grass"]])


@pytest.mark.parametrize("kept", sorted(results("picture")))
def test_any_existing_file_stays_and_is_reported(folder, kept):
    """Somebody else's file, or one of three that a killed command left behind."""
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
    assert "1 segmented into rfclip-out; 2 skipped" in segment("pictures").stderr
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
    scene(2).save(folder / "b.png")
    done = segment(*given, "b.png")
    assert done.exit_code == 1
    assert done.stderr.count("another picture's results are called a") == 2
    assert files_below(folder / "rfclip-out") == results("b")


def test_names_in_one_folder_never_clash(pictures):
    """A name with its suffix may be another's without."""
    names = ["a.png", "a.jpg", "a.jpg.png", "a.jpg.png.gif", "b.jpg", "b.jpg.gif"]
    for name in names[1:]:
        scene(4).save(pictures / name)
    (pictures / "deep/c.PNG").unlink()
    assert segment("pictures").exit_code == 0
    want = results("a.png", "a.jpg", "a.jpg.png", "a.jpg.png.gif", "b", "b.jpg")
    assert files_below(pictures.parent / "rfclip-out") == want


def test_a_full_disk_ends_the_run(pictures, monkeypatch):
    """The other pictures would be segmented in vain."""

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device", "rfclip-out/a.mask.png")

    monkeypatch.setattr("rfclip.app.writer.write_whole", full)
    done = segment("pictures")
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr and "failed" not in done.stderr


ERRORS = {
    "no-class": (["--classes", ""], ["classes", "at least one"]),
    "empty-name": (["--classes", "cat,,dog"], ["classes", "no empty names"]),
    "name-twice": (["--classes", "cat, dog; cat"], ["'cat'", "more than once"]),
    "too-many-classes": (["--classes", ",".join(map(str, range(256)))], ["got 256", "at most 255"]),
    "classes-in-binary": (["--classes", "picture.png"], ["classes file picture.png"]),
    "method": (["--method", "lseg"], ["method='lseg'", "expected one of clip, maskclip"]),
    "device": (["--device", "toaster"], ["--device toaster", "--device cpu"]),
    "device-without-data": (["--device", "meta"], ["--device meta", "--device cpu"]),
    "config-missing": (["--config", "missing.json"], ["missing.json"]),
    "config-malformed": (["--config", "malformed.json"], ["malformed.json", "must be JSON"]),
    "config-deep": (["--config", "deep.json"], ["deep.json", "nested too deeply"]),
    "config-huge": (["--config", "huge.json"], ["huge.json", "tau=1000", "expected a number"]),
    "config-unknown-key": (["--config", "unknown.json"], ["unknown.json", "taw", "known:", "tau_attn"]),
    "config-binary": (["--config", "picture.png"], ["--config picture.png"]),
    "config-of-another-model": (["--config", "wide.json"], ["distraction_dims [5000]"]),
    "out-is-a-file": (["--out", "picture.png"], ["--out picture.png", "expected a folder"]),
    "model": (["--model", "ViT-Z-99", "--pretrained", "openai"], ["'ViT-Z-99'", "rfclip models"]),
    "tag": (["--model", "ViT-B-16", "--pretrained", "mine"], ["'mine'", "openai, "]),
    "no-tag": (["--model", "ViT-B-16"], ["needs pretrained weights", "openai, "]),
    "pickle": (["--model", "ViT-B-16", "--pretrained", "weights.pt"], ["weights.pt", "safetensors"]),
    "tiny-with-a-tag": (["--model", "rfclip-tiny", "--pretrained", "openai"], ["'openai'", "rfclip-tiny"]),
    "tiny-with-a-file": (["--model", "rfclip-tiny", "--pretrained", "weights.pt"], ["weights.pt", "rfclip-tiny"]),
    "tag-alone": (["--pretrained", "openai"], ["--pretrained openai: give the --model as well"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(folder, case):
    arguments, words = ERRORS[case]
    scene(1).save("picture.png")
    (folder / "malformed.json").write_text('{"distraction_dims": [1')
    (folder / "deep.json").write_text('{"distraction_dims": ' + 100_000 * "[")
    (folder / "huge.json").write_text('{"distraction_dims": [1], "tau": 1' + 309 * "0" + "}")
    (folder / "unknown.json").write_text('{"distraction_dims": [], "taw": 5}')
    (folder / "wide.json").write_text('{"distraction_dims": [5000]}')
    torch.save({}, "weights.pt")
    before = state(folder)
    classes = [] if "--classes" in arguments else ["--classes", "cat"]
    model = [] if {"--model", "--pretrained"} & {*arguments} else ["--model", "rfclip-tiny"]
    refused(run("segment", "picture.png", *classes, *model, *arguments), *words)
    assert state(folder) == before


@pytest.mark.parametrize(
    "given, accepted",
    [
        ("--threshold=1.5", "less than or equal to 1|is not in the range 0"),  # newer and older Typer
        ("--threshold=-0.1", "greater than or equal to 0|is not in the range 0"),
        ("--threshold=nan", "equal to|expected a probability, from 0 to 1"),
        ("--backend=magic", "'auto', 'eager', 'reference', 'triton'"),
        ("--precision=fp8", "'fp32', 'bf16', 'fp16'"),
        ("--format=tiff", "'png', 'parquet'"),
        ("--engine=spark", "'local', 'ray'"),
    ],
)
def test_choices_on_the_command_line(folder, given, accepted):
    scene(1).save("picture.png")
    result = run("segment", "picture.png", "--classes", "cat", given)
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert given.partition("=")[0] in said and any(words in said for words in accepted.split("|"))
    assert files_below(folder) == {"picture.png"}


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
