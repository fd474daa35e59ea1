"""Class names as users give them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from rfclip.datasets import DATASETS, find_dataset
from rfclip.datasets.names import ClassNames, class_list

Classes: TypeAlias = str | os.PathLike | Sequence[str | Sequence[str]]
MOST = 65534  # classes, so that labels fit into 16 bits
# What a picture holds beside the things asked for: the list with which the field's methods score Pascal VOC.
GENERAL = (
    *("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk", "bed", "building"),
    *("cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor", "hill", "rail"),
    "fence",
)


class Background(tuple[str, ...]):
    """General names that make up the class "background", a word that the model itself is not asked for."""


def title(names: tuple[str, ...]) -> str:
    """What a class is called in results."""
    return "background" if isinstance(names, Background) else names[0]


def with_background(named: ClassNames, wanted: bool | None, general: Sequence[str] = GENERAL) -> ClassNames:
    """The classes and, if wanted, a background of those general names that no class has.

    Args:
        named: the names of each class.
        wanted: None: if there is one class, which would otherwise cover every picture whole.
        general: the names.

    Raises:
        ValueError: a background is wanted, and there is one, or every general name is taken.
    """
    given = {name.casefold() for names in named for name in names}
    there = "background" in map(title, named) or "background" in given
    if wanted is False or wanted is None and (len(named) > 1 or there):
        return named
    names = Background(name for name in general if name.casefold() not in given)
    if there or not names:
        raise ValueError("background: there is such a class already" if there else "background: no name is left for it")
    return [*named, names]


def parse_classes(classes: Classes) -> ClassNames:
    """The names of each class: one tuple per class, its first name standing for it.

    Args:
        classes: a list whose items are a name, names separated by commas ("cat, kitten"), or a list of names; or a file
            of one class per line; or one string of classes separated by commas or, to allow synonyms, by semicolons:
            "cat, kitten; dog"; or the name of a dataset, "voc21", for the field's list of its classes.

    Raises:
        ValueError: there is no class, an empty name, a repeated name, or no such file.
    """
    if isinstance(classes, str) and (listed := shipped_list(classes)) is not None:
        return listed
    if isinstance(classes, os.PathLike) or (isinstance(classes, str) and os.path.isfile(classes)):
        try:
            items: Iterable = [line for line in Path(classes).read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"classes file {classes}: {error}") from error
    elif isinstance(classes, str) and (classes.endswith(".txt") or _is_path(classes)):
        raise ValueError(f"classes: there is no file {classes}")
    elif isinstance(classes, str):
        items = split_classes(classes)
    elif isinstance(classes, Iterable):
        items = classes
    else:
        raise ValueError(f"classes: got {classes!r}, expected names, or a file of names")
    parsed = []
    for item in items:
        names = item.split(",") if isinstance(item, str) else item
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"classes: got {item!r}, expected a name or a list of names")
        parsed.append(names if isinstance(names, Background) else tuple(" ".join(name.split()) for name in names))
    every = [name for names in parsed for name in names]
    if not every or not all(every) or not all(parsed):
        raise ValueError(f"classes: got {classes!r}, expected at least one class and no empty names")
    twice = [name for name, count in Counter(every).items() if count > 1]
    if twice:
        raise ValueError(f"classes: {', '.join(map(repr, twice))} given more than once; every name must be distinct")
    if len(parsed) > MOST:
        raise ValueError(f"classes: got {len(parsed)}, at most {MOST} are possible")
    return parsed


def parse_lists(given: Sequence[str]) -> ClassNames:
    """The classes of several lists, each as `parse_classes` takes it, one after the other.

    Raises:
        ValueError: as `parse_classes`, or two lists have a name in common.
    """
    lists = [parse_classes(each) for each in given]
    counts = Counter(name for listed in lists for name in {name for names in listed for name in names})
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"classes: {', '.join(map(repr, twice))} stands in more than one list")
    return [names for listed in lists for names in listed]


def shipped_list(name: str) -> ClassNames | None:
    """The list of names that the field scores a dataset with; None if the name is no dataset's.

    In lists with a background, its general names are the class "background". A name may stand in two classes of a list
    ("bed", in COCO-Object): they score the same, and the first of them wins.
    """
    name = name.strip()
    dataset = find_dataset(name) if name in DATASETS else None
    if dataset is None or not dataset.paper:  # scenes have no list
        return None
    first, *rest = class_list(dataset.name, "official")
    return [Background(first) if dataset.background else first, *rest]


def _is_path(text: str) -> bool:
    """Whether text is written as a path, not as names such as "tv/monitor"."""
    return text.startswith(("./", "../", "~", f".{os.sep}", f"..{os.sep}")) or os.path.isabs(text)


def split_classes(text: str) -> list[list[str]]:
    """The names of each class in "cat, dog" or, with synonyms, in "cat, kitten; dog". The text is never a file name."""
    if ";" in text:
        return [names.split(",") for names in text.split(";")]
    return [[name] for name in text.split(",")]
