"""Runs of an evaluation: stopped, killed and damaged ones, and pictures that change in between."""

import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from miniatures import SIZE, Reader, halves, make, open_run, save_labels, score, setup

from rfclip.benchmarks import BENCHMARKS
from rfclip.runs import Run, Scorer, table_rows
from rfclip.segmenter import Segmentation


def test_background_is_what_no_class_is_sure_of(tmp_path):
    found = SimpleNamespace(
        segment=lambda rgb, named, threshold, pamr: Segmentation(rgb, np.full(SIZE, 255, np.uint8), ("a",) * len(named))
    )
    root = make(tmp_path, "voc21")
    predicted, _ = Scorer(setup(root, "voc21"), found).predict(*BENCHMARKS["voc21"].pairs(root)[0])
    assert (predicted.labels == 0).all()


def test_a_stopped_run_goes_on(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    whole = score(root, "ade20k", tmp_path / "whole")
    stopped = Reader(fail_at=1)
    with pytest.raises(KeyboardInterrupt):
        score(root, "ade20k", tmp_path / "run", stopped)
    with (tmp_path / "run/images.jsonl").open("a") as file:
        file.write('{"image": "ADEChallengeData2016/images/validation/picture_1.jpg", "seconds": 1, "pix')
    resumed = Reader()
    result = score(root, "ade20k", tmp_path / "run", resumed)
    assert np.array_equal(result.confusion, whole.confusion)
    assert len(resumed.seen) == 1 + 2  # the second picture, and both of the worst
    lines = (tmp_path / "run/images.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"][-5] for line in lines] == ["0", "1"]
    again = Reader()
    score(root, "ade20k", tmp_path / "run", again)
    assert len(again.seen) == 2


def test_a_run_of_other_settings_is_refused(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    score(root, "ade20k", tmp_path / "run", pamr=False)
    with pytest.raises(ValueError, match="pamr was False, is True.*--overwrite"):
        score(root, "ade20k", tmp_path / "run", pamr=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no run: give another folder"):
            open_run(root, "ade20k", tmp_path / "other", overwrite).__enter__()
    with open_run(root, "ade20k", tmp_path / "run", True, pamr=True) as run:
        assert [path.name for path in run.folder.iterdir() if path.name != ".lock"] == ["run.json"]
        with pytest.raises(ValueError, match="another process works in .*run"):
            open_run(root, "ade20k", tmp_path / "run", pamr=True).__enter__()


def test_what_a_kill_leaves_is_gone_on_with(tmp_path):
    """Killed in the middle of the first file, and of starting anew."""
    root = make(tmp_path / "data", "ade20k")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.0123abcd-0.part").write_text("{")
    assert score(root, "ade20k", tmp_path / "new").miou == 0.5
    score(root, "ade20k", tmp_path / "anew")
    for gone in ("images.jsonl", "result.json"):
        (tmp_path / "anew" / gone).unlink()
    assert score(root, "ade20k", tmp_path / "anew", overwrite=True).miou == 0.5


def test_pictures_that_change_are_scored_again(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    score(root, "ade20k", tmp_path / "run")
    _, labels = BENCHMARKS["ade20k"].pairs(root)[0]
    save_labels(labels, halves(1, 2) + 1)
    reader = Reader()
    assert score(root, "ade20k", tmp_path / "run", reader).miou == 1
    assert len(reader.seen) == 1 + 2  # that picture, and both of the worst
    other = make(tmp_path / "other", "ade20k")
    reader = Reader()
    assert score(other, "ade20k", tmp_path / "run", reader).miou == 0.5
    assert len(reader.seen) == 2 + 2


def test_a_run_over_fewer_pictures_leaves_no_other_worst(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    score(root, "ade20k", tmp_path / "run")
    first = BENCHMARKS["ade20k"].pairs(root)[:1]
    scorer = Scorer(setup(root, "ade20k"), Reader())
    with Run(tmp_path / "run", {"benchmark": "ade20k"}, first, root) as run:
        assert run.missing() == []
        assert run.finish(scorer).images == 1
    assert [path.name for path in (tmp_path / "run").glob("worst-*")] == ["worst-1.jpg"]


@pytest.mark.parametrize(
    "file, text",
    [
        ("run.json", ""),
        ("run.json", "[1]"),
        ("run.json", "null"),
        ("images.jsonl", "{}\n"),
        ("images.jsonl", "[]\n"),
        ("images.jsonl", "no JSON\n"),
        ("images.jsonl", '{"seconds": 1, "pixels": [[1, 2]]}\n'),
        ("images.jsonl", '{"seconds": null, "pixels": []}\n'),
    ],
)
def test_damaged_runs(tmp_path, file, text):
    root = make(tmp_path / "data", "ade20k")
    score(root, "ade20k", tmp_path / "run")
    (tmp_path / "run" / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}.* is not as a run writes it.*--overwrite starts anew"):
        score(root, "ade20k", tmp_path / "run")
    assert score(root, "ade20k", tmp_path / "run", overwrite=True).miou == 0.5


def test_names_that_are_not_utf_8(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    for path in BENCHMARKS["ade20k"].pairs(root)[0]:
        path.rename(path.with_name(os.fsdecode(b"p\xff" + path.suffix.encode())))
    assert score(root, "ade20k", tmp_path / "run").miou == 0.5
    assert "p\\xff.jpg" in (tmp_path / "run/result.md").read_text()


def test_table_rows():
    benchmark = SimpleNamespace(title="VOC21", paper={"ViT-B-16": 64.8})
    result = SimpleNamespace(benchmark=benchmark, images=5, miou=0.653)
    assert table_rows([result], "ViT-B/16", "rf-clip", True) == [("rf-clip", "VOC21", "5", "65.3", "64.8", "+0.5")]
    assert table_rows([result], "ViT-B-16", "rf-clip", False) == [("rf-clip", "VOC21", "5", "65.3", "-", "-")]
    assert table_rows([result], "ViT-B-16", "kk", True) == [("kk", "VOC21", "5", "65.3", "-", "-")]
    both = partial(table_rows, [result, result], "ViT-B-16", "rf-clip")
    assert both(True)[-1] == ("rf-clip", "mean", "", "65.3", "64.8", "+0.5")
    assert both(False)[-1] == ("rf-clip", "mean", "", "65.3", "-", "-")
