"""The paper's eight benchmarks: where their pictures and labels lie on disk, and what the labels mean.

Layouts are those of MMSegmentation's data guide, class names those that the field evaluates with.
Labels are one byte a pixel: the index of a class, or 255 where a pixel does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from torchvision.datasets import Cityscapes, VOCSegmentation

from rfclip.images import to_rgb

IGNORED = 255
Pair = tuple[Path, Path]  # a picture and its labels


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: as on the command line.
        title: as in the paper's tables.
        layout: what must lie below the root, for people to read.
        find: the pictures and labels below a root; OSError or RuntimeError where something is missing.
        background: class 0 is what the other classes are not, and gets the pixels of which no class is sure.
        zero_ignored: label 0 of the files does not count, and label k is class k - 1.
        paper: RF-CLIP's mIoU in percent from the paper's table 2, by open_clip's name of the model.
    """

    name: str
    title: str
    layout: tuple[str, ...]
    find: Callable[[Path], Iterable[Pair]]
    paper: dict[str, float]
    background: bool = False
    zero_ignored: bool = False

    @cached_property
    def classes(self) -> list[tuple[str, ...]]:
        """The names of each class; in the order of the labels, the first name standing for the class.

        In coco_object "bed" belongs both to the background and to a class of its own, as where the field took it from.
        """
        lines = resources.files("rfclip").joinpath("classes", f"{self.name}.txt").read_text("utf-8").splitlines()
        return [tuple(line.split(", ")) for line in lines]

    @property
    def class_names(self) -> list[str]:
        """One name a class, for tables."""
        names = [names[0] for names in self.classes]
        return ["background", *names[1:]] if self.background else names

    def pairs(self, root: Path) -> list[Pair]:
        """Every picture of the validation set with its labels, in the order of their names.

        Raises:
            ValueError: the layout is not there, is empty, or lacks files; the message shows what is expected and found.
        """
        try:
            pairs = sorted(set(self.find(root)))  # a list may name a picture twice
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(self._expected(root, str(error))) from error
        if not pairs:
            raise ValueError(self._expected(root, "there is no picture"))
        missing = [str(path) for pair in pairs for path in pair if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(self._expected(root, f"missing: {', '.join(missing[:3])}{more}"))
        return pairs

    def _expected(self, root: Path, problem: str) -> str:
        found = (
            sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir()) if root.is_dir() else []
        )
        seen = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "") if found else "nothing"
        expected = "\n".join(f"  {line}" for line in self.layout)
        return f"{self.name}: {problem}\nexpected below {root}:\n{expected}\nfound there: {seen}"

    def read_labels(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """The labels of a picture of size (height, width): uint8 of that shape, `IGNORED` where a pixel does not count.

        Raises:
            ValueError: as `read_indices`, or the file has another size than the picture, or a label beyond the classes.
        """
        labels = read_indices(path)
        if labels.shape != size:
            raise ValueError(f"{path}: labels of {labels.shape} (height, width) for a picture of {size}")
        if path.name.endswith("_labelIds.png"):
            labels = _CITYSCAPES_TRAIN_IDS[labels]
        if self.zero_ignored:
            labels = np.where(labels == IGNORED, IGNORED, labels - 1).astype(np.uint8)  # 0 wraps round to 255
        classes = len(self.classes)
        beyond = np.unique(labels[(labels >= classes) & (labels != IGNORED)])
        if beyond.size:
            known = f"{1 if self.zero_ignored else 0} to {classes if self.zero_ignored else classes - 1}"
            given = beyond + 1 if self.zero_ignored else beyond
            raise ValueError(
                f"{path}: labels {given.tolist()}; {self.name} has {known}, and 255 for what does not count"
            )
        return labels


def read_picture(path: Path) -> Image.Image:
    """A benchmark's picture, RGB.

    Raises:
        ValueError: it cannot be read, or is to be turned, since nothing says whether its labels are turned, too.
    """
    rgb = to_rgb(path)
    with Image.open(path) as opened:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation not in (0, 1):
        raise ValueError(f"{path}: its EXIF orientation is {orientation}; save it and its labels upright")
    return rgb


def read_indices(path: Path) -> np.ndarray:
    """The values that a picture of labels stores, uint8 [H, W]: not the colours of its palette.

    Raises:
        ValueError: the file cannot be read, or is not of one byte a pixel (Pillow's modes L and P).
    """
    try:
        with Image.open(path) as opened:
            mode = opened.mode
            # Pillow stretches the values of gray PNGs with fewer bits, whose tile says "L;4" or "L;2".
            if mode == "L" and opened.tile and str(opened.tile[0][3]).startswith("L;"):
                mode = f"{opened.tile[0][3]} (fewer than 8 bits)"
            indices = np.array(opened) if mode in ("L", "P") else None
    except Exception as error:  # Pillow raises whatever a damaged file makes it stumble on
        raise ValueError(f"{path}: cannot be read as labels: {error}") from error
    if indices is None:
        raise ValueError(f"{path}: a picture of mode {mode}; labels have one byte a pixel, mode L or P")
    return indices


# Cityscapes' labels come as ids; its own scripts make the files of train ids, which are read where they exist.
_CITYSCAPES_TRAIN_IDS = np.full(256, IGNORED, np.uint8)
for _label in Cityscapes.classes:
    if 0 <= _label.train_id < IGNORED:
        _CITYSCAPES_TRAIN_IDS[_label.id] = _label.train_id


def _voc(root: Path) -> Iterable[Pair]:
    found = VOCSegmentation(root, year="2012", image_set="val")
    return [(Path(image), Path(labels)) for image, labels in zip(found.images, found.targets, strict=True)]


def _context(root: Path) -> Iterable[Pair]:
    folder = root / "VOCdevkit/VOC2010"
    names = (folder / "ImageSets/SegmentationContext/val.txt").read_text("utf-8").split()
    return [(folder / f"JPEGImages/{n}.jpg", folder / f"SegmentationClassContext/{n}.png") for n in names]


def _beside(images: Path, labels: Path, suffix: str) -> Iterable[Pair]:
    """The JPEG files of a folder and, in another, the labels of the same names."""
    if not images.is_dir():
        raise FileNotFoundError(f"there is no folder {images}")
    return [(image, labels / f"{image.stem}{suffix}") for image in images.glob("*.jpg")]


def _coco_stuff(root: Path) -> Iterable[Pair]:
    folder = root / "coco_stuff164k"
    return _beside(folder / "images/val2017", folder / "annotations/val2017", "_labelTrainIds.png")


def _coco_object(root: Path) -> Iterable[Pair]:
    images = root / "coco_object/images/val2017"
    images = images if images.is_dir() else root / "coco_stuff164k/images/val2017"  # the same pictures
    return _beside(images, root / "coco_object/annotations/val2017", "_instanceTrainIds.png")


def _cityscapes(root: Path) -> Iterable[Pair]:
    folder = root / "cityscapes"
    for part in ("leftImg8bit/val", "gtFine/val"):  # torchvision unpacks archives in their place
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"there is no folder {folder / part}")
    found = Cityscapes(folder, split="val", target_type="semantic")
    pairs = []
    for image, (labels,) in zip(found.images, found.targets, strict=True):
        train_ids = Path(labels.replace("_labelIds.png", "_labelTrainIds.png"))
        pairs.append((Path(image), train_ids if train_ids.is_file() else Path(labels)))
    return pairs


def _ade20k(root: Path) -> Iterable[Pair]:
    folder = root / "ADEChallengeData2016"
    return _beside(folder / "images/validation", folder / "annotations/validation", ".png")


_VOC = (
    "VOCdevkit/VOC2012/JPEGImages/*.jpg",
    "VOCdevkit/VOC2012/SegmentationClass/*.png",
    "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
)
_CONTEXT = (
    "VOCdevkit/VOC2010/JPEGImages/*.jpg",
    "VOCdevkit/VOC2010/SegmentationClassContext/*.png (`rfclip prepare context` makes them)",
    "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt (so does it make this)",
)


def _row(b16: float, l14: float) -> dict[str, float]:
    return {"ViT-B-16": b16, "ViT-L-14": l14}


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (  # in the order of the paper's table 2
        Benchmark("voc21", "VOC21", _VOC, _voc, _row(64.8, 65.8), background=True),
        Benchmark("context60", "Context60", _CONTEXT, _context, _row(36.4, 36.7), background=True),
        Benchmark(
            "coco_object",
            "COCO-Object",
            (
                "coco_object/images/val2017/*.jpg (or those of coco_stuff164k)",
                "coco_object/annotations/val2017/*_instanceTrainIds.png (`rfclip prepare coco_object` makes them)",
            ),
            _coco_object,
            _row(37.9, 41.8),
            background=True,
        ),
        Benchmark("voc20", "VOC20", _VOC, _voc, _row(87.0, 89.1), zero_ignored=True),
        Benchmark("context59", "Context59", _CONTEXT, _context, _row(39.8, 40.2), zero_ignored=True),
        Benchmark(
            "coco_stuff",
            "COCO-Stuff",
            (
                "coco_stuff164k/images/val2017/*.jpg",
                "coco_stuff164k/annotations/val2017/*_labelTrainIds.png",
            ),
            _coco_stuff,
            _row(26.3, 26.7),
        ),
        Benchmark(
            "cityscapes",
            "Cityscapes",
            (
                "cityscapes/leftImg8bit/val/CITY/*_leftImg8bit.png",
                "cityscapes/gtFine/val/CITY/*_gtFine_labelTrainIds.png (or *_gtFine_labelIds.png)",
            ),
            _cityscapes,
            _row(41.3, 41.4),
        ),
        Benchmark(
            "ade20k",
            "ADE20K",
            (
                "ADEChallengeData2016/images/validation/*.jpg",
                "ADEChallengeData2016/annotations/validation/*.png",
            ),
            _ade20k,
            _row(20.4, 22.4),
            zero_ignored=True,
        ),
    )
}
