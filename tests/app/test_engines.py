"""Engines: the same results from workers here and on Ray, from workers that die, and from runs that are killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run
from miniatures import JOB, NAMES, halves, make, same, save_labels, save_picture
from PIL import Image
from serving import heed_signals

from rfclip.app import engines
from rfclip.app.cli.segment import swept
from rfclip.app.writer import Writer, described, plan_files, plan_shards
from rfclip.config import TINY
from rfclip.datasets import find_dataset
from rfclip.outputs import read_masks
from rfclip.scoring.run import Run, Scorer
from rfclip.segment.job import Job

pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")


os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - with Ray's own, 15, hardly a core is theirs beside other tests


@pytest.fixture
def ray(cluster):
    """A local Ray that all tests share, as one shares a cluster."""
    if not cluster.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import the tests
    return cluster


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


def mortal(worker, marker, when):
    """A worker class whose first instance dies: before its second task, or when that is done but not reported yet."""

    class Mortal(worker):
        tasks = 0

        def __call__(self, task):
            self.tasks += 1
            if self.tasks == 2 and when == "before":
                self.die()
            result = super().__call__(task)
            if self.tasks == 2:
                self.die()
            return result

        def die(self):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)

    return Mortal


def test_a_killed_worker_of_shards(tmp_path, pictures, segmenter, masks, ray):
    record = described(JOB, segmenter, NAMES, None)
    worker = partial(mortal(Writer, tmp_path / "died", "before"), JOB, NAMES, record)
    tasks, skipped, stale = plan_shards(pictures, tmp_path, record, False)
    assert (len(tasks), skipped, stale) == (3, 0, [])
    with engines.start("ray", workers=1) as engine:
        results = list(engine.results(worker, worker, tasks))
    assert (tmp_path / "died").exists()
    assert sorted(result["done"] for result in results) == [2, 8, 8]
    same(read_masks(tmp_path), masks)


def test_a_killed_worker_of_files(tmp_path, pictures, segmenter, masks, ray):
    record = described(JOB, segmenter, NAMES, None)
    worker = partial(mortal(Writer, tmp_path / "died", "after"), JOB, NAMES, record)
    tasks, skipped, failed = plan_files(pictures, tmp_path, record, False)
    assert (skipped, failed) == (0, [])
    with engines.start("ray", workers=2) as engine:
        results = list(engine.results(worker, worker, tasks))
    assert (tmp_path / "died").exists()
    assert [result["done"] for result in results] == [1] * len(pictures)
    records = [json.loads((tmp_path / f"{stem}.json").read_text())["image"] for _, stem in pictures]
    same(((image, np.array(Image.open(tmp_path / f"{Path(image).stem}.mask.png"))) for image in records), masks)
    assert len(list(tmp_path.iterdir())) == 3 * len(pictures) + 1


@pytest.mark.filterwarnings("ignore:rfclip-tiny was never trained on")
def test_a_killed_worker_of_an_evaluation(tmp_path, ray):
    dataset = find_dataset("voc20").open(root=make(tmp_path / "data", "voc20"))
    items = dataset.items()
    with Scorer(JOB, dataset) as scorer, Run(tmp_path / "here", {}, items) as run:
        assert list(run.keep(map(scorer, run.missing()))) == [item["image"] for item in items]
        whole, _ = run.scores(20)
    worker = partial(mortal(Scorer, tmp_path / "died", "after"), JOB, dataset)
    with Run(tmp_path / "there", {}, items) as run, engines.start("ray", workers=1) as engine:
        kept = list(run.keep(engine.results(worker, worker, run.missing())))
        assert (tmp_path / "died").exists()
        assert len(kept) == len(set(kept)) == len(items)
        assert len((tmp_path / "there/images.jsonl").read_text().splitlines()) == len(items)
        assert np.array_equal(run.scores(20)[0].confusion, whole.confusion)


def test_scenes_on_ray(tmp_path, ray):
    """Procedural pictures travel as seeds, and simulated distraction as a setting."""
    job, dataset = Job(method="kk", inject=0.1), find_dataset("scenes").open(count=2)
    found = []
    for name in ("local", "ray"):
        with Run(tmp_path / name, {}, dataset.items()) as run, engines.start(name) as engine:
            worker = partial(Scorer, job, dataset)
            list(run.keep(engine.results(worker, worker, run.missing())))
            found.append(run.scores(len(dataset.classes))[0])
    assert np.array_equal(found[0].confusion, found[1].confusion)
    assert found[0].hits == found[1].hits


def test_a_task_that_kills_every_worker(ray):
    class Poison:
        def __call__(self, task):
            os.kill(os.getpid(), signal.SIGKILL)

    with engines.start("ray", workers=2) as engine, pytest.raises(ValueError, match="Ray could not continue"):
        list(engine.results(Poison, Poison, [{}]))
    ray.shutdown()  # the worker that came last may stay, and keep its core


def test_commands_on_ray(tmp_path, monkeypatch, pictures, masks, ray):
    """The same files as without Ray, a picture that fails, results that exist already, and warnings from workers."""
    monkeypatch.chdir(tmp_path)
    Path("bad.png").write_bytes(b"no picture")
    folder = pictures[0][0].parent
    ask = ("segment", folder, "bad.png", "--classes", "dog, cat; grass; sky; gnu", "--model", TINY)
    ask += ("--engine", "ray", "--workers", 2)
    ask += ("--out", "shards", "--format", "parquet")
    result = run(*ask)
    assert result.exit_code == 1, result.output
    assert "failed: bad.png: cannot be read as an image" in result.stderr
    assert "18 segmented" in result.stderr and "pictures per second" in result.stderr
    assert result.stderr.count("never trained on 'gnu'") == 1
    again = [word for word in ask if word != "bad.png"]
    assert "0 segmented" in (result := run(*again)).stderr and "18 skipped" in result.stderr
    assert sorted(image for image, _ in read_masks("shards")) == sorted(masks)
    root = make(Path("data"), "voc20")
    for engine in ("ray", "local"):
        result = run("evaluate", "voc20", "--model", TINY, "--root", root, "--engine", engine, "--out", engine)
        assert result.exit_code == 0, result.output
    found = [json.loads(Path(engine, "result.json").read_text()) for engine in ("ray", "local")]
    assert found[0] | {"seconds": 0} == found[1] | {"seconds": 0}


def test_errors_of_workers_come_back(tmp_path, ray):
    """Errors of a task, and of a worker that cannot start."""
    root = make(tmp_path / "data", "voc20")
    labels = find_dataset("voc20").open(root=root).pairs()[0][1]
    labels.write_bytes(b"no picture")
    result = run("evaluate", "voc20", "--model", TINY, "--root", root, "--out", tmp_path / "run", "--engine", "ray")
    assert result.exit_code == 2
    assert f"error: {labels}: cannot be read as labels" in result.stderr
    worker = partial(Writer, Job("no-model"), NAMES, {})
    with engines.start("ray") as engine, pytest.raises(ValueError, match="unknown model 'no-model'"):
        list(engine.results(worker, worker, [{"pictures": []}]))


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_killed_command_resumes(tmp_path, request, engine):
    """The whole command is killed after its first results, and run once more."""
    folder, rng = tmp_path / "data/VOCdevkit/VOC2012", np.random.default_rng(0)
    for number in range(20):
        labels = halves(*rng.integers(0, 21, 2))
        save_picture(folder / f"JPEGImages/{number}.jpg", labels)
        save_labels(folder / f"SegmentationClass/{number}.png", labels, palette=True)
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(map(str, range(20))))
    ask = ("evaluate", "voc20", "--model", TINY, "--root", str(tmp_path / "data"))
    assert run(*ask, "--out", tmp_path / "whole").exit_code == 0

    ask += ("--out", str(tmp_path / "stopped"), "--engine", engine)
    lines = tmp_path / "stopped/images.jsonl"
    ray = request.getfixturevalue("ray") if engine == "ray" else None
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray else {}
    process = subprocess.Popen([sys.executable, "-m", "rfclip", *ask], env=os.environ | cluster)
    try:
        until = time.monotonic() + 120
        while not (lines.exists() and b"\n" in lines.read_bytes()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert 0 < lines.read_bytes().count(b"\n") < 20
    assert run(*ask).exit_code == 0
    whole, stopped = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "stopped"))
    assert whole | {"seconds": 0} == stopped | {"seconds": 0}
    assert sorted(json.loads(line)["image"] for line in lines.read_text().splitlines()) == sorted(
        f"VOCdevkit/VOC2012/JPEGImages/{number}.jpg" for number in range(20)
    )


NODES = [{"CPU": 8.0, "memory": 1.0}, {"CPU": 3.0, "GPU": 2.0}, {"GPU": 1.0}]


@pytest.mark.parametrize(
    "workers, device, expected",
    [
        (None, "cpu", (3, {"num_cpus": 3})),  # 2 on the first node and, at least, 1 on the second
        (1, "cpu", (1, {"num_cpus": 8})),
        (2, "cpu", (2, {"num_cpus": 4})),
        (11, "cpu", (11, {"num_cpus": 1})),
        (None, "cuda", (3, {"num_gpus": 1})),
        (2, "cuda", (2, {"num_gpus": 1})),
    ],
)
def test_shares_of_a_cluster(workers, device, expected):
    assert engines._share(NODES, workers, device) == expected


def test_a_cluster_that_is_too_small():
    with pytest.raises(ValueError, match="--workers 12: .* has 11"):
        engines._share(NODES, 12, "cpu")
    with pytest.raises(ValueError, match="4 workers need a GPU each.* has 3"):
        engines._share(NODES, 4, "cuda")
    with pytest.raises(ValueError, match="1 workers need a GPU each.* has 0"):
        engines._share(NODES[:1], None, "cuda")


@pytest.mark.parametrize(
    "given, words",
    [
        (("spark",), "--engine spark: expected local or ray"),
        (("local", 2), "--workers 2: .* with --engine ray"),
        (("ray", 0), "--workers 0: expected at least 1"),
        (("ray", 1, "cuda:1"), "--device cuda:1: .* Ray decides which"),
    ],
)
def test_wrong_engines(given, words):
    with pytest.raises(ValueError, match=words), engines.start(*given):
        pass


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "rfclip\[ray\]"'), engines.start("ray"):
        pass
    with engines.start() as engine:
        assert list(engine.results(lambda: dict, None, [{"a": 1}, {"a": 2}])) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_command_that_is_told_to_end(tmp_path, pictures, request, engine):
    """No trace of any library, and nothing left of a file that was being written."""
    ray = request.getfixturevalue("ray") if engine == "ray" else None
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray else {}
    ask = ["segment", *(str(path) for path, _ in pictures), "--classes", "cat, dog", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "rfclip", *ask, "--model", TINY, "--engine", engine],
        env=os.environ | cluster,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "received" not in said and "Traceback" not in said
    assert not list((tmp_path / "out").glob(".*"))


def test_parts_of_killed_workers_are_removed(tmp_path):
    """Those of this run: other processes may be writing there."""
    ours, theirs = tmp_path / "deep/.abcd1234ffff-0.part", tmp_path / ".eeee5678-0.part"
    ours.parent.mkdir()
    for path in (ours, theirs):
        path.touch()
    with pytest.raises(KeyboardInterrupt), swept(tmp_path, "abcd1234"):
        raise KeyboardInterrupt
    assert not ours.exists() and theirs.exists()
