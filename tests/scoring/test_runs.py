"""Runs of an evaluation: interrupted, killed and corrupt ones, and pictures that change in between."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import linux_only
from miniatures import SIZE, Reader, ReadingScorer, halves, make, open_run, save_labels, score, scores_of
from PIL import Image

from rfclip.datasets import find_dataset
from rfclip.datasets.scenes import Scenes
from rfclip.scoring.metrics import Scores
from rfclip.scoring.report import Row, finish, paper_figure, table
from rfclip.scoring.run import Run, Scorer
from rfclip.segment.job import Job
from rfclip.segment.result import Segmentation


def pairs(root, name="ade20k"):
    return find_dataset(name).open(root=root).pairs()


def test_background_is_what_no_class_is_sure_of(tmp_path):
    nothing = np.full(SIZE, 255, np.uint8)
    found = SimpleNamespace(
        segment_by=lambda rgb, lists, threshold, post: [
            Segmentation(rgb, nothing, ("a",) * len(named)) for named in lists
        ]
    )
    predicted = ReadingScorer(find_dataset("voc21").open(root=tmp_path), found).predict(Image.new("RGB", SIZE[::-1]))
    assert (predicted.labels == 0).all()


@pytest.mark.filterwarnings("ignore:rfclip-tiny")
def test_a_rule_knows_the_background_of_a_dataset(tmp_path, monkeypatch):
    """Whatever its names are; on a dataset without one, no name is of it."""
    for name, names in (("voc21", 26), ("context60", 1), ("voc20", 0)):
        asked = []
        with Scorer(Job(method="cliper"), find_dataset(name).open(root=tmp_path)) as scorer:
            known = lambda text, embed, background: asked.append(background) or ~background  # noqa: E731, B023
            monkeypatch.setattr(scorer.segmenter._rule, "knows", known)
            scorer.predict(Image.new("RGB", SIZE[::-1]))
        assert asked[0][:names].all() and not asked[0][names:].any()


def test_an_interrupted_run_resumes(tmp_path):
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
    score(root, "ade20k", tmp_path / "run", post="none")
    with pytest.raises(ValueError, match="post was 'none', is 'pamr'.*--overwrite"):
        score(root, "ade20k", tmp_path / "run", post="pamr")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no run: choose another folder"):
            open_run(root, "ade20k", tmp_path / "other", overwrite).__enter__()
    with open_run(root, "ade20k", tmp_path / "run", True, post="pamr") as run:
        assert [path.name for path in run.folder.iterdir() if path.name != ".lock"] == ["run.json"]
        with pytest.raises(ValueError, match="another process is working in .*run"):
            open_run(root, "ade20k", tmp_path / "run", post="pamr").__enter__()


def test_a_killed_run_resumes(tmp_path):
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
    _, labels = pairs(root)[0]
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
    dataset = find_dataset("ade20k").open(root=root)
    with Run(tmp_path / "run", {"dataset": "ade20k"}, dataset.items(1)) as run:
        assert run.missing() == []
        assert finish(run, ReadingScorer(dataset, Reader()))["official"].images == 1
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
    with pytest.raises(ValueError, match=f"{file}.* is corrupt.*--overwrite starts over"):
        score(root, "ade20k", tmp_path / "run")
    assert score(root, "ade20k", tmp_path / "run", overwrite=True).miou == 0.5


@linux_only
def test_names_that_are_not_utf_8(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    for path in pairs(root)[0]:
        path.rename(path.with_name(os.fsdecode(b"p\xff" + path.suffix.encode())))
    assert score(root, "ade20k", tmp_path / "run").miou == 0.5
    assert "p\\xff.jpg" in (tmp_path / "run/result.md").read_text()


def test_pixels_beyond_a_crop_do_not_count(tmp_path):
    """CLIPtrase sees the square at the centre of a picture; other methods see all of it."""
    dataset, labels = find_dataset("voc20").open(root=make(tmp_path, "voc20")), halves(1, 2).astype(np.uint8)
    with Scorer(Job(method="cliptrase"), dataset) as scorer:
        counted = scorer.counted(labels)
    assert (counted[:, 4:20] == labels[:, 4:20]).all()
    assert (counted[:, :4] == 255).all() and (counted[:, 20:] == 255).all()
    with Scorer(Job(method="kk"), dataset) as scorer:
        assert (scorer.counted(labels) == labels).all()


def test_tables():
    scores = Scores(5, 1.0, np.array([[60, 20], [0, 20]]))
    row = Row("rf-clip", "VOC21", scores, 64.8)
    heads, cells = table([row])
    assert heads == ["method", "mIoU %", "pixel accuracy %", "paper %", "difference"]
    assert cells == [["rf-clip", "62.5", "80.0", "64.8", "-2.3"]]
    heads, cells = table([row, Row("rf-clip", "VOC20", scores, None)], "variant")
    assert heads[:4] == ["variant", "dataset", "pictures", "mIoU %"]
    assert [line[1:4] for line in cells] == [["VOC21", "5", "62.5"], ["VOC20", "5", "62.5"], ["mean", "", "62.5"]]
    assert [line[-2:] for line in cells] == [["64.8", "-2.3"], ["-", "-"], ["-", "-"]]
    both = table([row, Row("rf-clip", "VOC20", scores, 64.8)])[1]
    assert both[-1] == ["rf-clip", "mean", "", "62.5", "-", "64.8", "-2.3"]
    heads, cells = table([Row("kk", "Scenes", Scores(5, 1.0, np.eye(2, dtype=int), 4, 3))])
    assert heads == ["method", "top-1 %", "mIoU %", "pixel accuracy %"]
    assert cells == [["kk", "75.0", "100.0", "100.0"]]


def test_the_papers_figures_stand_beside_comparable_ones_only():
    voc21 = find_dataset("voc21")
    assert paper_figure(voc21, "ViT-B/16-quickgelu", "released", True) == 64.8
    assert paper_figure(voc21, "ViT-B-16", "released", False) is None
    assert paper_figure(voc21, "ViT-B-16", "rf-clip", True) is None
    assert paper_figure(find_dataset("scenes"), "ViT-B-16", "released", True) is None


def test_scenes_resume_like_any_dataset(tmp_path):
    """Interrupted after some scenes and before the single objects, the figures are those of an uninterrupted run."""
    job, dataset = Job(method="kk", inject=0.1), Scenes(count=2)
    whole = scores_of(Scorer(job, dataset), tmp_path / "whole")
    with Scorer(job, dataset) as scorer, Run(tmp_path / "run", scorer.settings(), dataset.items()) as run:
        list(run.keep(map(scorer, run.missing()[:1])))
        assert len(run.missing()) == 3
    found = scores_of(Scorer(job, dataset), tmp_path / "run")
    assert np.array_equal(found.confusion, whole.confusion)
    assert (found.images, found.singles, found.hits) == (2, 2, whole.hits)
