"""PEARL: the last block's queries are turned towards its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from rfclip.methods.base import LastBlock, Method, Sweep
from rfclip.ops.numerics import computing_dtype, matmul

STEPS = 5  # of Newton and Schulz; the exact polar factor is another method
EPSILON = 1e-6


class PEARL(Method):
    """z = O(softmax(q' k^T / sqrt(D)) v), q' = q R^T + 0.08 (k - k0), over all T tokens; no residual, no MLP.

    Per head, q0 and k0 are the means of queries and keys over patches, weighted by ||q_i||, and R is what five steps of
    Newton and Schulz make of C (C^T C)^(-1/2), where C = (k - k0)^T (q - q0). Rows of logits are free up to a constant,
    so that this is the paper's softmax of q (k R)^T + 0.08 (k - k0) (k - k0)^T. On ADE20K and Cityscapes, its protocol
    has 0.3 in place of 0.08, and on all the propagation of `rfclip.methods.post`, as the authors' runs do; alone, their
    code has that off.
    """

    defaults = {"share": 0.08}  # noqa: RUF012  a mapping that nobody changes

    def last_block(self, patches: Tensor) -> LastBlock:
        _, (q, k, v) = self.last(patches)
        prefix, dtype = self.tower.prefix, computing_dtype(q)
        wide_q, wide_k = q.to(dtype), k.to(dtype)
        weight = wide_q.norm(dim=-1, keepdim=True)
        weight[:, :, :prefix] = 0
        weight /= weight.sum(dim=2, keepdim=True) + EPSILON
        keys = wide_k - (weight * wide_k).sum(dim=2, keepdim=True)
        R = _aligned(matmul(keys.mT, wide_q - (weight * wide_q).sum(dim=2, keepdim=True)))
        turned = (matmul(wide_q, R.mT) + self.constants["share"] * keys).to(q.dtype)
        return LastBlock([Sweep(turned, k)], v, self.tower.blocks[-1].project)


def _aligned(C: Tensor) -> Tensor:
    """R of C [B, H, D, D]."""
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    Y = matmul(C.mT, C)
    size = Y.flatten(2).norm(dim=-1)[..., None, None].clamp(min=torch.finfo(C.dtype).tiny)
    Y, Z = Y / size + EPSILON * eye, eye.expand_as(Y)
    for _ in range(STEPS):
        V = (3 * eye - matmul(Z, Y)) / 2
        Y, Z = matmul(Y, V), matmul(V, Z)
    return matmul(C, Z) / size.sqrt()
