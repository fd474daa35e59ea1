"""`rfclip evaluate` on scenes and on benchmarks."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import files_below, refused, run
from miniatures import make
from PIL import Image

import rfclip
import rfclip.methods
from rfclip import runs
from rfclip.benchmarks import BENCHMARKS
from rfclip.scenes import CLASSES
from rfclip.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("folder")


# On scenes ------------------------------------------------------------------------------------------------------------

METHODS = ["clip", "kk", "kk-mean", "rf-clip"]


def test_every_method_on_the_scenes(folder, monkeypatch):
    """Except those that this model cannot run, which is reported; and a contact sheet of the others."""

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


# On benchmarks --------------------------------------------------------------------------------------------------------


def test_evaluate_all(tmp_path, monkeypatch):
    """All eight of them on the shipped model, which knows hardly any of their classes."""
    monkeypatch.chdir(tmp_path)
    for name in BENCHMARKS:
        if name not in ("voc20", "context59"):
            make(Path("data"), name)
    one_prompt = partial(Segmenter, templates=[lambda name: f"a {name}."])
    monkeypatch.setattr(runs, "Segmenter", one_prompt)
    result = run("evaluate", "--all", "--root", "data", "--limit", 1, "--batch", 4)
    assert result.exit_code == 0, result.output
    rows = Path("rfclip-runs/table2.md").read_text().splitlines()
    titles = [benchmark.title for benchmark in BENCHMARKS.values()]
    assert [row.split("|")[2].strip() for row in rows[4:]] == [*titles, "mean"]
    for name in BENCHMARKS:
        assert json.loads(Path("rfclip-runs", name, "result.json").read_text())["images"] == 1


def test_evaluate_several_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("data"), "voc21")
    result = run("evaluate", "voc21", "--root", "data", "--method", "clearclip, kk,rf-clip")
    assert result.exit_code == 0, result.output
    settings = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(Path("rfclip-runs").glob("*/run.json"))
    }
    assert [(name, each["method"], each["threshold"]) for name, each in settings.items()] == [
        ("voc21", "rf-clip", 0.1),
        ("voc21-clearclip", "clearclip", 0.5),
        ("voc21-kk", "kk", 0.1),
    ]
    assert settings["voc21-clearclip"]["window"] == 2 * settings["voc21"]["window"]
    rows = Path("rfclip-runs/table2.md").read_text().splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == ["clearclip", "kk", "rf-clip"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--all"),
        (["voc21", "--all"], "--all"),
        (["photos"], "expected scenes, voc21"),
        (["voc21"], "--root DIR is missing"),
        (["voc21", "--root", "."], "expected below ."),
        (["voc21", "--root", ".", "--limit", 0], "--limit"),
        (["scenes", "--root", "."], "--root does not go with scenes"),
        (["voc21", "--inject-distraction", 0.1], "goes with scenes only"),
        (["voc21", "--seed", 0], "--seed goes with scenes only"),
        (["voc21", "--count", 5], "--count goes with scenes only"),
        (["scenes", "--out", "."], "--out .: expected a file"),
        (["voc21", "--method", "lseg"], "expected one of clip"),
        (["scenes", "--workers", 2], "--workers does not go with scenes"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_arguments(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run("evaluate", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())
