"""What may happen to the logits of a picture after the windows, whatever the method: PEARL's propagation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.ops.numerics import computing_dtype, matmul
from rfclip.ops.reference import BAND

GRID = 80  # cells along a side, about
STEPS = 25  # of conjugate gradients, which do not converge
EDGES = 5.0
TEMPERATURE = 0.5
SURE = 0.05  # the least confidence


def propagate(logits: Tensor, image: Tensor, text: Tensor, size: tuple[int, int], cells: float = GRID) -> Tensor:
    """PEARL's propagation (Pei et al., CVPR 2026): logits that neighbours of one colour and one meaning share.

    Logits and picture are resized to `size` and averaged over rectangles, of max(1, round(side / cells)) pixels
    along each axis.
    There, with p = softmax of the logits over names and g_c = (softmax(t t^T / 0.5)[c, c] + 10) / 11,

        agree(a, b) = sum_c g_c p_ac p_bc
        conf_a = max(max_c p_ac, 0.05)^2 (1 + agree(a, a))
        w_ab = min(1, exp(-5 |I_a - I_b| / mean |I_a - I_b|) (1 + agree(a, b)))

    for neighbours a, b, I being the grey picture and the mean that of a direction in this picture (in the batch in the
    authors' code) [D]. From u = logits, 25 steps of conjugate gradients, of one length for all names, go towards the
    solution of (diag(conf) + Laplacian(w)) u = conf * logits.

    Args:
        logits: of names, cosines without a scale, [K, h, w].
        image: the normalized picture [3, h', w']; grey is the mean of its channels [D].
        text: the normalized text embeddings [K, C].
        size: height and width of the picture as given.
        cells: about how many along a side; 80, and on Cityscapes 224 in the authors' code.

    Returns:
        u [K, H', W'] of the cells in the computing dtype of `logits`, to be resized bilinearly.
    """
    dtype = computing_dtype(logits)
    grey = image.to(dtype).mean(dim=0, keepdim=True)
    logits, grey = (_cells(planes, size, cells) for planes in (logits.to(dtype), grey))
    p = logits.softmax(dim=0)
    same = (matmul(text.to(dtype), text.mT) / TEMPERATURE).softmax(dim=-1).diagonal()
    g = ((same + 10) / 11)[:, None, None]
    conf = p.amax(dim=0).clamp(min=SURE) ** 2 * (1 + (g * p * p).sum(dim=0))
    down = _weights(grey, g, p)
    across = _weights(grey.mT, g, p.mT).mT

    def system(u: Tensor) -> Tensor:
        return conf * u - _flow(down, u) - _flow(across.mT, u.mT).mT

    u = logits
    r = conf * logits - system(u)
    step, length = r, (r * r).sum()
    for _ in range(STEPS):
        towards = system(step)
        along = _ratio(length, (step * towards).sum())
        u, r = u + along * step, r - along * towards
        before, length = length, (r * r).sum()
        step = r + _ratio(length, before) * step
    return u


def _cells(x: Tensor, size: tuple[int, int], cells: float) -> Tensor:
    """Planes [K, h, w] resized bilinearly to a size and averaged over cells."""
    return _averaged(_averaged(x, size[1], cells).mT, size[0], cells).mT.contiguous()


def _averaged(x: Tensor, length: int, cells: float) -> Tensor:
    """The last axis of x [K, h, w] resized to a length and averaged over cells, some rows at a time."""
    cell = max(1, round(length / cells))
    parts = [
        F.avg_pool1d(F.interpolate(rows[None], size=length, mode="linear", align_corners=False), cell)[0]
        for rows in x.flatten(0, 1).split(max(1, BAND // length))
    ]
    return torch.cat(parts).unflatten(0, x.shape[:2])


def _weights(grey: Tensor, g: Tensor, p: Tensor) -> Tensor:
    """w between each cell and the one below it, [H - 1, W]."""
    change = grey[0].diff(dim=0).abs()
    near = torch.exp(-EDGES * change / change.mean().clamp(min=torch.finfo(change.dtype).tiny))
    return (near * (1 + (g * p[:, 1:] * p[:, :-1]).sum(dim=0))).clamp(max=1)


def _flow(weight: Tensor, u: Tensor) -> Tensor:
    """What flows into each cell of u [K, H, W] from above and below: minus that part of the Laplacian."""
    return F.pad(weight * u.diff(dim=1), (0, 0, 1, 1)).diff(dim=1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where nothing is left to do."""
    return torch.where(b > 0, a / b, 0)
