"""Peers whose whole difference is the last block's attention, and what their protocols do to labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from rfclip.methods.base import LastBlock, Method, own
from rfclip.methods.rule import Rule
from rfclip.ops import Backend
from rfclip.ops.numerics import computing_dtype
from rfclip.ops.reference import BAND


class MaskCLIP(Method):
    """z = O(v): every patch attends to itself; no residual, no MLP [D, as in ClearCLIP's code].

    Two options of its code, prompt denoising and key smoothing, are off there by default, and not built here.
    """

    def tokens(self, patches: Tensor) -> Tensor:
        _, (_, _, v) = self.last(patches)
        return self.tower.blocks[-1].project(v)[:, self.tower.prefix :]


class SCLIP(Method):
    """u = x[L] + O((SS(q) + SS(k)) v), z = u + MLP(ln_2(u)): rows sum to 2, and the residual stays."""

    crosses = True

    def last_block(self, patches: Tensor) -> LastBlock:
        x, (q, k, v) = self.last(patches)
        return LastBlock([own(q), own(k)], v, partial(self.finished, x))


class ClearCLIP(Method):
    """z = O(SS(q) v), without residual and MLP."""

    crosses = True

    def last_block(self, patches: Tensor) -> LastBlock:
        _, (q, _, v) = self.last(patches)
        return LastBlock([own(q)], v, self.tower.blocks[-1].project)


class NACLIP(Method):
    """z = O(softmax(k k^T / sqrt(D) + G) v), G[i, j] = exp(-|i - j|^2 / (2 * 5^2)) by distance on the patch grid."""

    def last_block(self, patches: Tensor) -> LastBlock:
        _, (_, k, v) = self.last(patches)
        return LastBlock([own(k, bias=distance_bias(k, patches.shape[2:]))], v, self.tower.blocks[-1].project)


def distance_bias(k: Tensor, grid: Sequence[int]) -> Tensor:
    """G by the offset of two patches on a grid, as `self_attention` takes it, for keys k."""
    down, right = (torch.arange(1 - side, side, dtype=computing_dtype(k), device=k.device) for side in grid)
    return torch.exp(-(down[:, None].square() + right.square()) / (2 * 5**2))


class AreaRule(Rule):
    """Small classes are removed: SCLIP and SC-CLIP on VOC21.

    At every pixel one class is the most probable. Of the pixels that are not class 0's, the background's, a class that
    has no more than `share` is removed: its probability becomes 0. Each pixel then gets the most probable class that is
    left, to whose probability the threshold applies.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def labels(
        self,
        ops: Backend,
        logits: Tensor,
        size: tuple[int, int],
        scale: float,
        class_of_name: Tensor,
        threshold: float | None,
    ) -> Tensor:
        found = ops.upsample_argmax(logits, size, scale, class_of_name, None)
        classes = int(class_of_name.max()) + 1
        areas = found.flatten().bincount(minlength=classes).double()
        removed = areas <= self.share * areas[1:].sum()
        removed[0] = False
        band = max(1, BAND // (len(logits) * size[1]))
        for top in range(0, size[0], band):
            rows = range(top, min(top + band, size[0]))
            probability = ops.class_probabilities(logits, size, scale, class_of_name, classes, rows)
            best, label = probability.masked_fill(removed[:, None, None], 0).max(dim=0)  # the first of equals
            found[top : rows.stop] = label if threshold is None else label.where(best >= threshold, -1)
        return found


class AtOnce(Rule):
    """Logits go from the patches of a whole picture to its own pixels in one step: NACLIP on VOC20 and VOC21."""

    at_once: ClassVar[bool] = True
