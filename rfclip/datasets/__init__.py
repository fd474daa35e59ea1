"""The datasets that methods are scored on: one file each, and one line here."""

from __future__ import annotations

from rfclip.datasets.ade20k import ADE20K
from rfclip.datasets.base import Dataset, FolderDataset
from rfclip.datasets.cityscapes import Cityscapes
from rfclip.datasets.coco import COCOObject, COCOStuff
from rfclip.datasets.context import Context59, Context60
from rfclip.datasets.scenes import Scenes
from rfclip.datasets.voc import VOC20, VOC21

__all__ = ["DATASETS", "PAPER", "Dataset", "FolderDataset", "find_dataset"]

DATASETS: dict[str, type[Dataset]] = {
    dataset.name: dataset
    for dataset in (
        Scenes,
        # The paper's table 2, in its order.
        VOC21,
        Context60,
        COCOObject,
        VOC20,
        Context59,
        COCOStuff,
        Cityscapes,
        ADE20K,
    )
}
PAPER = tuple(name for name, dataset in DATASETS.items() if dataset.paper)  # those of the paper's table 2


def find_dataset(name: str) -> type[Dataset]:
    """The class of a dataset.

    Raises:
        ValueError: there is no dataset of that name.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]
