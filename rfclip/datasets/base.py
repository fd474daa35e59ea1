"""What a dataset is: pictures with their labels, and what the labels mean.

Layouts of folders are those of MMSegmentation's data guide, class names those that the field evaluates with. Labels are
one byte per pixel: the index of a class, or 255 where a pixel does not count. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import numpy as np
from PIL import ExifTags, Image

from rfclip.datasets.names import class_list
from rfclip.files import stamp
from rfclip.images import to_rgb

IGNORED = 255
GUIDE = 'the page "Datasets" of the documentation, docs/datasets.md'
Pair = tuple[Path, Path]  # a picture and its labels
Item = dict[str, Any]  # JSON values that identify a picture, among them its name, "image"


class Dataset:
    """Pictures with labels.

    Attributes:
        name: as on the command line.
        title: as in the paper's tables.
        background: class 0 is whatever the other classes are not, and takes the pixels of which no class is sure.
        paper: RF-CLIP's mIoU in percent from the paper's table 2, by open_clip's name of the model.
        options: the options of `open` that it takes.
        methods: those that are scored on it by default.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    background: ClassVar[bool] = False
    paper: ClassVar[Mapping[str, float]] = {}
    options: ClassVar[tuple[str, ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ("rf-clip",)

    @classmethod
    def open(cls, **options: Any) -> Dataset:
        """The dataset with those of `options` that are not None.

        Raises:
            ValueError: it takes another option, or one is missing or out of range.
        """
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in cls.options:
                raise ValueError(f"--{name.replace('_', '-')} does not apply to {cls.name}")
        return cls(**given)

    @property
    def classes(self) -> list[tuple[str, ...]]:
        """The names of each class, in the order of the labels; the first name stands for the class."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        """One name per class, for tables."""
        names = [names[0] for names in self.classes]
        return ["background", *names[1:]] if self.background else names

    @property
    def candidates(self) -> tuple[str, ...]:
        """The names that pictures with a single label are classified among, by label."""
        return tuple(names[0] for names in self.classes)

    def items(self, limit: int | None = None) -> list[Item]:
        """Every picture, or the first `limit`, in a fixed order. A picture that changes gets another item.

        Raises:
            ValueError: the data are missing or incomplete.
        """
        raise NotImplementedError

    def read(self, item: Item) -> tuple[Image.Image, np.ndarray | int]:
        """A picture, RGB, with its labels: uint8 [H, W], or one class for the picture as a whole.

        Raises:
            ValueError: one of the two cannot be read.
        """
        raise NotImplementedError

    def described(self) -> dict[str, object]:
        """What identifies the dataset in the settings of a run."""
        return {"dataset": self.name}

    def elsewhere(self) -> Dataset:
        """The same for a process with another working directory."""
        return self


@dataclass(frozen=True)
class FolderDataset(Dataset):
    """A dataset on disk.

    Attributes:
        layout: what must lie below the root, for people to read.
        zero_ignored: label 0 of the files does not count, and label k is class k - 1.
    """

    root: Path | None = None

    options = ("root",)
    layout: ClassVar[tuple[str, ...]]
    zero_ignored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.root is None:
            raise ValueError(f"{self.name}: --root DIR is missing, the folder that holds the datasets; see {GUIDE}")

    def find(self, root: Path) -> Iterable[Pair]:
        """The pictures and labels below a root; OSError or ValueError if something is missing or malformed."""
        raise NotImplementedError

    @cached_property
    def classes(self) -> list[tuple[str, ...]]:
        """As `Dataset.classes`, from `classes/NAME.txt`: a class a line, its names between commas, in the file's order.

        The lists are those of the field's code, but for one blank: there, the last line of context60 is "wood ". CLIP's
        tokenizer collapses blanks, and makes the same tokens of "a photo of a wood ." and "a photo of a wood.".
        """
        return class_list(self.name, "official")

    @property
    def folder(self) -> Path:
        """The root."""
        assert self.root is not None
        return self.root

    def pairs(self) -> list[Pair]:
        """Every picture of the validation set with its labels, in the order of their names.

        Raises:
            ValueError: the layout is missing, empty or incomplete; the message shows what is expected and found.
        """
        try:
            pairs = sorted(set(self.find(self.folder)))  # a list may name a picture twice
            incomplete = [pair for pair in pairs if not all(path.is_file() for path in pair)]
            problem = None if pairs and not incomplete else _exchanged(incomplete) or _missing(incomplete)
        except (OSError, ValueError) as error:
            raise ValueError(self._expected(str(error))) from error
        if problem:
            raise ValueError(self._expected(problem))
        self.indices(pairs[0][1])  # before a model is loaded: photographs where labels belong
        return pairs

    def _expected(self, problem: str) -> str:
        root = self.folder
        if not root.is_dir():
            problem = f"the root {root} {'is not a folder' if root.exists() else 'does not exist'}"
        below = sorted(root.iterdir()) if root.is_dir() else []
        found = [f"{path.name}/" if path.is_dir() else path.name for path in below]
        seen = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "") if found else "nothing"
        expected = "\n".join(f"  {line}" for line in self.layout)
        # People give the folder of the dataset itself, one within it, or the one above all datasets.
        near = [*root.absolute().parents[:4], *below]
        right = next((f"this layout lies below {path}: give --root {path}\n" for path in near if self._lies(path)), "")
        return f"{self.name}: {problem}\nexpected below {root}:\n{expected}\nfound there: {seen}\n{right}see {GUIDE}"

    def _lies(self, root: Path) -> bool:
        """Whether a picture with its labels lies below another root."""
        try:
            return any(image.is_file() and labels.is_file() for image, labels in self.find(root))
        except (OSError, ValueError):
            return False

    def items(self, limit: int | None = None) -> list[Item]:
        items = []
        for image, labels in self.pairs()[:limit]:
            # Size and time of the files, so that a picture is scored again if they change.
            files = [list(stamp(path)) for path in (image, labels)]
            names = [str(path.relative_to(self.folder)) for path in (image, labels)]
            items.append({"image": names[0], "labels": names[1], "files": files})
        return items

    def read(self, item: Item) -> tuple[Image.Image, np.ndarray | int]:
        rgb = read_picture(self.folder / item["image"])
        return rgb, self.read_labels(self.folder / item["labels"], rgb.size[::-1])

    def read_labels(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """The labels of a picture of size (height, width): uint8 of that shape, `IGNORED` where a pixel does not count.

        Raises:
            ValueError: as `read_indices`, or the file differs from the picture in size, or has a label beyond the
                classes.
        """
        labels = self.indices(path)
        if labels.shape != size:
            raise ValueError(f"{path}: labels of {labels.shape} (height, width) for a picture of {size}")
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

    def indices(self, path: Path) -> np.ndarray:
        """The labels of a file, before `zero_ignored` applies."""
        return read_indices(path)

    def elsewhere(self) -> Dataset:
        return replace(self, root=self.folder.absolute())


def read_picture(path: Path) -> Image.Image:
    """A dataset's picture, RGB.

    Raises:
        ValueError: it cannot be read, or it is to be turned, since nothing says whether its labels are turned as well.
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
        ValueError: the file cannot be read, or does not have one byte per pixel (Pillow's modes L and P).
    """
    try:
        with Image.open(path) as opened:
            mode = opened.mode
            # Pillow stretches the values of gray PNGs with fewer bits, whose tile says "L;4" or "L;2".
            if mode == "L" and opened.tile and str(opened.tile[0][3]).startswith("L;"):
                mode = f"{opened.tile[0][3]} (fewer than 8 bits)"
            indices = np.array(opened) if mode in ("L", "P") else None
    except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over
        raise ValueError(f"{path}: cannot be read as labels: {error}") from error
    if indices is None:
        instead = (
            "; if these are photographs, pictures and labels are exchanged; if they show labels in colours, take the "
            f"files of indices; see {GUIDE}"
        )
        problem = f"{path}: a picture of mode {mode}; labels have one byte per pixel, mode L or P"
        raise ValueError(problem + instead if mode in ("RGB", "RGBA") else problem)
    return indices


def listed(path: Path) -> list[str]:
    """The names of a list of pictures, one a line; blanks around them, empty lines and a byte-order mark do not count.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or a name leads out of the folder of pictures.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of names: {error}") from error
    for number, name in enumerate(names, 1):
        if PureWindowsPath(name).name != name:  # Windows separates folders with both slashes, and has drives
            raise ValueError(f"{path}, line {number}: {name!r} has a folder; expected a name alone, as 2007_000033")
    return [name for name in names if name]


def present(*paths: Path) -> Path:
    """The first path that exists, or else the first."""
    return next((path for path in paths if path.exists()), paths[0])


def beside(images: Path, labels: Path, suffix: str, pictures: str = "*.jpg") -> list[Pair]:
    """The pictures of a folder, with the labels of the same names in another.

    Args:
        images: the folder of pictures; one that lies among the labels instead is listed as if it were here.
        labels: the folder of labels.
        suffix: what a name of labels has in place of what follows the last asterisk of `pictures`.
        pictures: a glob pattern.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    end = pictures.rpartition("*")[2]
    names = sorted({path.relative_to(folder) for folder in (images, labels) for path in folder.glob(pictures)})
    return [(images / name, labels / name.with_name(name.name.removesuffix(end) + suffix)) for name in names]


def _exchanged(incomplete: list[Pair]) -> str:
    """What lies in the folder of the other kind, and where to move it; "" if nothing does."""
    for image, labels in incomplete:
        strays = [(image.parent / labels.name, labels), (labels.parent / image.name, image)]
        moves = [f"{stray} to {place.parent}" for stray, place in strays if stray.is_file() and not place.is_file()]
        if moves:
            kind = "exchanged" if len(moves) == 2 else "mixed"
            return f"pictures and labels are {kind}: move {' and '.join(moves)}, and all others likewise"
    return ""


def _missing(incomplete: list[Pair]) -> str:
    missing = [str(path) for pair in incomplete for path in pair if not path.is_file()]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"missing: {', '.join(missing[:3])}{more}" if missing else "there is no picture"


def by_model(b16: float, l14: float) -> dict[str, float]:
    """The paper's figures for its two models."""
    return {"ViT-B-16": b16, "ViT-L-14": l14}
