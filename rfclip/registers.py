"""Find the register neurons of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfclip.config import RegisterConfig
from rfclip.methods.registers import hidden_width, with_hidden
from rfclip.ops import operations
from rfclip.towers import read_tower

NEURONS = 10  # as in the authors' settings for OpenAI's ViT-B/16
MEDIANS = 2.0  # an outlier's norm, in medians of its picture's patches, where no threshold is given [D]
QUIET, SPARSE = 0.5, 0.5  # a neuron counts if this share of a picture's tokens, or more, has activations below that


@dataclass(frozen=True)
class FoundRegisters:
    """What `find_registers` found.

    Attributes:
        config: the neurons, possibly none, with the threshold given.
        scores: of each neuron of the config, in its order: its mean |activation| on outliers.
        images: how many were looked at.
        with_outliers: how many of them have an outlier and so count.
        outliers: how many tokens are outliers.
        largest: the largest norm of a token, in medians of its image's patches, and as it is.
    """

    config: RegisterConfig
    scores: tuple[float, ...]
    images: int
    with_outliers: int
    outliers: int
    largest: tuple[float, float]

    def report(self) -> str:
        """The outcome in a sentence or two."""
        medians, norm = self.largest
        largest = f"The largest norm of a token is {norm:.1f}, {medians:.2f} times the median of its image's patches."
        if not self.config.neurons:
            none = "has outliers, but no neuron of these blocks is active there" if self.outliers else "has no outliers"
            return f"This checkpoint {none}: registers change nothing here. {largest}"
        pairs = zip(self.scores, self.config.neurons, strict=True)
        named = ", ".join(f"{block}:{unit} ({score:.2f})" for score, (block, unit) in sorted(pairs, reverse=True))
        return (
            f"{self.outliers} outliers in {self.with_outliers} of them. Register neurons, as block:unit, "
            f"with their mean activation on outliers: {named}. {largest}"
        )


@torch.inference_mode()
def find_registers(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    threshold: float | None = None,
    count: int = NEURONS,
    blocks: int | None = None,
) -> FoundRegisters:
    """Find a checkpoint's register neurons: the hidden units that are most active on outliers.

    A token, CLS included, is an outlier if the norm of what leaves the last block exceeds the threshold. A neuron's
    score is its mean |h| over the outliers of an image, averaged over the images that have any; it counts as 0 in an
    image where fewer than half of the tokens have h < 0.5.

    Args:
        model: a CLIP; if it is refocused, its plain blocks are examined all the same.
        images: a batch [B, 3, height, width] normalized as the model expects, or several of them, of any sizes.
        threshold: the norm; None: twice the median over the image's patches [D].
        count: how many neurons to keep, the best.
        blocks: only those of so many first blocks; None: of the first half, which for ViT-B/16 are the authors' six.

    Raises:
        ValueError: there is no image, or an argument is out of range; or as `rfclip.calibrate`.
    """
    tower, ops = read_tower(model), operations("reference")
    tower.check_refocusable("the search for registers")
    blocks = max(1, len(tower.blocks) // 2) if blocks is None else blocks
    if not 1 <= blocks <= len(tower.blocks):
        raise ValueError(f"blocks={blocks}: expected 1 to {len(tower.blocks)}")
    if count < 1:
        raise ValueError(f"count={count}: expected at least 1")
    RegisterConfig((), threshold)  # which checks it
    seen = [_Seen() for _ in range(blocks)]
    watched = [with_hidden(block, each) for block, each in zip(tower.blocks, seen, strict=False)]
    width = max(hidden_width(block) for block in watched)
    total = torch.zeros(blocks, width, dtype=torch.float64)
    looked, counted, outliers, largest = 0, 0, 0, (0.0, 0.0)
    several = isinstance(images, Iterable) and not isinstance(images, Tensor)
    for batch in cast(Iterable[Tensor], images if several else [images]):
        x = tower.embed(tower.patches(batch), ops)
        for block in [*watched, *tower.blocks[blocks:]]:
            x = torch.add(*block.finish(x, F.scaled_dot_product_attention(*block.query_key_value(x)), ops))
        norms = x.float().norm(dim=-1)
        if not norms.isfinite().all():
            raise ValueError("the model's tokens are not finite: its weights or the images hold NaN or infinity")
        looked += len(norms)
        for image, over in enumerate(norms > outlier_norm(norms, threshold, tower.prefix)):
            own = norms[image]
            largest = max(largest, (float(own.max() / own[tower.prefix :].median()), float(own.max())))
            if not over.any():
                continue
            counted, outliers = counted + 1, outliers + int(over.sum())
            for row, each in zip(total, seen, strict=True):
                h = each.h[image].double()
                sparse = (h < QUIET).double().mean(dim=0) >= SPARSE
                row[: h.shape[1]] += (h[over].abs().mean(dim=0) * sparse).cpu()
    if not looked:
        raise ValueError("no image to find registers on: give at least one")
    values, places = (total / max(1, counted)).flatten().topk(min(count, total.numel()))
    best = sorted((divmod(p, width), s) for p, s in zip(places.tolist(), values.tolist(), strict=True) if s > 0)
    neurons = tuple((block + 1, unit) for (block, unit), _ in best)
    scores = tuple(score for _, score in best)
    return FoundRegisters(RegisterConfig(neurons, threshold), scores, looked, counted, outliers, largest)


def outlier_norm(norms: Tensor, threshold: float | None, prefix: int) -> Tensor:
    """The norm [B, 1] over which a token of each image is an outlier, from those of all tokens [B, T]."""
    if threshold is None:
        return MEDIANS * norms[:, prefix:].median(dim=1, keepdim=True).values
    return torch.full_like(norms[:, :1], threshold)


class _Seen(nn.Module):
    """Keeps the hidden activations [B, T, e] that passed last."""

    h: Tensor

    def forward(self, h: Tensor) -> Tensor:
        self.h = h
        return h
