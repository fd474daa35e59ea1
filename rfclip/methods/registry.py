"""Every method by name: where it comes from, how it is evaluated, and the class that computes it.

Nothing heavy is imported here: a card imports its class when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from rfclip.config import PLAIN, RefocusConfig
from rfclip.datasets import check_dataset

if TYPE_CHECKING:
    from rfclip.methods.base import Method
    from rfclip.towers import Tower


@dataclass(frozen=True)
class Protocol:
    """How a method sees a picture and decides. Sides are in pixels for a tower trained at 224, and scaled for others.

    Attributes:
        short_side, window, stride: of the resized picture, and of the windows over it.
        logit_scale: factor of the cosines before the softmax.
        threshold: class probability below which a pixel is background, in datasets that have such a class.
        datasets: what differs on some datasets, by name.

    Raises:
        ValueError: `datasets` names one that does not exist.
    """

    short_side: int = 336
    window: int = 224
    stride: int = 112
    logit_scale: float = 40.0
    threshold: float | None = 0.1
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"cityscapes": {"short_side": 560}})

    def __post_init__(self) -> None:
        for name in self.datasets:
            check_dataset(name)

    def on(self, dataset: str) -> Protocol:
        """What applies to a dataset.

        Raises:
            ValueError: there is no such dataset.
        """
        check_dataset(dataset)
        return replace(self, **self.datasets.get(dataset, {}))


@dataclass(frozen=True)
class MethodCard:
    """What is known of a method before its code is imported. Calling the card puts the method on a tower.

    Attributes:
        name: as `rfclip.refocus` takes it.
        target: its class, as "module:class" within `rfclip.methods`.
        source: where it was published.
        protocol: how it is evaluated.
        blocks: the least number of blocks a tower must have.
        configured: whether it takes a `RefocusConfig`.
        fixed: the config of a method that is a special case of RF-CLIP.
        sees_images: whether it looks at the pictures as well as their patches.
        beyond: what its formula computes in addition to the tower's blocks, for methods that take notably longer.
    """

    name: str
    target: str
    source: str
    protocol: Protocol = Protocol()
    blocks: int = 1
    configured: bool = False
    fixed: RefocusConfig | None = None
    sees_images: bool = False
    beyond: str = ""

    def load(self) -> type[Method]:
        """The class."""
        return resolve_name(f"rfclip.methods.{self.target}")

    def __call__(self, tower: Tower, config: RefocusConfig | None, backend: str, **options: Any) -> Method:
        """The method on a tower. A config goes with `configured` methods only; options are the class's own."""
        return self.load()(self, tower, self.fixed if config is None else config, backend, **options)


RF_CLIP = "rf-clip"  # the default method
_PAPER = "Target Refocusing via Attention Redistribution, AAAI 2026"

METHODS: dict[str, MethodCard] = {
    card.name: card
    for card in (
        MethodCard("clip", "rf_clip:RFCLIP", "Radford et al., ICML 2021", fixed=PLAIN),
        MethodCard(
            "maskclip",
            "peers:MaskCLIP",
            "Zhou et al., ECCV 2022",
            Protocol(short_side=512, threshold=None, datasets={"context59": {"short_side": 520}}),
        ),
        MethodCard(
            "sclip",
            "peers:SCLIP",
            "Wang et al., ECCV 2024",
            Protocol(
                datasets={
                    "cityscapes": {"short_side": 560},
                    "coco_stuff": {"short_side": 448},
                    "voc21": {"logit_scale": 65.0},
                    "context60": {"logit_scale": 50.0},
                    "coco_object": {"logit_scale": 50.0},
                }
            ),
        ),
        MethodCard(
            "clearclip",
            "peers:ClearCLIP",
            "Lan et al., ECCV 2024",
            Protocol(
                short_side=448,
                window=448,
                stride=224,
                logit_scale=50.0,
                threshold=0.5,
                datasets={
                    "cityscapes": {"window": 224},
                    "context60": {"threshold": 0.15},
                    "coco_object": {"threshold": 0.4},
                },
            ),
        ),
        MethodCard("naclip", "peers:NACLIP", "Hajimiri et al., WACV 2025"),
        MethodCard(
            "gem",
            "two_streams:GEM",
            "Bousselham et al., CVPR 2024",
            Protocol(short_side=448, window=448, stride=224, logit_scale=100.0, threshold=None, datasets={}),
            blocks=6,
            beyond="six more attentions in each of six blocks",
        ),
        MethodCard(
            "clip-surgery",
            "two_streams:CLIPSurgery",
            "Li et al., Pattern Recognition 2025",
            Protocol(short_side=448, window=448, stride=224, threshold=None, datasets={}),
            blocks=6,
            beyond="a second attention in each of six blocks",
        ),
        MethodCard(
            "cliptrase",
            "peers:CLIPtrase",
            "Shao et al., ECCV 2024",
            Protocol(short_side=224, logit_scale=100.0, threshold=None, datasets={}),
        ),
        MethodCard(
            "sc-clip",
            "sc_clip:SCCLIP",
            "Bai et al., 2024",
            Protocol(
                threshold=0.15,
                datasets={
                    "cityscapes": {"short_side": 560},
                    "voc21": {"logit_scale": 50.0},
                    "coco_object": {"logit_scale": 55.0, "threshold": 0.35},
                },
            ),
            blocks=11,
        ),
        MethodCard(
            "proxyclip",
            "proxyclip:ProxyCLIP",
            "Lan et al., ECCV 2024",
            Protocol(
                window=336,
                threshold=0.2,
                datasets={
                    "cityscapes": {"short_side": 448, "window": 224},
                    "ade20k": {"short_side": 448},
                    "context60": {"threshold": 0.15},
                    "coco_object": {"threshold": 0.25},
                },
            ),
            sees_images=True,
            beyond="a DINO ViT-B/8 on the picture",
        ),
        MethodCard("kk", "rf_clip:RFCLIP", _PAPER, fixed=RefocusConfig(distraction_dims=(), proxy="kk")),
        MethodCard("kk-mean", "rf_clip:RFCLIP", _PAPER, fixed=RefocusConfig(distraction_dims=())),
        MethodCard(RF_CLIP, "rf_clip:RFCLIP", _PAPER, configured=True),
        MethodCard("released", "released:Released", _PAPER, configured=True),
    )
}


def find_method(name: str) -> MethodCard:
    """The card of a method.

    Raises:
        ValueError: there is no method of that name.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
