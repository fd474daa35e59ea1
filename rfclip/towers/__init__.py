"""Image towers: a uniform view of each family, reading one from a model, and loading a model by name."""

from __future__ import annotations

from torch import nn

from rfclip.towers.base import SUPPORTED, Block, Tower
from rfclip.towers.hugging_face import HuggingFaceTower
from rfclip.towers.open_clip import OpenCLIPTower

__all__ = ["FAMILIES", "SUPPORTED", "Block", "Tower", "read_tower"]

FAMILIES: tuple[type[Tower], ...] = (HuggingFaceTower, OpenCLIPTower)  # the first that fits is taken


def read_tower(model: nn.Module) -> Tower:
    """The image tower of a model.

    Raises:
        ValueError: the model has no tower of standard blocks.
    """
    for family in FAMILIES:
        if family.reads(model):
            return family(model)
    raise ValueError(f"got a {type(model).__name__}; {SUPPORTED}")
