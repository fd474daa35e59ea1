"""Benchmarks in miniature, each in its layout on disk, whose mIoU is known by hand; stopped runs; bad files."""

import json
import os
import struct
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from typer.testing import CliRunner

from rfclip import RefocusConfig, runs
from rfclip.ablations import ABLATIONS, variants
from rfclip.benchmarks import BENCHMARKS
from rfclip.cli import app
from rfclip.methods import METHODS
from rfclip.prepare import coco_object, context
from rfclip.runs import Run, Scorer, Setup, table_rows
from rfclip.segmenter import Segmentation, Segmenter

SIZE = (16, 24)  # height and width


def save_picture(path, predicted):
    """A picture whose brightness says what the segmenter of these tests finds: 8 a class, in blocks of JPEG's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (8 * predicted + 4).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(path, **({"quality": 98} if path.suffix == ".jpg" else {}))


def save_labels(path, labels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image.putpalette([channel for index in range(256) for channel in (index, 255 - index, 0)])
    image.save(path)


def halves(left, right):
    """[16, 24], the left third and the rest."""
    found = np.full(SIZE, right)
    found[:, :8] = left
    return found


def make(root, name):
    """Two pictures and their labels. Predicted and wanted classes: see `test_miou_by_hand`."""
    zero = 1 if name in ("voc20", "context59", "ade20k") else 0  # files of these have 0 for what does not count
    predicted = [halves(1, 2), halves(3, 3)]
    wanted = [halves(1, 3) + zero, halves(255 - zero, 3) + zero]
    if zero:
        wanted[1][:4, :8] = 0  # as good as 255
    for number, (found, labels) in enumerate(zip(predicted, wanted, strict=True)):
        stem = f"picture_{number}"
        match name:
            case "voc21" | "voc20":
                folder = root / "VOCdevkit/VOC2012"
                save_picture(folder / f"JPEGImages/{stem}.jpg", found)
                save_labels(folder / f"SegmentationClass/{stem}.png", labels, palette=True)
                listed = folder / "ImageSets/Segmentation/val.txt"
            case "context60" | "context59":
                folder = root / "VOCdevkit/VOC2010"
                save_picture(folder / f"JPEGImages/{stem}.jpg", found)
                save_labels(folder / f"SegmentationClassContext/{stem}.png", labels)
                listed = folder / "ImageSets/SegmentationContext/val.txt"
            case "coco_stuff":
                save_picture(root / f"coco_stuff164k/images/val2017/{stem}.jpg", found)
                save_labels(root / f"coco_stuff164k/annotations/val2017/{stem}_labelTrainIds.png", labels)
            case "coco_object":
                save_picture(root / f"coco_object/images/val2017/{stem}.jpg", found)
                save_labels(root / f"coco_object/annotations/val2017/{stem}_instanceTrainIds.png", labels)
            case "cityscapes":
                city = ("bonn", "ulm")[number]
                save_picture(root / f"cityscapes/leftImg8bit/val/{city}/{city}_0_{number}_leftImg8bit.png", found)
                ids = {c.train_id: c.id for c in torchvision.datasets.Cityscapes.classes if c.train_id >= 0} | {255: 0}
                if number:  # as downloaded, without the files of train ids
                    labels, kind = np.vectorize(ids.get)(labels), "labelIds"
                else:
                    kind = "labelTrainIds"
                save_labels(root / f"cityscapes/gtFine/val/{city}/{city}_0_{number}_gtFine_{kind}.png", labels)
            case "ade20k":
                folder = root / "ADEChallengeData2016"
                save_picture(folder / f"images/validation/{stem}.jpg", found)
                save_labels(folder / f"annotations/validation/{stem}.png", labels)
        if name.startswith(("voc", "context")):
            listed.parent.mkdir(parents=True, exist_ok=True)
            with listed.open("a") as file:
                file.write(f"{stem}\n")
    return root


class Reader:
    """A segmenter that reads the classes out of the pictures that `save_picture` makes."""

    def __init__(self, fail_at=None):
        self.seen, self.fail_at = [], fail_at

    def segment(self, rgb, named, *, threshold, pamr):
        if self.fail_at == len(self.seen):
            raise KeyboardInterrupt
        labels = (np.asarray(rgb)[..., 0] // 8).astype(np.uint8)
        self.seen.append(labels)
        return Segmentation(rgb, labels, tuple(names[0] for names in named))


def setup(root, name):
    return Setup(name, root, "rfclip-tiny", None, RefocusConfig(distraction_dims=()))


def score(root, name, folder, segmenter=None, **options):
    scorer = Scorer(setup(root, name), segmenter or Reader())
    with open_run(root, name, folder, **options) as run:
        for _ in run.keep(map(scorer, run.missing())):
            pass
        return run.finish(scorer)


def open_run(root, name, folder, overwrite=False, **options):
    return Run(folder, {"benchmark": name, **options}, BENCHMARKS[name].pairs(root), root, overwrite=overwrite)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_miou_by_hand(tmp_path, name):
    """In the first picture 128 pixels of class 1 are right, and 256 of class 3 are taken for 2; 256 follow, all right.

    Intersection over union: 1 for class 1, 0 for class 2, 256 / 512 for class 3; no other class occurs.
    """
    result = score(make(tmp_path / "data", name), name, tmp_path / "run")
    assert result.iou[1:4].tolist() == [1, 0, 0.5]
    assert np.isnan(np.delete(result.iou, [1, 2, 3])).all()
    assert result.miou == 0.5
    assert result.pixel_accuracy == (128 + 256) / (128 + 256 + 256)
    assert result.confusion.sum() == 640 and result.images == 2
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert record["miou"] == 0.5 and list(record["iou"].values())[1:4] == [1, 0, 0.5]
    assert "50.00 % mIoU" in (tmp_path / "run/result.md").read_text()
    for picture in ("confusion.png", "worst-1.jpg", "worst-2.jpg"):
        Image.open(tmp_path / "run" / picture).load()
    assert [path.name for path in (tmp_path / "run").glob(".*")] in ([], [".lock"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_class_lists(name):
    benchmark = BENCHMARKS[name]
    counts = dict(voc21=21, voc20=20, context60=60, context59=59, coco_object=81, coco_stuff=171, cityscapes=19)
    assert len(benchmark.classes) == counts.get(name, 150) == len(set(benchmark.class_names))
    assert all(n and n == n.strip() for names in benchmark.classes for n in names)
    assert benchmark.background == (benchmark.class_names[0] == "background")
    protocol = METHODS["rf-clip"].protocol.on(name)  # the sizes that the paper gives
    assert (protocol.window, protocol.stride, protocol.logit_scale, protocol.threshold) == (224, 112, 40, 0.1)
    assert protocol.short_side == (560 if name == "cityscapes" else 336)
    assert setup(Path(), name).threshold == (0.1 if benchmark.background else None)


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
    """In the middle of the first file, and of starting anew."""
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


def test_a_list_that_names_a_picture_twice(tmp_path):
    root = make(tmp_path / "data", "voc21")
    listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_text(listed.read_text() * 2)
    assert len(BENCHMARKS["voc21"].pairs(root)) == 2
    listed.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="voc21: .*utf-8"):
        BENCHMARKS["voc21"].pairs(root)


def test_names_that_are_not_utf_8(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    for path in BENCHMARKS["ade20k"].pairs(root)[0]:
        path.rename(path.with_name(os.fsdecode(b"p\xff" + path.suffix.encode())))
    assert score(root, "ade20k", tmp_path / "run").miou == 0.5
    assert "p\\xff.jpg" in (tmp_path / "run/result.md").read_text()


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_pictures_are_refused(tmp_path, orientation):
    root = make(tmp_path / "data", "voc21")
    image, _ = BENCHMARKS["voc21"].pairs(root)[0]
    turned = Image.Exif()
    turned[0x0112] = orientation
    Image.open(image).save(image, exif=turned)
    with pytest.raises(ValueError, match=f"EXIF orientation is {orientation}"):
        score(root, "voc21", tmp_path / "run")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_data_shows_the_layout(tmp_path, name):
    benchmark = BENCHMARKS[name]
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError) as refused:
            benchmark.pairs(root)
        assert all(line in str(refused.value) for line in benchmark.layout)
        assert "found there: nothing" in str(refused.value)
    make(tmp_path, name)
    _, labels = benchmark.pairs(tmp_path)[1]
    labels.unlink()
    with pytest.raises(ValueError, match=f"missing: .*{labels.name.partition('_gtFine')[0]}"):
        benchmark.pairs(tmp_path)


def four_bits():
    """A gray PNG of 4 bits a pixel, which Pillow does not write."""
    rows = b"".join(b"\0" + bytes([0x12] * (SIZE[1] // 2)) for _ in range(SIZE[0]))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 4, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    whole = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*chunks, (b"IEND", b"")]:
        whole += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.write_bytes(b"no picture"), "cannot be read as labels"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read as labels"),
        (lambda path: Image.new("RGB", SIZE[::-1]).save(path), "a picture of mode RGB"),
        (lambda path: Image.new("L", (5, 7)).save(path), r"labels of \(7, 5\).*picture of \(16, 24\)"),
        (lambda path: Image.new("L", SIZE[::-1], 21).save(path), r"labels \[21\].*0 to 20"),
        (lambda path: path.write_bytes(four_bits()), r"of mode L;4 \(fewer than 8 bits\)"),
    ],
    ids=["no-picture", "cut-off", "rgb", "size", "beyond", "four-bits"],
)
def test_bad_labels(tmp_path, spoil, words):
    root = make(tmp_path, "voc21")
    _, labels = BENCHMARKS["voc21"].pairs(root)[0]
    spoil(labels)
    with pytest.raises(ValueError, match=words) as refused:
        score(root, "voc21", tmp_path / "run")
    assert str(labels) in str(refused.value)


@pytest.mark.parametrize("suffix", ["", "_labelTrainIds"])
def test_prepare_coco_object(tmp_path, suffix):
    """Person is 0 in both kinds of file; toothbrush is 89 as it comes and 79 as a train id; stuff follows."""
    labels = np.array([[0, 79, 80, 170, 255], [0, 1, 2, 3, 4]] if suffix else [[0, 89, 91, 181, 255], [0, 1, 2, 3, 4]])
    save_labels(tmp_path / f"coco_stuff164k/annotations/val2017/000000000139{suffix}.png", labels)
    (path,) = coco_object(tmp_path)
    assert path == tmp_path / "coco_object/annotations/val2017/000000000139_instanceTrainIds.png"
    assert np.array(Image.open(path)).tolist() == [[1, 80, 0, 0, 255], [1, 2, 3, 4, 5]]
    names = BENCHMARKS["coco_object"].class_names
    assert (names[1], names[80]) == ("person", "toothbrush")


def test_prepare_context(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")

    def region(rows, category):
        drawn = np.zeros((4, 6), np.uint8, order="F")
        drawn[rows] = 1
        encoded = mask.encode(drawn)
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        return {"image_id": 7, "category_id": category, "segmentation": segmentation}

    folder = tmp_path / "VOCdevkit/VOC2010"
    folder.mkdir(parents=True)
    images = [
        {"image_id": 7, "file_name": "2008_000002.jpg", "height": 4, "width": 6, "phase": "val"},
        {"image_id": 8, "file_name": "2008_000003.jpg", "height": 4, "width": 6, "phase": "train"},
    ]
    regions = [region(slice(0, 2), 2), region(slice(1, 3), 458)]  # aeroplane is the first class, wood the last
    (folder / "trainval_merged.json").write_text(json.dumps({"images": images, "annos_segmentation": regions}))
    written = list(context(tmp_path))
    assert [path.name for path in written] == ["2008_000002.png", "val.txt"]
    assert np.array(Image.open(written[0]))[:, 0].tolist() == [1, 59, 59, 0]
    assert written[1].read_text() == "2008_000002\n"
    names = BENCHMARKS["context60"].class_names
    assert (names[1], names[59]) == ("aeroplane", "wood")


def test_table_rows():
    benchmark = SimpleNamespace(title="VOC21", paper={"ViT-B-16": 64.8})
    result = SimpleNamespace(benchmark=benchmark, images=5, miou=0.653)
    assert table_rows([result], "ViT-B/16", "rf-clip", True) == [("rf-clip", "VOC21", "5", "65.3", "64.8", "+0.5")]
    assert table_rows([result], "ViT-B-16", "rf-clip", False) == [("rf-clip", "VOC21", "5", "65.3", "-", "-")]
    assert table_rows([result], "ViT-B-16", "kk", True) == [("kk", "VOC21", "5", "65.3", "-", "-")]
    both = partial(table_rows, [result, result], "ViT-B-16", "rf-clip")
    assert both(True)[-1] == ("rf-clip", "mean", "", "65.3", "64.8", "+0.5")
    assert both(False)[-1] == ("rf-clip", "mean", "", "65.3", "-", "-")


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Text embeddings outlive a test, not the session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_evaluate_all(tmp_path, monkeypatch):
    """All eight on the shipped model, which knows next to none of their classes."""
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


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_on_scenes(tmp_path, ablation):
    out = tmp_path / "figures.json"
    result = run("ablate", ablation, "--count", 1, "--inject-distraction", 0.1, "--out", out)
    assert result.exit_code == 0, result.output
    config = RefocusConfig(distraction_dims=(1,))
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == list(variants(ablation, config, 6))


def test_an_ablation_on_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("data"), "voc21")
    Path("config.json").write_text(RefocusConfig(distraction_dims=(3,)).to_json())
    result = run("ablate", "6", "voc21", "--root", "data", "--config", "config.json", "--pamr")
    assert result.exit_code == 0, result.output
    folder = Path("rfclip-runs/voc21-ablation-6")
    assert [line.split("|")[1].strip() for line in (folder / "ablation.md").read_text().splitlines()[4:]] == [
        "to non-distraction",
        "to cls",
        "to defocused",
    ]
    settings = [json.loads((folder / f"variant-{n}/run.json").read_text()) for n in (1, 2, 3)]
    assert [each["config"]["target"] for each in settings] == ["non-distraction", "cls", "defocused"]
    assert all(each["pamr"] for each in settings)


def test_variants():
    """Each differs from all others of its ablation, but for the full method, which stands once in each group."""
    config = RefocusConfig(distraction_dims=(1, 2))
    for ablation in ABLATIONS:
        found = list(variants(ablation, config, 12).values())
        full = found.count(config)
        assert full == {"5": 3, "7": 2}.get(ablation, 1)
        assert len(set(found)) == len(found) - full + 1
        other = RefocusConfig(
            (1, 2), similarity="vv", cut_threshold="otsu", neighbourhood=5
        )  # not read by all variants
        assert len(variants(ablation, other, 12)) == len(variants(ablation, config, 12))
    assert variants("7", config, 12)["blocks 5 to 8"].layers == (5, 6, 7, 8)
    with pytest.raises(ValueError, match="expected one of 1, 4"):
        variants("2", config, 12)
    with pytest.raises(ValueError, match="no distraction dimensions"):
        variants("tau", RefocusConfig(distraction_dims=()), 12)


def test_prepare(tmp_path):
    save_labels(tmp_path / "coco_stuff164k/annotations/val2017/1.png", np.zeros((2, 2)))
    result = run("prepare", "coco_object", "--root", tmp_path)
    assert result.exit_code == 0 and "1 files" in result.output
    for name, words in (("voc21", "need no preparation"), ("context", "trainval_merged.json")):
        result = run("prepare", name, "--root", tmp_path)
        assert result.exit_code == 2 and words in result.output
