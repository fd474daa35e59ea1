"""The steps that cost time in `rfclip.reference`, same names and signatures, fast on a CPU and able to run anywhere.

What differs from the reference is the order of the work, not its result (relative error at most 1e-5 in float32):

- No matrix over all heads and tokens is kept: rows go by in tiles that stay in the cache.
- Refocused attention on a CPU is a flash attention to the keys of each group, merged by their log-sum-exp.
- The graph cut takes fifteen Lanczos steps from the last block's vector, as the kernel in `rfclip_kernels.cut` does.
- Where the similarity of keys is needed anyway, its softmax also feeds the proxy attention (`heads`).

Half-precision inputs are computed in float32, but in flash attention, which multiplies in their own dtype.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.reference import computing_dtype, matmul, no_autocast, offset_bias
from rfclip_kernels.checks import (
    cut_inputs,
    proxy_inputs,
    query_key,
    refocused_inputs,
    self_inputs,
    similarity_inputs,
)
from rfclip_kernels.krylov import BREAKDOWN, STEPS, start_of_cut

__all__ = [
    "fiedler_vector",
    "key_similarity",
    "proxy_attention",
    "received_attention",
    "refocused_attention",
    "self_attention",
]

TILE = 1 << 18  # numbers in a tile of attention over all heads: 1 MB in float32


def received_attention(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """`rfclip.reference.received_attention`, the mean taken tile by tile."""
    sizes, scale = query_key(scale, q=q, k=k)
    out = q.new_zeros((sizes["B"], sizes["N"]), dtype=computing_dtype(q))
    for b, _, A in _patch_tiles(q, k, scale):
        out[b] += A.sum(dim=(0, 1))
    return out / (sizes["H"] * sizes["N"])


def key_similarity(
    k: Tensor,
    running: Tensor | None = None,
    count: int = 0,
    *,
    scale: float | None = None,
    inplace: bool = False,
    heads: Tensor | None = None,
) -> Tensor:
    """`rfclip.reference.key_similarity`, tile by tile."""
    sizes, scale = similarity_inputs(k, running, count, scale, computing_dtype(k), heads)
    if running is None:
        running = k.new_empty((sizes["B"], sizes["N"], sizes["N"]), dtype=computing_dtype(k))
    elif not inplace:
        running = running.clone()
    for b, rows, A in _patch_tiles(k, k, scale):
        mean = A.mean(dim=0)
        if count:
            running[b, rows].lerp_(mean, 1 / (count + 1))
        else:
            running[b, rows] = mean
        if heads is not None:
            heads[b, :, rows].add_(A)
    return running


def fiedler_vector(similarity: Tensor, start: Tensor | None = None) -> Tensor:
    """`rfclip.reference.fiedler_vector` by fifteen Lanczos steps, as `rfclip_kernels.fiedler_vector` takes them.

    It has no gradient: what it is for, the mask of defocused tokens, has none either.
    """
    sizes = cut_inputs(similarity, start)
    S = similarity.detach().to(computing_dtype(similarity))
    if sizes["N"] == 1:
        return torch.zeros_like(S[..., 0])
    W2, inv_sqrt, known, w = start_of_cut(S, start)
    basis = S.new_empty((sizes["B"], STEPS + 1, sizes["N"]))
    basis[:, 0] = known
    diagonal, beside = (S.new_empty((sizes["B"], STEPS)) for _ in range(2))
    with no_autocast(S.device):
        for b in range(sizes["B"]):  # products of a matrix and a vector are quicker than their batch
            _lanczos(W2[b], inv_sqrt[b] / 2**0.5, w[b], basis[b], diagonal[b], beside[b])
    # A remainder of nothing but rounding ends a basis: what follows is set apart, with the eigenvalue -2, below all.
    sound = (beside > BREAKDOWN).cumprod(dim=-1)
    projected = torch.diag_embed(torch.where(sound > 0, diagonal, -2)) + torch.diag_embed((sound * beside)[:, 1:], -1)
    _, ritz = torch.linalg.eigh(projected)  # reads the lower triangle
    y = inv_sqrt * matmul(ritz[:, None, :, -1], basis[:, 1:])[:, 0]
    largest = y.abs().argmax(dim=-1, keepdim=True)
    return y * y.gather(-1, largest).sign()


def _lanczos(W: Tensor, scale: Tensor, w: Tensor, basis: Tensor, diagonal: Tensor, beside: Tensor) -> None:
    """Fill `basis` [., N] from its second vector on, and M = scale W scale in it: its diagonal, and what is beside."""
    for step, (alpha, length) in enumerate(zip(diagonal, beside, strict=True)):
        before = basis[: step + 1]
        for _ in range(2):  # twice is enough
            w = torch.addmv(w, before.T, before @ w, alpha=-1)
        torch.linalg.vector_norm(w, out=length)
        fresh = torch.div(w, length.clamp(min=BREAKDOWN), out=basis[step + 1])
        w = scale * (W @ (scale * fresh))
        torch.dot(w, fresh, out=alpha)


def refocused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distraction: Tensor,
    target: Tensor,
    beta: float,
    *,
    scale: float | None = None,
) -> Tensor:
    """`rfclip.reference.refocused_attention`, group by group."""
    scale = refocused_inputs(q, k, v, distraction, target, beta, scale)
    B, H, T, D = q.shape
    dis = F.pad(distraction, (1, 0))
    tgt = F.pad(target, (T - target.shape[1], 0)) & ~dis
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)  # a log-sum-exp has no gradient
    if q.device.type == "cpu" and not differentiated and not torch.compiler.is_compiling():
        return _merged_groups(q, k, v, dis, tgt, beta, scale)
    out = v.new_empty((B, T, H, D)).transpose(1, 2)
    sets = torch.stack([dis, tgt], dim=1).to(computing_dtype(q))  # [B, 2, T]
    for b, rows, A in _tiles(q, k, scale):
        taken, given = matmul(A, sets[b].T).unbind(dim=-1)  # the masses of S and T, [H, rows]
        changed = (given > 0) & (torch.arange(rows.start, rows.stop, device=q.device) > 0)
        # A' = A (1 - beta 1_S + beta taken / given 1_T)
        factors = torch.stack([torch.ones_like(taken), -taken / given], dim=-1)
        factors = torch.where(changed[..., None], -beta * factors, 0)
        out[b, :, rows] = matmul(A * (1 + matmul(factors, sets[b])), v[b]).to(v.dtype)
    return out


def self_attention(u: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """`rfclip.reference.self_attention` as a flash attention, the bias as its mask."""
    scale = self_inputs(u, v, bias, scale)
    mask = None if bias is None else offset_bias(bias).to(u.dtype)
    return F.scaled_dot_product_attention(u, u, v, attn_mask=mask, scale=scale)


def proxy_attention(
    keys: Tensor, v: Tensor, *, scale: float | None = None, heads: Tensor | None = None, count: int = 0
) -> Tensor:
    """`rfclip.reference.proxy_attention` as a flash attention a layer, and one product for the layers in `heads`."""
    scale = proxy_inputs(keys, v, scale, heads, count)
    without_cls = torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, 1:]], dim=2)
    dtype = computing_dtype(v)
    out = 0 if heads is None else matmul(heads, v[:, :, 1:])
    for k in keys:
        out = out + F.scaled_dot_product_attention(k, k, without_cls, scale=scale)[:, :, 1:].to(dtype)
    return (out / (len(keys) + count)).to(v.dtype)


def _merged_groups(q: Tensor, k: Tensor, v: Tensor, dis: Tensor, tgt: Tensor, beta: float, scale: float) -> Tensor:
    """Refocused attention as a flash attention to the keys of each group, masks [B, T], of one image after another."""
    B, H, T, D = q.shape
    out = v.new_empty((B, T, H, D)).transpose(1, 2)
    q = q if q.stride(-1) == 1 else q.contiguous()  # the operator below reads anything else wrongly
    for b in range(B):
        image = slice(b, b + 1)
        groups = [mask.nonzero()[:, 0] for mask in (dis[b], tgt[b], ~(dis[b] | tgt[b]))]  # S, T, R
        sizes = [len(group) for group in groups]
        if not sizes[0] or not sizes[1]:
            out[image] = F.scaled_dot_product_attention(q[image], k[image], v[image], scale=scale)
            continue
        order = torch.cat(groups)
        keys, values = (tensor[image].index_select(2, order).split(sizes, dim=2) for tensor in (k, v))
        found = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[image], key, value, scale=scale)
            for key, value in zip(keys, values, strict=True)
            if key.shape[2]
        ]
        mass = torch.softmax(torch.stack([lse for _, lse in found]), dim=0)  # [groups, 1, H, T]
        moved = torch.where(mass[1] > 0, beta * mass[0], 0)
        moved[..., 0] = 0  # the row of CLS
        shares = [mass[0] - moved, mass[1] + moved, *mass[2:]]
        out[image] = sum(share[..., None] * of_group for share, (of_group, _) in zip(shares, found, strict=True))
    return out


def _tiles(q: Tensor, k: Tensor, scale: float, first: int = 0) -> Iterator[tuple[int, slice, Tensor]]:
    """Image, rows from `first` on, and their A = softmax(q k^T * scale), [H, rows, T] in the computing dtype."""
    B, H, T, _ = q.shape
    size = max(32, TILE // (H * T))
    for b in range(B):
        key = k[b].mT.to(computing_dtype(k)) * scale  # [H, D, T]
        for start in range(first, T, size):
            rows = slice(start, min(start + size, T))
            yield b, rows, torch.softmax(matmul(q[b, :, rows], key), dim=-1)


def _patch_tiles(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[int, slice, Tensor]]:
    """`_tiles` without the row and the column of CLS; rows count patches."""
    for b, rows, A in _tiles(q, k, scale, first=1):
        yield b, slice(rows.start - 1, rows.stop - 1), A[:, :, 1:]
