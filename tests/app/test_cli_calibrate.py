"""`rfclip calibrate`, and models whose distraction dimensions are not known."""

import json
import re
import shlex
from datetime import date
from pathlib import Path

import open_clip
import pytest
import torch
from commands import NAMES, check_result, files_below, refused, run, segment, state
from miniatures import scene
from PIL import Image

import rfclip
import rfclip.methods
from rfclip import RefocusConfig
from rfclip.config import read_settings
from rfclip.towers.loading import tiny_folder

pytestmark = pytest.mark.usefixtures("folder")


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


def test_calibrate_says_where_the_settings_are_from(scenes):
    """By default in a file that is named after the checkpoint; the command that it prints goes on from there."""
    result = run("calibrate", "scenes", "scenes/1.png")
    assert result.exit_code == 0, result.output
    config, origin = read_settings(Path("rfclip-tiny.json").read_text())
    assert config == RefocusConfig(rfclip.calibrate(rfclip.load_model(), seen(scenes)).dims)
    assert (origin.model, origin.pretrained) == ("rfclip-tiny", ())
    assert origin.source == "calibrated on 18 pictures: scenes, scenes/1.png"
    assert (origin.date, origin.version) == (date.today().isoformat(), rfclip.__version__)
    command = shlex.split(result.stderr.partition("to go on: ")[2])
    assert command[0] == "rfclip"
    assert run(*command[1:]).exit_code == 0
    before = state(scenes.parent)
    refused(run("calibrate", "scenes"), "rfclip-tiny.json exists", "--overwrite")
    assert state(scenes.parent) == before


def seen(folder):
    """The pictures of a folder as open_clip prepares them, in one batch."""
    prepare = open_clip.image_transform((112, 112), is_train=False)
    return torch.stack([prepare(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())])


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


# Models whose dimensions are not known --------------------------------------------------------------------------------


@pytest.fixture
def stranger(folder, monkeypatch):
    """The weights of the package under a name and a path of which nothing is known."""
    config = json.loads((tiny_folder() / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "stranger", config)
    weights = tiny_folder() / "open_clip_model.safetensors"
    scene(1).save("picture.png")
    return ["--model", "stranger", "--pretrained", str(weights)]


def test_a_checkpoint_whose_dims_are_not_known(stranger):
    refused(segment("picture.png", *stranger), "'stranger'", "not known", "rfclip calibrate", "--config")


def test_a_checkpoint_that_was_calibrated(stranger):
    result = run("calibrate", "picture.png", *stranger)
    assert result.exit_code == 0, result.output
    config = "stranger.open_clip_model.json"
    assert segment("picture.png", *stranger, "--config", config).exit_code == 0
    _, record = check_result("rfclip-out/picture", scene(1), [[name] for name in NAMES])
    assert (record["model"], record["pretrained"]) == (stranger[1], stranger[3])
    written = json.loads(Path(config).read_text())
    assert written == written | record["config"] | {"model": stranger[1], "pretrained": [stranger[3]]}


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "."],
        ["explain", "."],
        ["segment", ".", "--classes", "cat"],
        ["evaluate", "scenes", "--method", "rf-clip"],
    ],
)
def test_towers_that_are_read_only(scenes, command):
    """Refused before a download, with what works in its place."""
    result = run(*command, "--model", "RN50", "--pretrained", "openai")
    refused(result, "RN50 is only read, not refocused: it has no transformer blocks", "method='maskclip'")
