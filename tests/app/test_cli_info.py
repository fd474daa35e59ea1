"""What the command says about itself: help, version, models and backends; import times; `rfclip serve` refused."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import open_clip
import pytest
import torch
from commands import refused, run
from typer.testing import CliRunner

import rfclip
import rfclip.methods
from rfclip.app.cli import app, common
from rfclip.ops.dispatch import backend
from rfclip.towers import use_of
from rfclip.towers.loading import tiny_folder
from rfclip_kernels.registry import EXAMPLES

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("columns", [60, 80, 300])
def test_models(monkeypatch, columns):
    monkeypatch.setattr(common.out_console, "_width", columns)  # which workers of pytest-xdist fix by their environment
    result = run("models")
    assert result.exit_code == 0
    listed = {line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")}
    assert {"rfclip-tiny", "ViT-B-16", "ViT-L-14", "RN50", "coca_ViT-L-14"} <= listed
    assert columns < 300 or set(open_clip.list_models()) <= listed  # long names are folded in a narrow terminal
    assert "…" not in result.stdout  # nothing is cut off
    if columns > 60:
        assert "commonpool_l_laion_s1b_b8k" in result.stdout


def test_methods_and_their_protocols(monkeypatch):
    """In general, or on a dataset; a terminal of 80 columns cuts nothing off."""
    monkeypatch.setenv("COLUMNS", "80")
    for more, row in (([], "224 / 112"), (["--on", "voc21"], "whole")):
        result = run("methods", *more)
        assert result.exit_code == 0 and "…" not in result.stdout
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
        named = {cells[0]: cells[1:] for cells in rows if cells[0]}
        assert list(named) == [*rfclip.methods.METHODS, "common"]
        assert named["released"][1] == row and named["common"][:4] == ["336", "224 / 112", "40", "0.1"]
    assert "AdjustedNames (share 0.1," in " ".join(result.stdout.split())
    refused(run("methods", "--on", "voc"), "dataset 'voc': expected one of scenes")


def test_version():
    done = subprocess.run([sys.executable, "-m", "rfclip", "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"rfclip {rfclip.__version__}\n", "")


def test_help_is_quick():
    code = """
import sys
from typer.testing import CliRunner
from rfclip.app.cli import app
for command in ([], ["segment"], ["calibrate"], ["models"], ["evaluate"]):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.stdout
print({"torch", "open_clip", "numpy", "PIL"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


SCENE = str(tiny_folder() / "scene.png")
LIGHT = [  # what needs no tensor: help, lists, and mistakes
    (["methods"], 0),
    (["--version"], 0),
    (["segment", SCENE, "--classes", "cat", "--method", "naclp"], 2),
    (["segment", SCENE, "--classes", "cat,,dog"], 2),
    (["segment", SCENE, "--classes", "cat", "--backend", "gpu"], 2),
    (["segment", SCENE, "--classes", "cat", "--config", "missing.json"], 2),
    (["segment", SCENE, "--classes", "cat", "--workers", "2"], 2),
    (["segment", SCENE, "--classes", "cat", "--out", SCENE], 2),
    (["evaluate", "scenes", "--out", SCENE], 2),
    (["ablate", "4", "--out", SCENE], 2),
    (["segment", "missing.png", "--classes", "cat", "--out", "{out}"], 1),
    (["segment", SCENE, "--clases", "cat"], 2),
    (["explain", SCENE, "--points", "3"], 2),
    (["evaluate", "photos"], 2),
    (["evaluate", "voc21"], 2),
    (["evaluate", "scenes", "--method", "naclp"], 2),
    (["ablate", "2"], 2),
    (["prepare", "voc", "--root", "."], 2),
    (["serve", "--config", "missing.json"], 2),
]


def test_mistakes_and_lists_are_answered_without_pytorch(tmp_path):
    code = """
import json, sys
from typer.testing import CliRunner
from rfclip.app.cli import app
for command, expected in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == expected, (command, result.output)
    assert not {"torch", "open_clip", "gradio"} & sys.modules.keys(), command
print("done")
"""
    commands = [([word.format(out=tmp_path / "out") for word in command], expected) for command, expected in LIGHT]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


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


def test_info_says_what_runs_and_why():
    runner = CliRunner()
    shown = runner.invoke(app, ["info"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for part in (
        "torch",
        torch.__version__.split("+")[0],
        "triton",
        "open_clip_torch",
        "backend on cpu",
        "clamp_embeddings",
        "eager: ",
    ):
        assert part in shown.output
    refused = runner.invoke(app, ["info", "--backend", "triton"])
    assert refused.exit_code == 2
    reason = "the model is on cpu" if find_spec("triton") else "Triton is not installed"
    assert f'backend="triton": {reason}' in " ".join(refused.output.split())
    assert runner.invoke(app, ["info", "--device", "toaster"]).exit_code == 2


@pytest.mark.parametrize("command", ["info", "models", "methods", "doctor"])
def test_json(command):
    result = run(command, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)


def test_models_and_methods_in_json():
    listed = {each["model"]: each for each in json.loads(run("models", "--json").stdout)}
    assert listed["ViT-B-16"]["known for"] == ["openai"] and "laion400m_e31" in listed["ViT-B-16"]["weights"]
    assert {name: (each["use"], each["reason"]) for name, each in listed.items()} == {
        "rfclip-tiny": ("refocus", ""),
        **{name: use_of(name) for name in open_clip.list_models()},
    }
    methods = {
        each["method"]: each["protocol"] for each in json.loads(run("methods", "--on", "voc21", "--json").stdout)
    }
    assert list(methods) == [*rfclip.methods.METHODS, "common"] and methods["released"]["options"]["share"] == 0.1


@pytest.mark.parametrize("device", ["cpu"])
def test_doctor(device, monkeypatch):
    """All operations agree; one that is wrong, one that fails and one of another shape are named."""
    result = run("doctor", "--device", device, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and not found["faults"] and found["rfclip"] == rfclip.__version__
    assert found["self-test"] == f"{len(EXAMPLES)} of {len(EXAMPLES)} operations agree with the reference"
    eager = backend("eager")
    monkeypatch.setattr(eager, "quick_gelu", lambda x, gelu=eager.quick_gelu: 1.01 * gelu(x))
    monkeypatch.setattr(eager, "pamr", lambda *given, **named: 1 / 0)
    monkeypatch.setattr(eager, "distraction_mask", lambda x, *given, **named: torch.ones(2, 3, dtype=torch.bool))
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    faults = found["faults"]
    assert faults["pamr, float32"] == "ZeroDivisionError: division by zero"
    assert faults["quick_gelu, float32"].startswith("relative error ")
    assert faults["distraction_mask, float32"] == "got (2, 3), expected (2, 21)"
    assert all(name.partition(",")[0] in ("pamr", "quick_gelu", "distraction_mask") for name in faults)
    shown = run("doctor")
    assert shown.exit_code == 1 and "fault in pamr, float32" in " ".join(shown.stdout.split())


def test_short_help_and_completion():
    assert run("-h").output == run("--help").output and "--threshold" in run("segment", "-h").output
    complete = {"_RFCLIP_COMPLETE": "complete_bash", "COMP_WORDS": "rfclip segment --method na", "COMP_CWORD": "3"}
    code = "from rfclip.app.cli import app; app(prog_name='rfclip')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | complete)
    assert done.stdout.split() == ["naclip"]


def test_serve_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(run("serve"), 'pip install "rfclip[serve]"')


def test_serve_refuses_before_it_listens(tmp_path):
    pytest.importorskip("gradio")
    refused(run("serve", "--model", "RN50"), "RN50")
    refused(run("serve", "--device", "cuda:9"), "cuda:9")
    refused(run("serve", "--config", tmp_path / "none.json"), "none.json")
