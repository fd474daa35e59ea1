"""SFP: SC-CLIP with outliers found by the class token's attention, and another attention in the last block."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rfclip.methods.base import own
from rfclip.methods.sc_clip import SCCLIP
from rfclip.ops.numerics import computing_dtype, matmul
from rfclip.towers import Block

OUTLIERS = 10  # the most of them


class SFP(SCCLIP):
    """SC-CLIP, except for these steps:

    1. With A the attention of block L-1, averaged over heads, outliers are the patches j with 1.5 A[CLS, j] > A[j, j],
       the ten with the largest A[CLS, j] if there are more. As in SC-CLIP, one without an inlier beside it stays [D].
    3. P = softmax(3 (C - mean C)) over what is not negative, C being W1 without entries under 0.4.
    4. G(x, c) = O((softmax(q q^T / sqrt(D)) + softmax(k k^T / sqrt(D)) + P) v / 3) + 0.3 c; of Y, O(P v) + 0.3 c.
    """

    cut_first: ClassVar[bool] = True

    def _outliers(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        prefix = self.tower.prefix
        received, kept = _attention_of_cls(q, k, prefix), _attention_to_itself(q, k, prefix)
        candidates = 1.5 * received > kept
        _, first = received.where(candidates, -1).topk(torch.sym_min(OUTLIERS, x.shape[1]))
        return torch.zeros_like(candidates).scatter(1, first, True) & candidates

    def _guided(self, last: Block, x: Tensor, cls: Tensor, P: Tensor) -> Tensor:
        q, k, v = last.query_key_value(x)
        heads = self.gather([own(q, 1 / 3), own(k, 1 / 3)], v, prefix=0) + (matmul(P[:, None], v) / 3).to(v.dtype)
        return last.project(heads) + 0.3 * cls

    def _guided_sum(self, last: Block, x: Tensor, cls: Tensor, P: Tensor) -> Tensor:
        _, v = last.key_value(last.ln_1(x))
        return last.project(matmul(P[:, None], v).to(v.dtype)) + 0.3 * cls


def _attention_of_cls(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """A[CLS, patches] of q and k [B, H, T, D], averaged over heads, [B, N] in the computing dtype."""
    logits = matmul(q[:, :, :1], k.mT) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1)[:, :, 0, prefix:].mean(dim=1)


def _attention_to_itself(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """The diagonal of A on the patches, likewise: of every row, only the sum is needed, one head at a time."""
    q, scale = q[:, :, prefix:], q.shape[-1] ** -0.5
    total = torch.zeros(q.shape[0], q.shape[2], dtype=computing_dtype(q), device=q.device)
    for queries, keys in zip(q.unbind(1), k.unbind(1), strict=True):
        logits = matmul(queries, keys.mT) * scale
        total = total + (logits.diagonal(prefix, 1, 2) - logits.logsumexp(dim=-1)).exp()
    return total / q.shape[1]
