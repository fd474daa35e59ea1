"""Attention from the cosines of patch features, as several methods use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.ops.numerics import computing_dtype, matmul


def cosines(x: Tensor) -> Tensor:
    """[B, N, N] in the computing dtype, of x [B, N, d]."""
    unit = F.normalize(x.to(computing_dtype(x)), dim=-1)
    return matmul(unit, unit.mT)


def positive_softmax(logits: Tensor) -> Tensor:
    """Softmax over the entries [B, N, N] that are not negative, and the diagonal, so that no row is empty [D]."""
    kept = (logits >= 0) | torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.where(kept, -torch.inf).softmax(dim=-1)
