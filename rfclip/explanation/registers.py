"""Two explanations of distraction side by side: RF-CLIP's distraction tokens, and test-time registers' outliers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rfclip.config import PLAIN, RefocusConfig, RegisterConfig
from rfclip.images import ImageLike, to_rgb
from rfclip.methods import METHODS, RF_CLIP
from rfclip.methods.base import Method
from rfclip.methods.rf_clip import RFCLIP, Observed
from rfclip.ops.numerics import matmul
from rfclip.plugin import checked_config, installed, refocus
from rfclip.registers import outlier_norm
from rfclip.towers import read_tower
from rfclip.towers.preprocess import Preprocess


@dataclass(frozen=True)
class Comparison:
    """A picture's distraction tokens and outliers; N = gh * gw patches.

    Attributes:
        image: the picture as the tower saw it, RGB, resized.
        grid: (gh, gw).
        distraction: bool [N], the patches that RF-CLIP takes for distraction tokens in any block.
        norms: [2, N] float32, the norms of patches at the last block's output, plain and with registers.
        outliers: bool [2, N], the patches whose norm exceeds the threshold, in the same order.
        attention: [3, N] float32, the attention that CLS pays to patches in the last block, averaged over heads: plain,
            with registers, and refocused.
        register: the attention that CLS pays to the register there; 0 without one.
        threshold: the norm, that of the plain tower.
    """

    image: Image.Image
    grid: tuple[int, int]
    distraction: np.ndarray
    norms: np.ndarray
    outliers: np.ndarray
    attention: np.ndarray
    register: float
    threshold: float

    @property
    def overlap(self) -> float | None:
        """Intersection over union of distraction tokens and the plain tower's outliers; None where both are empty."""
        union = (self.distraction | self.outliers[0]).sum()
        return float((self.distraction & self.outliers[0]).sum() / union) if union else None

    def numbers(self) -> dict[str, Any]:
        """Counts, the overlap, and shares of the attention that CLS pays in the last block."""

        def about(tokens: np.ndarray) -> dict[str, Any]:
            paid = dict(zip(("plain", "registers", "refocused"), self.attention, strict=True))
            return {"count": int(tokens.sum()), "cls_attention": {k: float(v[tokens].sum()) for k, v in paid.items()}}

        return {
            "patches": len(self.distraction),
            "threshold": self.threshold,
            "distraction": about(self.distraction),
            "outliers": about(self.outliers[0]),
            "outliers_with_registers": about(self.outliers[1]),
            "overlap": self.overlap,
            "register": {"cls_attention": self.register},
        }

    def to_json(self) -> str:
        """The numbers as a JSON object."""
        return json.dumps(self.numbers(), indent=2) + "\n"


@torch.inference_mode()
def compare_registers(
    model: nn.Module,
    image: ImageLike,
    config: RefocusConfig | None = None,
    registers: RegisterConfig | None = None,
    *,
    short_side: int | None = None,
    backend: str = "auto",
) -> Comparison:
    """Look at one whole picture for what RF-CLIP calls distraction tokens and test-time registers call outliers.

    Args:
        model: as for `rfclip.refocus`, not refocused.
        image: as `rfclip.images.to_rgb` takes it.
        config, registers, backend: as for `rfclip.refocus`.
        short_side: of the picture in the tower, in pixels, rounded to patches; None: as the tower was trained.

    Raises:
        ValueError, RuntimeError: as `rfclip.refocus` and `to_rgb`.
    """
    tower, rgb = read_tower(model), to_rgb(image)
    config, preprocess = checked_config(model, tower, config), Preprocess.of(tower)
    grid, small = preprocess.grid(rgb, short_side), preprocess.resized(rgb, short_side)
    patches = tower.patches(preprocess.normalized(small).to(tower.weight.device)[None])
    with refocus(model, method="registers", registers=registers, backend=backend, cuda_graphs=False):
        present = installed(tower)  # which simulated distraction, too, looks for
        assert present is not None
        threshold = present.registers.threshold  # type: ignore[attr-defined]
        with_register = _last(METHODS["clip"](present.tower, PLAIN, backend), patches)
    refocused = _Located(METHODS[RF_CLIP], tower, config, backend)
    plain, after = _last(METHODS["clip"](tower, PLAIN, backend), patches), _last(refocused, patches)
    limit = float(outlier_norm(plain[0], threshold, tower.prefix))
    N = grid[0] * grid[1]
    norms = np.stack([found[0][0, -N:].cpu().numpy() for found in (plain, with_register)])
    attention = np.stack([found[1][-N:].cpu().numpy() for found in (plain, with_register, after)])
    register = float(with_register[1][tower.prefix : -N].sum())
    distraction = refocused.located[0].cpu().numpy() if refocused.located is not None else np.zeros(N, bool)
    return Comparison(small, grid, distraction, norms, norms > limit, attention, register, limit)


def _last(method: Method, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last block: the norms of the tokens that leave it [1, T], and what CLS attends to in it [T]; float32."""
    x, (q, k, v) = method.last(patches)
    out = method.finished(x, F.scaled_dot_product_attention(q, k, v))
    logits = matmul(q[:, :, :1], k.mT) * q.shape[-1] ** -0.5
    return out.float().norm(dim=-1), logits.softmax(dim=-1).mean(dim=1)[0, 0].float()


class _Located(RFCLIP):
    """RF-CLIP that keeps which patches were distraction tokens in any block, bool [B, N]; None for none so far."""

    located: Tensor | None = None

    def observe(self, seen: Observed) -> None:
        if seen.distraction is not None:
            self.located = seen.distraction if self.located is None else self.located | seen.distraction
