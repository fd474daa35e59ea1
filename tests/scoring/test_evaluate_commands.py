"""`rfclip evaluate` on scenes and on data sets from disk."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import files_below, refused, run
from miniatures import make
from PIL import Image

import rfclip.methods
from rfclip.config import TINY
from rfclip.datasets import find_dataset, in_paper
from rfclip.methods.rf_clip import RFCLIP as KK
from rfclip.segment import job
from rfclip.segment.segmenter import Segmenter
from rfclip.tiny.scenes import CLASSES

pytestmark = pytest.mark.usefixtures("folder")


# On scenes ------------------------------------------------------------------------------------------------------------

METHODS = ["clip", "kk", "kk-mean", "rf-clip"]


def test_every_method_on_the_scenes(folder, monkeypatch):
    """Except those that this model cannot run, which is reported; and a contact sheet of the others."""

    def offline():
        raise ConnectionError("no network")

    monkeypatch.setattr("rfclip.methods.proxyclip.load_dino", offline)
    result = run("evaluate", "scenes", "--method", "all", "--count", 1, "--sheet", "new/sheet.png")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [
        name for name, card in rfclip.methods.METHODS.items() if card.blocks <= 6 and name != "proxyclip"
    ]
    assert "left out: sc-clip: method 'sc-clip' needs 11 blocks, and this tower has 6" in result.stderr
    assert "left out: proxyclip: no network" in result.stderr
    sheet = np.asarray(Image.open("new/sheet.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    refused(run("evaluate", "scenes", "--sheet", "new/sheet.png"), "new/sheet.png exists", "--overwrite")
    refused(run("evaluate", "scenes", "--method", "kk,gem,sc-clip"), "needs 11 blocks")
    Path("config.json").write_text('{"distraction_dims": [5]}')
    refused(run("evaluate", "scenes", "--method", "kk", "--config", "config.json"), "kk has nothing to configure")


@pytest.mark.parametrize("injected", [0, 0.1], ids=["plain", "injected"])
def test_evaluate(folder, injected):
    result = run("evaluate", "scenes", "--count", 2, "--inject-distraction", injected, "--out", "new")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == METHODS
    printed = [[float(cell) for cell in row.split("│")[2:5]] for row in rows]
    assert all(0 <= figure <= 100 for figures in printed for figure in figures)
    assert ("simulated" in result.stdout) == bool(injected)
    assert ("rf-clip equals kk-mean" in result.stdout) == (not injected)

    def no_constants(text):
        raise AssertionError(f"{text} is not JSON")

    for method, figures in zip(METHODS, printed, strict=True):
        name = "scenes" if method == "rf-clip" else f"scenes-{method}"
        record = json.loads(Path("new", name, "result.json").read_text(), parse_constant=no_constants)
        assert (record["count"], record["seed"], record["inject_distraction"]) == (2, 0, injected)
        assert (record["method"], record["images"]) == (method, 2)
        names = ("top1", "miou", "pixel_accuracy")
        assert [round(100 * record[name], 1) for name in names] == pytest.approx(figures, abs=0.11)
        assert list(record["iou"]) == list(CLASSES)
        seen = [value for value in record["iou"].values() if value is not None]
        assert record["miou"] == pytest.approx(np.mean(seen))


def test_scenes_take_what_every_dataset_takes(folder):
    given = ("evaluate", "scenes", "--count", 3, "--method", "kk", "--out", "out")
    result = run(*given, "--limit", 1, "--post", "pamr")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/result.json").read_text())["images"] == 1
    assert "scored earlier" not in result.stderr
    resumed = run(*given, "--post", "pamr")
    assert resumed.exit_code == 0, resumed.output
    assert "out: 2 of 6 pictures were scored earlier" in resumed.stderr
    refused(run(*given), "post was 'pamr', is 'none'", "--overwrite")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["photos"], ["'photos'", "expected one of scenes"]),
        (["scenes", "--device", "toaster"], ["--device toaster"]),
        (["scenes", "--model", "ViT-Z-99"], ["'ViT-Z-99'", "rfclip models"]),
    ],
    ids=["name", "device", "model"],
)
def test_evaluate_with_wrong_arguments(folder, arguments, words):
    refused(run("evaluate", *arguments, "--out", "run"), *words)
    assert files_below(folder) == set()


# On data from disk ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_prompt")
def test_evaluate_all(tmp_path, monkeypatch):
    """All eight of them on the shipped model, which knows hardly any of their classes."""
    monkeypatch.chdir(tmp_path)
    for name in in_paper():
        if name not in ("voc20", "context59"):
            make(Path("data"), name)
    result = run("evaluate", "--all", "--root", "data", "--limit", 1, "--batch", 4, "--model", TINY)
    assert result.exit_code == 0, result.output
    rows = Path("rfclip-runs/table.md").read_text().splitlines()
    titles = [find_dataset(name).title for name in in_paper()]
    assert [row.split("|")[2].strip() for row in rows[4:]] == [*titles, "mean"]
    for name in in_paper():
        assert json.loads(Path("rfclip-runs", name, "result.json").read_text())["images"] == 1


def test_evaluate_several_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("data"), "voc21")
    result = run("evaluate", "voc21", "--root", "data", "--model", TINY, "--method", "clearclip, kk,rf-clip")
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
    rows = Path("rfclip-runs/table.md").read_text().splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == ["clearclip", "kk", "rf-clip"]


@pytest.fixture
def one_prompt(monkeypatch):
    monkeypatch.setattr(job, "Segmenter", partial(Segmenter, templates=[lambda name: f"a {name}."]))


@pytest.mark.usefixtures("one_prompt")
def test_several_lists_of_names_share_a_pass(folder, monkeypatch):
    """Their figures are those of runs on their own; a table shows each, and synonyms by mean and worst."""
    make(Path("data"), "voc21")
    given = ("evaluate", "voc21", "--root", "data", "--model", TINY, "--method", "kk")
    passes = []
    monkeypatch.setattr(KK, "_dense", lambda self, patches, whole=KK._dense: passes.append(1) or whole(self, patches))
    several = run(*given, "--names", "official,plain,synonyms", "--seeds", 2, "--share", 1, "--out", "several")
    assert several.exit_code == 0, several.output
    count = len(passes)
    found = json.loads(Path("several/result.json").read_text())
    assert list(found["by_names"]) == ["official", "plain", "synonyms, seed 0", "synonyms, seed 1"]
    assert found["miou"] == found["by_names"]["official"]["miou"]
    for names in ("official", "plain"):
        passes.clear()
        assert run(*given, "--names", names, "--out", names).exit_code == 0
        assert len(passes) == count
        alone = json.loads(Path(names, "result.json").read_text())
        assert alone["confusion"] == found["by_names"][names]["confusion"]
        assert "by_names" not in alone
    rows = [[cell.strip() for cell in line.split("│")[1:]] for line in several.stdout.splitlines() if "│" in line]
    assert [row[1].split(",")[0] for row in rows if row[0]] == ["official", "plain", "synonyms", "synonyms"]
    assert "| synonyms, seed 1 |" in Path("several/result.md").read_text()
    refused(run(*given, "--names", "plain", "--out", "official"), "holds another run", "names was {'official'")
    plain = json.loads(Path("plain/result.json").read_text())
    assert list(plain["iou"])[:5] == [
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
    ]  # "ship" in the official list
    assert found["lists"]["plain"][1] == ["aeroplane"] and found["lists"]["synonyms, seed 1"][0][0] == "sky"
    with Path("mine.txt").open("w") as file:
        file.writelines(f"thing {number}\n" for number in range(20))
    refused(run(*given, "--names", "mine.txt"), "got 20 lines; expected 21")
    drawn = run(*given, "--names", "synonyms", "--seeds", 1, "--seed", 1, "--share", 1)
    last = json.loads(Path("rfclip-runs/voc21-kk-synonyms/result.json").read_text())["lists"]
    assert last["synonyms, seed 1"] == found["lists"]["synonyms, seed 1"] != found["lists"]["synonyms, seed 0"]
    assert drawn.exit_code == 0 and Path("rfclip-runs/voc21-kk-synonyms/table.md").exists()
    assert [
        row.split("|")[2].strip() for row in Path("rfclip-runs/voc21-kk-synonyms/table.md").read_text().splitlines()[4:]
    ] == [
        "official",
        "synonyms, mean of 1",
        "synonyms, worst",
    ]


@pytest.mark.usefixtures("one_prompt")
def test_protocols(folder):
    """Under the common one, every method sees the pictures alike; another method's can be taken; tables say which."""
    make(Path("data"), "voc21")
    given = ("evaluate", "voc21", "--root", "data", "--model", TINY, "--method", "clearclip,rf-clip")
    said = {
        "own": "each method by its own protocol",
        "common": "the common protocol, RF-CLIP's",
        "released": "the protocol of released",
    }
    settings = {}
    for name, words in said.items():
        result = run(*given, "--protocol", name, "--out", "runs")
        assert result.exit_code == 0, result.output
        assert words in " ".join(result.stdout.split())
        mark = "" if name == "own" else f"-{name}"
        assert words in Path("runs", f"table{mark}.md").read_text()
        for method in ("voc21-clearclip", "voc21"):
            settings[name, method] = json.loads(Path("runs", method + mark, "run.json").read_text())
    asked = ("short_side", "window", "stride", "logit_scale", "threshold")
    seen = {key: [each[name] for name in asked] for key, each in settings.items()}
    assert seen["own", "voc21-clearclip"] != seen["common", "voc21-clearclip"] == seen["common", "voc21"]
    assert settings["released", "voc21"]["window"] is None
    assert settings["released", "voc21"]["protocol"]["rule"] == "released:AdjustedNames"
    assert settings["common", "voc21"]["protocol"]["rule"] == "rule:Rule"
    refused(run(*given, "--protocol", "fair"), "protocol 'fair'", "'own', 'common'")


def test_photographs_need_a_model_that_knows_them(folder):
    make(Path("data"), "voc21")
    for command in ("evaluate", "ablate"):
        arguments = ("tau", "voc21") if command == "ablate" else ("voc21",)
        words = ("voc21: give a --model that knows photographs", f"--model {TINY} scores it all the same")
        refused(run(command, *arguments, "--root", "data"), *words)
    assert not Path("rfclip-runs").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--all"),
        (["voc21", "--all"], "--all"),
        (["--all", "--root", ".", "--sheet", "sheet.png"], "--sheet shows one dataset"),
        (["photos"], "expected one of scenes, voc21"),
        (["scenes", "--count", 0], "--count"),
        (["scenes", "--count", -3], "--count"),
        (["scenes", "--inject-distraction", 2], "--inject-distraction"),
        (["scenes", "--inject-distraction", "nan"], "inject"),  # Typer before 0.25 lets NaN pass
        (["voc21"], "--root DIR is missing"),
        (["voc21", "--root", "."], "expected below ."),
        (["voc21", "--root", ".", "--limit", 0], "--limit"),
        (["scenes", "--root", "."], "--root does not apply to scenes"),
        (["voc21", "--seed", 0], "--seed does not apply to voc21"),
        (["voc21", "--object-size", 20, 30], "--object-size does not apply to voc21"),
        (["scenes", "--object-size", 20, 300], "object_size=(20, 300): expected 1 <= least <= most <= size"),
        (["scenes", "--share", 0.5], "--share goes with --names synonyms"),
        (["scenes", "--seeds", 2, "--names", "plain"], "--seeds goes with --names synonyms"),
        (["scenes", "--protocol", "own:voc"], "dataset 'voc'"),
        (["voc21", "--count", 5], "--count does not apply to voc21"),
        (["scenes", "--sheet", "."], "--out .: expected a file"),
        (["voc21", "--method", "lseg"], "expected one of clip"),
        (["scenes", "--backend", "cuda"], "--backend"),
        (["scenes", "--workers", 2, "--model", "ViT-B-16"], "--workers 2: expected at least 1, with --engine ray"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_arguments(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run("evaluate", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())
