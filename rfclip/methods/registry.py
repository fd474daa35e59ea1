"""Every method by name: where it comes from, how it is evaluated, and the class that computes it.

Nothing heavy is imported here: a card imports its class when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from rfclip.config import PLAIN, PostName, RefocusConfig, check_post
from rfclip.datasets import DATASETS, check_dataset

if TYPE_CHECKING:
    from rfclip.methods.base import Method
    from rfclip.methods.rule import Rule
    from rfclip.towers import Tower


Resizing = Literal["antialiased", "mmcv", "patches", "square", "crop"]


@dataclass(frozen=True)
class Protocol:
    """How a method sees a picture and decides. Sides are in pixels for a tower trained at 224, and scaled for others.

    The defaults are RF-CLIP's protocol as the paper describes it, which is also the common one.

    Attributes:
        short_side, window, stride: of the resized picture, and of the windows over it; window None: the picture as a
            whole.
        resizing: "antialiased" (bicubic, the short side no less than a window), as "mmcv" does it (8-bit bilinear
            without antialiasing, the long side at most 2048 even if the short one falls below a window), antialiased
            with both sides rounded to whole "patches", or to a "square", its aspect lost, or of the square "crop" at
            its centre, without which no pixel counts.
        padding: a picture shorter than a window is padded with zeros, on both sides, to a multiple of so many pixels or
            of the "patch"; None: what is beyond whole patches is dropped.
        position_offset: added to the sides of grids to which position embeddings are resized: 0.1 in the authors' code.
        imagenet: whether pictures are normalized by ImageNet's mean and deviation in place of the model's own.
        templates: "imagenet" (open_clip's 80), "photo" ("a photo of a cat.") or "scene" (the 80, and five of scenes).
        logit_scale: factor of the cosines before the softmax.
        threshold: class probability below which a pixel is background, in datasets that have such a class.
        post: what happens after a first pass if nothing is said: one of `rfclip.config.POSTS`.
        refined: where PAMR works: on the picture as "resized", or as "given", its own size.
        rule: what else happens to the logits, as "module:class" within `rfclip.methods`.
        options: the rule's constants.
        constants: of formulas, by the name of the method, or of the `post`, that they are tuned for, as it names them.
        datasets: what differs on some datasets, by name.

    Raises:
        ValueError: `datasets` names one that does not exist, or there is no such `post`.
    """

    short_side: int = 336
    window: int | None = 224
    stride: int = 112
    resizing: Resizing = "antialiased"
    padding: int | Literal["patch"] | None = None
    position_offset: float = 0.0
    imagenet: bool = False
    templates: Literal["imagenet", "photo", "scene"] = "imagenet"
    logit_scale: float = 40.0
    threshold: float | None = 0.1
    post: PostName = "none"
    refined: Literal["resized", "given"] = "resized"
    rule: str = "rule:Rule"
    options: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"cityscapes": {"short_side": 560}})

    def __post_init__(self) -> None:
        check_post(self.post)
        for name in self.datasets:
            check_dataset(name)

    def beyond(self) -> str:
        """What differs from the common protocol beside sides, scale and threshold, in words."""
        common, said = Protocol(), []
        for name in ("resizing", "padding", "position_offset", "imagenet", "templates", "post", "refined"):
            value = getattr(self, name)
            if value != getattr(common, name):
                said.append(name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {value}")
        if self.rule != common.rule:
            constants = ", ".join(f"{key} {value:g}" for key, value in self.options.items())
            said.append(f"{self.rule.partition(':')[2]}{f' ({constants})' if constants else ''}")
        return "; ".join(said)

    def tuned(self, name: str, defaults: Mapping[str, float]) -> dict[str, float]:
        """Constants with those that this protocol has for a method or a `post` in place of the defaults."""
        given = self.constants.get(name, {})
        return {key: given.get(key, value) for key, value in defaults.items()}

    def load_rule(self) -> Rule:
        """The rule with its constants."""
        return resolve_name(f"rfclip.methods.{self.rule}")(**self.options)

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
        registers: whether it takes a `RegisterConfig`.
        fixed: the config of a method that is a special case of RF-CLIP.
        sees_images: whether it looks at the pictures as well as their patches.
        cls: whether it looks at a class token.
        beyond: what its formula computes in addition to the tower's blocks, for methods that take notably longer.
    """

    name: str
    target: str
    source: str
    protocol: Protocol = Protocol()
    blocks: int = 1
    configured: bool = False
    registers: bool = False
    fixed: RefocusConfig | None = None
    sees_images: bool = False
    cls: bool = False
    beyond: str = ""

    def load(self) -> type[Method]:
        """The class."""
        return resolve_name(f"rfclip.methods.{self.target}")

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError if a tower does not give what the method needs."""
        if self.configured or self.registers:
            tower.check_refocusable(f"method {self.name!r}")
        blocks = len(tower.blocks)
        if blocks < self.blocks:
            raise ValueError(
                f"method {self.name!r} needs {self.blocks} blocks, and this tower has {blocks}; 'maskclip' needs one"
            )
        if self.cls and not tower.has_cls:
            raise ValueError(
                f"method {self.name!r} looks at a class token, which {tower.title} does not have; 'maskclip' needs none"
            )

    def __call__(self, tower: Tower, config: RefocusConfig | None, backend: str, **options: Any) -> Method:
        """The method on a tower. A config goes with `configured` methods only; options are the class's own."""
        return self.load()(self, tower, self.fixed if config is None else config, backend, **options)


RF_CLIP = "rf-clip"  # the default method
OWN, COMMON = "own", "common"  # protocols: each method's, and RF-CLIP's for all
_AREA: dict[str, Any] = {"rule": "peers:AreaRule", "options": {"share": 0.1}}
_WHOLE_VOC = Protocol(
    resizing="mmcv",
    datasets={"cityscapes": {"short_side": 560}, "voc20": {"window": None}, "voc21": {"window": None}},
)
_GIVEN: Mapping[str, Mapping[str, Any]] = {name: {"refined": "given"} for name in DATASETS}
_ITACLIP_PAPER = "Aydin et al., CVPR Workshops 2025"
_ITACLIP = Protocol(
    stride=28,
    resizing="mmcv",
    post="pamr",
    datasets={  # as with NACLIP, other pictures are refined at the size to which they are resized
        **_GIVEN,
        "cityscapes": {"short_side": 560, "refined": "given"},
        "coco_stuff": {"short_side": 448, "refined": "given"},
        "voc21": {"logit_scale": 60.0, "refined": "given", **_AREA},
        "context60": {"logit_scale": 55.0, "refined": "given"},
        "coco_object": {"logit_scale": 50.0, "refined": "given"},
    },
)
_LESS_UPRIGHT = {"constants": {"itaclip-views": {"upright": 0.7}}}
_RESCLIP = {  # the residue's share, and theta, t and l of the feedback
    name: dict(zip(("share", "confidence", "gain", "agreement"), tuned, strict=True))
    for name, tuned in {
        "voc21": (0.3, 0.5, 2.2, 0.7),
        "context60": (0.3, 0.3, 1.8, 0.7),
        "coco_object": (0.4, 0.11, 1.8, 0.7),
        "voc20": (0.6, 0.1, 2.1, 0.6),
        "context59": (0.4, 0.25, 1.8, 0.7),
        "coco_stuff": (0.4, 0.11, 1.8, 0.7),
        "cityscapes": (0.2, 0.1, 2.1, 0.6),
        "ade20k": (0.3, 0.25, 2.1, 0.7),
    }.items()
}
_SC_CLIP = Protocol(
    resizing="mmcv",
    threshold=0.15,
    datasets={
        "cityscapes": {"short_side": 560},
        "voc21": {"logit_scale": 50.0, **_AREA},
        "coco_object": {"logit_scale": 55.0, "threshold": 0.35},
    },
)
_PAPER = "Target Refocusing via Attention Redistribution, AAAI 2026"


def _tuned(protocol: Protocol, constants: Mapping[str, Any]) -> Protocol:
    """The protocol with constants by data set."""
    datasets = {
        name: {**protocol.datasets.get(name, {}), **({"constants": constants[name]} if name in constants else {})}
        for name in {**protocol.datasets, **constants}
    }
    return replace(protocol, datasets=datasets)


def _adjusted(share: float, shift: float, distance: float) -> dict[str, float]:
    """The constants of `released.AdjustedNames`."""
    return {"share": share, "shift": shift, "distance": distance}


def _fused(cut: float, scale: float, score: float, least: float, stretched: bool = False) -> dict[str, float]:
    """The constants of `cliper.Fused`."""
    return {"scale": scale, "cut": cut, "score": score, "least": least, "stretched": stretched}


METHODS: dict[str, MethodCard] = {
    card.name: card
    for card in (
        MethodCard("clip", "rf_clip:RFCLIP", "Radford et al., ICML 2021", fixed=PLAIN),
        MethodCard(
            "maskclip",
            "peers:MaskCLIP",
            "Zhou et al., ECCV 2022",
            Protocol(
                short_side=512,
                window=None,
                resizing="mmcv",
                padding="patch",
                imagenet=True,
                templates="scene",
                logit_scale=100.0,
                threshold=None,
                datasets={"context59": {"short_side": 520}},
            ),
        ),
        MethodCard(
            "sclip",
            "peers:SCLIP",
            "Wang et al., ECCV 2024",
            Protocol(
                resizing="mmcv",
                datasets={
                    "cityscapes": {"short_side": 560},
                    "coco_stuff": {"short_side": 448},
                    "voc21": {"logit_scale": 65.0, **_AREA},
                    "context60": {"logit_scale": 50.0},
                    "coco_object": {"logit_scale": 50.0},
                },
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
                resizing="mmcv",
                padding="patch",
                logit_scale=50.0,
                threshold=0.5,
                datasets={
                    "cityscapes": {"window": 224},
                    "context60": {"threshold": 0.15},
                    "coco_object": {"threshold": 0.4},
                },
            ),
        ),
        MethodCard(
            "naclip",
            "peers:NACLIP",
            "Hajimiri et al., WACV 2025",
            Protocol(
                resizing="mmcv",
                post="pamr",
                datasets={  # any picture at its own size would take gigabytes
                    **_GIVEN,
                    "cityscapes": {"short_side": 560, "refined": "given"},
                    "voc20": {"window": None, "refined": "given", "rule": "peers:AtOnce"},
                    "voc21": {"window": None, "refined": "given", "rule": "peers:AtOnce"},
                },
            ),
        ),
        MethodCard(
            "gem",
            "two_streams:GEM",
            "Bousselham et al., CVPR 2024",
            Protocol(
                short_side=448,
                window=None,
                resizing="square",
                templates="photo",
                logit_scale=1.0,
                threshold=None,
                rule="two_streams:MinMax",
                datasets={},
            ),
            blocks=6,
            beyond="six more attentions in each of six blocks",
        ),
        MethodCard(
            "clip-surgery",
            "two_streams:CLIPSurgery",
            "Li et al., Pattern Recognition 2025",
            Protocol(
                short_side=512,
                window=None,
                resizing="square",
                templates="scene",
                logit_scale=1.0,
                threshold=None,
                rule="two_streams:FeatureSurgery",
                datasets={},
            ),
            blocks=6,
            beyond="a second attention in each of six blocks",
        ),
        MethodCard(
            "cliptrase",
            "cliptrase:CLIPtrase",
            "Shao et al., ECCV 2024",
            Protocol(
                short_side=224,
                window=None,
                resizing="crop",
                logit_scale=100.0,
                threshold=None,
                rule="cliptrase:Regions",
                datasets={"voc20": {"rule": "cliptrase:RegionsByPicture"}},
            ),
            cls=True,
        ),
        MethodCard(
            "resclip-rcs",
            "resclip:ResidualCrossAttention",
            "Yang et al., CVPR 2025",
            _tuned(_WHOLE_VOC, {name: {"resclip-rcs": {"share": of["share"]}} for name, of in _RESCLIP.items()}),
            blocks=9,
            beyond="four more attentions in the last block",
        ),
        MethodCard(
            "resclip",
            "resclip:ResidualCrossAttention",
            "Yang et al., CVPR 2025",
            _tuned(replace(_WHOLE_VOC, post="resclip"), {name: {"resclip": of} for name, of in _RESCLIP.items()}),
            blocks=9,
            beyond="four more attentions in the last block, and, by its own protocol, a second pass through the tower",
        ),
        MethodCard(
            "pearl",
            "pearl:PEARL",
            "Pei et al., CVPR 2026",
            _tuned(
                replace(_WHOLE_VOC, post="pearl"),
                {
                    "ade20k": {"pearl": {"share": 0.3}},
                    "cityscapes": {"pearl": {"share": 0.3, "cells": 224}},
                },
            ),
        ),
        MethodCard(
            "itaclip",
            "itaclip:ITACLIP",
            _ITACLIP_PAPER,
            _ITACLIP,
            blocks=11,
            beyond="seven more attentions in the last block",
        ),
        MethodCard(
            "itaclip-views",
            "itaclip:ITACLIPViews",
            _ITACLIP_PAPER,
            replace(
                _ITACLIP,
                rule="itaclip:MeanOfViews",
                datasets={
                    **_ITACLIP.datasets,
                    "cityscapes": {**_ITACLIP.datasets["cityscapes"], **_LESS_UPRIGHT},
                    "voc21": {**_ITACLIP.datasets["voc21"], "rule": "itaclip:MeanOfViewsByArea", **_LESS_UPRIGHT},
                },
            ),
            blocks=11,
            sees_images=True,
            beyond="five passes, and seven more attentions in the last block of each",
        ),
        MethodCard(
            "cliper",
            "cliper:CLIPer",
            "Sun et al., ICCV 2025",
            Protocol(
                window=None,
                resizing="patches",
                logit_scale=1.0,
                threshold=None,
                rule="cliper:Fused",
                options=_fused(0.2, 100, 0.3, 0.3),
                datasets={
                    "voc21": {"options": _fused(0.1, 100, 0.7, 0.6, True)},
                    "voc20": {"options": _fused(0.1, 100, 0, 1e-3)},
                    "context60": {"options": _fused(0.2, 100, 0.45, 0.45)},
                    "coco_object": {"options": _fused(0.2, 50, 0.3, 0.3)},
                    "coco_stuff": {"options": _fused(0.2, 50, 0.1, 0.1)},
                    "cityscapes": {"short_side": 560, "options": _fused(0.35, 100, 0, 1e-4)},
                },
            ),
            blocks=2,
            beyond="the attention matrices of all blocks",
        ),
        MethodCard("sc-clip", "sc_clip:SCCLIP", "Bai et al., 2024", _SC_CLIP, blocks=11, cls=True),
        MethodCard(
            "sfp",
            "sfp:SFP",
            "Jin et al., ICCV 2025",
            replace(_SC_CLIP, datasets={**_SC_CLIP.datasets, "ade20k": {"short_side": 384}}),
            blocks=11,
            cls=True,
        ),
        MethodCard(
            "proxyclip",
            "proxyclip:ProxyCLIP",
            "Lan et al., ECCV 2024",
            Protocol(
                window=336,
                resizing="mmcv",
                padding=56,
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
        MethodCard("registers", "registers:Registers", "Jiang et al., NeurIPS 2025", registers=True),
        MethodCard("kk", "rf_clip:RFCLIP", _PAPER, fixed=RefocusConfig(distraction_dims=(), proxy="kk")),
        MethodCard("kk-mean", "rf_clip:RFCLIP", _PAPER, fixed=RefocusConfig(distraction_dims=())),
        MethodCard(RF_CLIP, "rf_clip:RFCLIP", _PAPER, configured=True),
        MethodCard(
            "released",
            "released:Released",
            _PAPER,
            Protocol(
                resizing="mmcv",
                position_offset=0.1,
                threshold=None,
                refined="given",
                rule="released:AdjustedNames",
                options=_adjusted(0.25, 0.03, 0.10),
                datasets={
                    "voc21": {"window": None, "threshold": 0.1, "options": _adjusted(0.10, 0.03, 0.10)},
                    "voc20": {"options": _adjusted(0.40, 0.02, 0.10)},
                    "context60": {"threshold": 0.1, "options": _adjusted(0.25, 0.04, 0.09)},
                    "context59": {"options": _adjusted(0.25, 0.04, 0.09)},
                    "coco_object": {"threshold": 0.1, "options": _adjusted(0.25, 0.01, 0.10)},
                    "coco_stuff": {"options": _adjusted(0.20, 0.02, 0.02)},
                    "cityscapes": {
                        "short_side": 560,
                        "rule": "released:AdjustedNamesByWindow",
                        "options": _adjusted(0.10, 0.03, 0.14),
                    },
                    "ade20k": {"options": _adjusted(0.30, 0.05, 0.06)},
                },
            ),
            configured=True,
        ),
    )
}


def find_protocol(name: str, method: str) -> Protocol:
    """The protocol called "own" (the method's), "common" (RF-CLIP's), or by the name of another method whose it is.

    Args:
        name: with a dataset behind a colon, "own:voc21", as it is there, whatever is segmented.
        method: whose own protocol is meant.

    Raises:
        ValueError: there is no such protocol, or dataset.
    """
    whose, colon, dataset = name.partition(":")
    known = {COMMON: Protocol(), OWN: find_method(method).protocol} | {each: METHODS[each].protocol for each in METHODS}
    if whose not in known:
        raise ValueError(f"protocol {name!r}: expected {OWN!r}, {COMMON!r}, or one of {', '.join(METHODS)}")
    return replace(known[whose].on(dataset), datasets={}) if colon else known[whose]


def find_method(name: str) -> MethodCard:
    """The card of a method.

    Raises:
        ValueError: there is no method of that name.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
