"""Image towers: a uniform view of each family, reading one from a model, and loading a model by name."""

from __future__ import annotations

from torch import nn

from rfclip.towers.base import SUPPORTED, Block, Tower
from rfclip.towers.coca import CoCaTower
from rfclip.towers.hugging_face import HuggingFaceTower
from rfclip.towers.open_clip import OpenCLIPTower
from rfclip.towers.openai_clip import OpenAITower
from rfclip.towers.resnet import ResNetTower
from rfclip.towers.timm import TimmTower
from rfclip.towers.uses import use_of

__all__ = ["FAMILIES", "SUPPORTED", "Block", "Tower", "find_module", "read_tower", "use_of"]

FAMILIES: tuple[type[Tower], ...] = (  # the first that fits is taken
    HuggingFaceTower,
    OpenAITower,
    TimmTower,
    ResNetTower,
    CoCaTower,
    OpenCLIPTower,
)


def read_tower(model: nn.Module) -> Tower:
    """The image tower of a model.

    Raises:
        ValueError: the model has no tower that can be read.
    """
    return _found(model)[0](model)


def find_module(model: nn.Module) -> nn.Module:
    """The module of a model's image tower, without a look at its parts; ValueError if the model is of no family."""
    return _found(model)[1]


def _found(model: nn.Module) -> tuple[type[Tower], nn.Module]:
    for family in FAMILIES:
        module = family.find(model)
        if module is not None:
            return family, module
    raise ValueError(f"got a {type(model).__name__}; {SUPPORTED}")
