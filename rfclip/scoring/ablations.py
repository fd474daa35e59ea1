"""The paper's ablations as configs: what each table and figure varies, one change at a time.

Labels are the paper's. Which blocks table 7 compares is not published: this project takes thirds of the tower [D].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rfclip.config import RefocusConfig

ABLATIONS = ("1", "4", "5", "6", "7", "tau", "beta")
TAUS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def check_ablation(ablation: str) -> None:
    """Raise ValueError unless it is one of `ABLATIONS`."""
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation {ablation!r}: expected one of {', '.join(ABLATIONS)}")


def variants(ablation: str, config: RefocusConfig, layers: int) -> dict[str, RefocusConfig]:
    """The configs of a table ("1", "4" to "7") or of a sweep of figure 6 ("tau", "beta"), by the paper's labels.

    Args:
        ablation: one of `ABLATIONS`.
        config: RF-CLIP in full.
        layers: the tower's number of blocks.

    Raises:
        ValueError: there is no such ablation, or config has no distraction dimensions, so that all would be the same.
    """
    check_ablation(ablation)
    if not config.distraction_dims and ablation != "7":
        raise ValueError(
            f"ablation {ablation}: this config has no distraction dimensions, and nothing to refocus: all variants "
            "would be the same. Choose a model that has some, or simulate them with --inject-distraction"
        )
    third = layers // 3
    blocks = {
        f"blocks 1 to {third}": tuple(range(1, third + 1)),
        f"blocks {third + 1} to {layers - third}": tuple(range(third + 1, layers - third + 1)),
        f"blocks {layers - third + 1} to {layers}": tuple(range(layers - third + 1, layers + 1)),
    }
    # The only legal values where nothing is cut, and where no neighbour is read.
    uncut: dict[str, Any] = {"similarity": "kk-mean", "cut_threshold": "mean"}
    alone: dict[str, Any] = {"neighbourhood": 3}
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "1": {
            "no refocusing": {"distraction_dims": ()},
            "attention masked to -inf": {"embedding": "none", "target": "rest", "beta": 1.0} | uncut | alone,
            "embeddings clamped": {"embedding": "clamp", "beta": 0.0} | alone,
            "mean filter": {"embedding": "mean", "beta": 0.0},
            "median filter": {"embedding": "median", "beta": 0.0},
            "RF-CLIP": {},
        },
        "4": {
            "(I) layer-averaged kk": {"distraction_dims": ()},
            "(II) mean filter, random tokens": {"tokens": "random", "embedding": "mean", "beta": 0.0},
            "(III) mean filter, distraction tokens": {"embedding": "mean", "beta": 0.0},
            "(IV) attention redistribution": {"embedding": "none", "target": "non-distraction"} | uncut | alone,
            "(V) embedding redistribution": {"beta": 0.0},
            "(VI) both": {"target": "non-distraction"} | uncut,
            "(VII) both, defocus localization": {},
        },
        "5": {
            **{f"similarity {name}": {"similarity": name} for name in ("qq", "vv", "kk", "kk-mean")},
            **{f"cut at {name}": {"cut_threshold": name} for name in ("otsu", "mean")},
            **{f"neighbourhood {side} x {side}": {"neighbourhood": side} for side in (3, 5, 7)},
        },
        "6": {
            "to non-distraction": {"target": "non-distraction"} | uncut,
            "to cls": {"target": "cls"} | uncut,
            "to defocused": {},
        },
        "7": {
            **{f"proxy {name}": {"proxy": name} for name in ("qk", "qq", "vv", "kk", "kk-mean")},
            **{name: {"layers": numbers} for name, numbers in (blocks | {"all blocks": None}).items()},
        },
        "tau": {f"tau {value:g} / d": {"tau": value} for value in TAUS},
        "beta": {f"beta {value:g}": {"beta": value} for value in BETAS},
    }
    try:
        return {label: replace(config, **change) for label, change in changes[ablation].items()}
    except ValueError as error:
        raise ValueError(f"ablation {ablation} does not go with this config: {error}") from error
