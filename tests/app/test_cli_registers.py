"""`rfclip registers`, and --registers where methods are chosen."""

import json
from pathlib import Path

import pytest
from commands import files_below, refused, run, segment, state
from miniatures import scene

from rfclip import RegisterConfig
from rfclip.towers.loading import tiny_folder

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def scenes(folder):
    (folder / "scenes").mkdir()
    for number in range(5):  # more than one batch
        scene(number).save(folder / "scenes" / f"{number}.png")
    return folder / "scenes"


def test_registers(scenes):
    """It finds nothing on scenes, as the bundled file says, and the neuron that fires with injected distraction."""
    done = run("registers", "scenes", "--out", "new/registers.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("5 images. This checkpoint has no outliers")
    assert "written: new/registers.json" in done.stderr
    assert Path("new/registers.json").read_text() == (tiny_folder() / "registers.json").read_text()
    assert files_below(scenes.parent / "new") == {"registers.json"}
    given = ["--inject-distraction", "0.1", "--count", "1", "--readout", "kk", "--threshold", "90"]
    done = run("registers", "scenes", *given, "--out", "other.json")
    assert done.exit_code == 0, done.output
    assert RegisterConfig.from_json(Path("other.json").read_text()) == RegisterConfig(((3, 7),), 90.0, "kk")


def test_registers_does_not_overwrite(scenes):
    file = scenes.parent / "registers.json"
    file.write_text("mine")
    before = state(scenes.parent)
    refused(run("registers", "scenes", "--out", "registers.json"), "registers.json exists", "--overwrite")
    refused(run("registers", "scenes", "--readout", "rf-clip"), "readout='rf-clip': expected one of clip, maskclip")
    refused(run("registers", "scenes", "--threshold", "-3"), "threshold=-3.0: expected a positive number")
    refused(run("registers", "scenes", "--blocks", "7"), "blocks=7: expected 1 to 6")
    assert state(scenes.parent) == before
    assert run("registers", "scenes/1.png", "--out", "registers.json", "--overwrite").exit_code == 0
    assert RegisterConfig.from_json(file.read_text())


def test_registers_with_a_bad_file(scenes):
    (scenes / "bad.png").write_text("no picture")
    done = run("registers", "scenes", "missing.png")
    assert done.exit_code == 1
    assert "failed: scenes/bad.png: cannot be read as an image" in done.stderr
    assert "failed: missing.png: no such file" in done.stderr
    assert done.stdout.startswith("5 images. ")


def test_segment_with_registers(folder):
    """A file of neurons goes into the record and changes the features; another method, or a bad file, is refused."""
    scene(1).save("picture.png")
    config = RegisterConfig(((1, 3), (3, 7)), None, "clearclip")
    Path("registers.json").write_text(config.to_json())
    given = ["picture.png", "--method", "registers", "--registers", "registers.json"]
    assert segment(*given).exit_code == 0
    record = json.loads(Path("rfclip-out/picture.json").read_text())
    assert record["registers"] == json.loads(config.to_json())
    assert (record["method"], record["config"]) == ("registers", None)
    refused(segment("picture.png", "--registers", "registers.json"), "rf-clip takes none")
    Path("registers.json").write_text('{"neurons": [[9, 9]]}')
    refused(segment(*given, "--overwrite"), "block 9 does not exist: this tower has 6 blocks")
    Path("registers.json").write_text("no")
    refused(segment(*given), "--registers registers.json: a config must be JSON")


def test_a_checkpoint_whose_neurons_are_not_known(folder):
    scene(1).save("picture.png")
    model = ["--model", f"local-dir:{tiny_folder()}", "--method", "registers"]
    refused(segment("picture.png", *model), "not known: find them with `rfclip registers IMAGES")
    done = run("registers", "picture.png", *model[:2], "--out", "registers.json")
    assert done.exit_code == 0, done.output
    assert segment("picture.png", *model, "--registers", "registers.json").exit_code == 0


def test_evaluate_with_registers(folder):
    """With injected distraction, the method is told the neuron that fires."""
    given = ["evaluate", "scenes", "--limit", "1", "--method", "registers", "--inject-distraction", "0.1"]
    done = run(*given, "--out", "runs")
    assert done.exit_code == 0, done.output
    record = json.loads(Path("runs/run.json").read_text())
    assert record["registers"]["neurons"] == [[3, 7]]
    Path("registers.json").write_text(RegisterConfig(((2, 1),), None, "kk").to_json())
    done = run(*given[:-2], "--registers", "registers.json", "--out", "other")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("other/run.json").read_text())["registers"]["neurons"] == [[2, 1]]
