"""The graph cut of equation 8 by a filter, in PyTorch: `rfclip_kernels.cut` has the formula and the names.

Vectors are rows, [B, 7, N]. Subtracting their means keeps them orthogonal to 1, and the eigenvectors of their inner
products make K = P orthonormal: the next Y are all of M's Ritz vectors in it.

Rounds are given by the degree of their polynomial.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rfclip.ops.numerics import no_autocast
from rfclip_kernels.cut_constants import DEGREES, FIRST, LEAST, NEW, SHARE, SQUARINGS

ROUNDS, FROM_START = 24 * (7,), (7, 7, 7)  # that resolve y, and those that a start leaves
TOWER_ROUNDS, TOWER_FROM_START = DEGREES, (4,)  # that resolve the mask of the defocused tokens
PRIMES = (2, 3, 5, 7, 11, 13, 17)


def leading_vectors(W: Tensor, start: Tensor | None, rounds: Sequence[int]) -> Tensor:
    """y and six vectors that help the next cut, [B, 7, N].

    Args:
        W: symmetric, [B, N, N], float32 or float64.
        start: vectors [B, R, N] near y and those others, R up to 7; None for none.
        rounds: the degrees of the polynomial, round by round.

    Returns:
        In the dtype of W, all scaled by what makes y of length y^T Deg y = 1, and positive at its largest entry.
    """
    with no_autocast(W.device):
        degree = W.sum(dim=1, keepdim=True)
        inverse = _over(1, degree)
        Y, least = _beginning(W, start), FIRST if start is None else LEAST
        for order in rounds:
            Y, least = _round(W, degree, inverse, Y, least, order), LEAST
        Y = torch.where(degree > 0, _centred(Y, degree), 0)
        y = Y[:, :1]
        length = (degree * y * y).sum(dim=2, keepdim=True).sqrt()
        return Y * _over(y.gather(2, y.abs().argmax(dim=2, keepdim=True)).sign(), length)


def _beginning(W: Tensor, start: Tensor | None) -> Tensor:
    """What is given, and vectors that no eigenvector is orthogonal to, of any length."""
    N = W.shape[1]
    roots = torch.tensor(PRIMES, dtype=W.dtype, device=W.device).sqrt()
    Y = (roots[:, None] * torch.arange(1, N + 1, device=W.device) % 1 - 0.5).expand(W.shape[0], -1, -1)
    if start is None:
        return Y
    R = start.shape[1]
    return torch.cat([N**0.5 * start.to(W.dtype) + 1e-5 * Y[:, :R], Y[:, R:]], dim=1)  # a start may be zeros


def _round(W: Tensor, degree: Tensor, inverse: Tensor, Y: Tensor, least: float, order: int) -> Tensor:
    """The next Y, y first: P is the Chebyshev polynomial of that degree, for eigenvalues from -b/3 to b."""
    Y = _centred(Y, degree)
    Z, weighted = torch.bmm(Y, W) * inverse, Y * degree
    lengths = (weighted * Y).sum(dim=2, keepdim=True)
    quotients = _over((weighted * Z).sum(dim=2, keepdim=True), lengths)
    smallest = torch.where(lengths > 0, quotients, 1).amin(dim=1, keepdim=True)
    bound = torch.maximum(smallest, SHARE * quotients.amax(dim=1, keepdim=True)).clamp(min=least)
    over = 3 / bound * inverse
    before, P = Y, (3 / bound * Z - Y) / 2
    for _ in range(order - 1):
        before, P = P, torch.bmm(P, W) * over - P - before
    P = _centred(P, degree)
    Q, weighted = torch.bmm(P, W) * inverse, P * degree
    C = _ritz_coefficients(torch.bmm(P, weighted.mT), torch.bmm(Q, weighted.mT))
    return torch.bmm(C, Q)


def _centred(Y: Tensor, degree: Tensor) -> Tensor:
    """Y, orthogonal to 1; a product would magnify what rounding leaves."""
    return Y - _over((Y * degree).sum(dim=2, keepdim=True), degree.sum(dim=2, keepdim=True))


def _ritz_coefficients(gram: Tensor, moved: Tensor) -> Tensor:
    """C [B, 7, 7] of the Ritz vectors C K, the leading one first, from K Deg K^T and M K Deg K^T."""
    if torch.compiler.is_compiling():
        return _ritz_coefficients_without_eigh(gram, moved)
    unit = _over(1, gram.diagonal(dim1=1, dim2=2)[:, :, None].sqrt())
    lengths, vectors = torch.linalg.eigh(unit * gram * unit.mT)
    new = (lengths > NEW)[:, :, None]
    T = vectors.mT * torch.where(new, lengths[:, :, None].rsqrt(), 0) * unit.mT
    projected = torch.bmm(torch.bmm(T, moved), T.mT)
    _, ritz = torch.linalg.eigh(projected - 2 * torch.diag_embed((~new[:, :, 0]).to(T.dtype)))  # what is left out: last
    return torch.bmm(ritz.mT.flip(1), T)


def _ritz_coefficients_without_eigh(gram: Tensor, moved: Tensor) -> Tensor:
    """The leading Ritz vector and others of the same space, by operations that exporters know."""
    T = _orthonormal(gram)
    # 1 is added, so that no eigenvalue is negative; what was left out keeps 0.
    power = torch.bmm(torch.bmm(T, moved), T.mT) + torch.diag_embed((T.diagonal(dim1=1, dim2=2) > 0).to(T.dtype))
    for squaring in range(SQUARINGS):
        if squaring % 4 == 0:
            power = power / power.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        power = torch.bmm(power, power)
    largest = power.diagonal(dim1=1, dim2=2).argmax(dim=-1)
    ritz = power.gather(1, largest[:, None, None].expand(-1, 1, power.shape[2]))
    ritz = ritz / ritz.abs().amax(dim=2, keepdim=True).clamp(min=1e-30)
    return torch.cat([torch.bmm(ritz, T), T[:, 1:]], dim=1)


def _orthonormal(gram: Tensor) -> Tensor:
    """T with T gram T^T = 1: Cholesky's factor, inverted. Vectors with nothing new fade out and give 0."""
    unit = _over(1, gram.diagonal(dim1=1, dim2=2)[:, :, None].sqrt())
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    both = torch.cat([unit * gram * unit.mT, identity.expand_as(gram)], dim=2)
    below, factors = torch.ones_like(identity).tril(-1), []
    for i in range(gram.shape[1]):
        row, column, pivot = both[:, i, None], both[:, :, i, None], both[:, i, None, i, None]
        factors.append((pivot / NEW - 1).clamp(0, 1) / pivot.clamp(min=NEW))
        both = both - factors[-1] * below[:, i, None] * column * row
    return torch.cat(factors, dim=1).sqrt() * both[:, :, gram.shape[1] :] * unit.mT


def _over(x: Tensor | int, y: Tensor) -> Tensor:
    """x / y, or 0 where y is not positive."""
    return torch.where(y > 0, x / y, 0)
