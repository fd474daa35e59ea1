"""The start of the graph cut's Lanczos steps, shared by every backend that takes them: equation 8 of the paper.

M = Deg^-1/2 W Deg^-1/2,  W = (S + S^T) / 2,  Deg = diag(W 1);  the eigenvector of its largest eigenvalue is Deg^1/2 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 15
WIDTH, DEPTH = 3, 5  # vectors that are multiplied at once, and how often in a round
ROUNDS, WARM_ROUNDS = 5, 3  # without a start, and with one
RESTART = 5  # squarings of the projected matrix that the next round's start takes
BREAKDOWN = 1e-5  # a vector with less than this that is new ends the basis
SQUARINGS = 16  # of the projected matrix, where its leading eigenvector is found by squaring it


def ripple(N: int) -> float:
    """How much of the vector that no eigenvector is orthogonal to, of length about sqrt(N / 12), a given start gets."""
    return 1e-3 * (12 / N) ** 0.5


def start_of_cut(S: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the steps need of S [B, N, N], in its dtype, and of a start [B, N] near y, if there is one.

    Returns:
        2 W [B, N, N], contiguous; Deg^-1/2 [B, N], 0 for a token without any similarity; the known eigenvector of M,
        normalized, [B, N]; the vector to start from [B, N], contiguous.
    """
    W2 = (S + S.mT).contiguous()
    degree = W2.sum(dim=-1) / 2
    root = degree.sqrt()
    # A vector that no eigenvector is orthogonal to: for the first block, and a little of it beside a given start.
    w = (torch.arange(1, S.shape[1] + 1, device=S.device, dtype=S.dtype) * 0.6180339887) % 1 - 0.5  # about sqrt(N / 12)
    if start is not None:
        w = F.normalize(start.to(S.dtype) * root, dim=-1) + ripple(S.shape[1]) * w
    return W2, torch.where(degree > 0, degree.rsqrt(), 0), F.normalize(root, dim=-1), w.expand_as(root).contiguous()
