"""Find the distraction dimensions of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfclip.config import RefocusConfig
from rfclip.ops import operations
from rfclip.towers import read_tower

MAX_DIMS = 8  # a calibration keeps at most this many dimensions [D]


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        dims: the distraction dimensions, largest mean weight first; possibly none.
        profile: mean weight w of every dimension, float32 [d]; the uniform share is 1 / d.
        threshold: 5 / d, which a dimension must exceed.
    """

    dims: tuple[int, ...]
    profile: Tensor
    threshold: float

    def config(self) -> RefocusConfig:
        """The paper's defaults with these dimensions."""
        return RefocusConfig(distraction_dims=self.dims)

    def report(self) -> str:
        """The outcome in a sentence or two, with the largest mean weights in units of the uniform share."""
        width = len(self.profile)
        weights, dims = self.profile.topk(min(10, width))
        peaks = ", ".join(f"{d} ({w * width:.2f})" for d, w in zip(dims.tolist(), weights.tolist(), strict=True))
        largest = f"Largest mean weights, in units of 1/{width}: {peaks}."
        if self.dims:
            return f"Distraction dimensions: {', '.join(map(str, self.dims))}. {largest}"
        return (
            "This checkpoint has no distraction dimensions: no mean weight exceeds 5 / d. RF-CLIP refocuses nothing "
            f"here and differs from plain CLIP only by its layer-averaged proxy attention. {largest}"
        )


@torch.inference_mode()
def calibrate(model: nn.Module, images: Tensor | Iterable[Tensor]) -> Calibration:
    """Find a checkpoint's distraction dimensions: the peaks of w, averaged over tokens, blocks and images [P fig. 3].

    The peaks are the dimensions whose mean weight exceeds 5 / d, at most 8, largest first [D].

    Args:
        model: a CLIP; if it is refocused, its plain blocks are examined all the same.
        images: a batch [B, 3, height, width] normalized as the model expects, or several of them, of any sizes.

    Raises:
        ValueError: there is no image, the images have the wrong shape or are not finite, or the tower is of another
            kind.
    """
    tower, ops = read_tower(model), operations("reference")
    tower.check_refocusable("calibration")
    total, tokens = torch.zeros(tower.width, dtype=torch.float64), 0
    several = isinstance(images, Iterable) and not isinstance(images, Tensor)
    for batch in cast(Iterable[Tensor], images if several else [images]):
        x = tower.embed(tower.patches(batch), ops)
        for block in tower.blocks:
            weights = ops.dimension_weights(x[:, tower.prefix :])
            total += weights.sum(dim=(0, 1), dtype=torch.float64).cpu()
            tokens += weights.shape[0] * weights.shape[1]
            x = torch.add(*block.finish(x, F.scaled_dot_product_attention(*block.query_key_value(x)), ops))
    if not tokens:
        raise ValueError("no image to calibrate on: give at least one")
    profile = (total / tokens).float()
    if not profile.isfinite().all():
        raise ValueError("the model's tokens are not finite: its weights or the images hold NaN or infinity")
    threshold, _ = RefocusConfig(distraction_dims=()).thresholds(tower.width, tokens)
    largest = profile.argsort(descending=True)[:MAX_DIMS]
    return Calibration(tuple(d for d in largest.tolist() if profile[d] > threshold), profile, threshold)
