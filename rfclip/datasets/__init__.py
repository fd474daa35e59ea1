"""The datasets that methods are scored on: each a class in a file here, imported on first use, and one line below."""

from __future__ import annotations

from functools import cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rfclip.datasets.base import Dataset

__all__ = ["DATASETS", "find_dataset", "in_paper"]

DATASETS = {  # "module:class" by name; after the scenes, the paper's table 2 in its order
    "scenes": "scenes:Scenes",
    "voc21": "voc:VOC21",
    "context60": "context:Context60",
    "coco_object": "coco:COCOObject",
    "voc20": "voc:VOC20",
    "context59": "context:Context59",
    "coco_stuff": "coco:COCOStuff",
    "cityscapes": "cityscapes:Cityscapes",
    "ade20k": "ade20k:ADE20K",
}


def check_dataset(name: str) -> None:
    """Raise ValueError if there is no dataset of that name."""
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(DATASETS)}")


@cache
def find_dataset(name: str) -> type[Dataset]:
    """The class of a dataset.

    Raises:
        ValueError: there is no dataset of that name.
    """
    check_dataset(name)
    return resolve_name(f"{__name__}.{DATASETS[name]}")


def in_paper() -> tuple[str, ...]:
    """The names of the datasets in the paper's table 2."""
    return tuple(name for name in DATASETS if find_dataset(name).paper)
