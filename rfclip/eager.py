"""The steps that cost time in `rfclip.reference`, same names and signatures, fast on a CPU and able to run anywhere.

What differs from the reference is the order of the work, not its result (relative error at most 1e-5 in float32):

- No matrix over all heads and tokens is kept: rows go by in tiles that stay in the cache.
- Refocused attention on a CPU is the attention to the keys of each group, merged by the groups' shares; where the
  tokens are many, a flash attention, and the shares follow from its log-sum-exp.
- The graph cut takes fifteen Lanczos steps from the last block's vector, as the kernel in `rfclip_kernels.cut` does.
- Where the similarity of keys is needed anyway, its softmax also feeds the proxy attention (`heads`).
- PAMR's neighbours are views of a padded picture, and it goes by class by class, so that a class stays in the cache.

Half-precision inputs are computed in float32, but in flash attention, which multiplies in their own dtype.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip import reference
from rfclip.reference import attention_sets, computing_dtype, matmul, move_attention, no_autocast, offset_bias
from rfclip_kernels.checks import (
    cut_inputs,
    pamr_inputs,
    proxy_inputs,
    query_key,
    refocused_inputs,
    scores_inputs,
    self_inputs,
    similarity_inputs,
)
from rfclip_kernels.krylov import BREAKDOWN, STEPS, start_of_cut

__all__ = [
    "distraction_mask",
    "fiedler_vector",
    "key_similarity",
    "pamr",
    "proxy_attention",
    "received_attention",
    "refocused_attention",
    "self_attention",
]

TILE = 1 << 19  # numbers in a tile of attention over all heads: 2 MB in float32
FLASH_TOKENS = 256  # from here on a flash attention to each group is quicker than one matrix of attention


def distraction_mask(x: Tensor, dims: Sequence[int], threshold: float | None = None, *, shifted: bool = True) -> Tensor:
    """`rfclip.reference.distraction_mask` with sum_k f[k] = sum_k x[k] - d min_k x[k], without f."""
    dims, threshold = scores_inputs(x, dims, threshold)
    if not dims or not shifted:
        return reference.distraction_mask(x, dims, threshold, shifted=shifted)
    x = x.to(computing_dtype(x))
    least = x.amin(dim=-1)
    total = x.sum(dim=-1) - x.shape[-1] * least
    most = torch.stack([x[..., j] for j in dims]).amax(dim=0) - least
    return torch.where(total == 0, 0, most / total) > threshold


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
    M = W2.mul_(inv_sqrt[:, :, None] / 2).mul_(inv_sqrt[:, None])
    basis = S.new_zeros((sizes["B"], STEPS + 1, sizes["N"]))
    basis[:, 0] = known
    diagonal, beside = (S.new_empty((sizes["B"], STEPS)) for _ in range(2))
    with no_autocast(S.device):
        for image in zip(M, w, basis, diagonal, beside, strict=True):  # matrix times vector is quicker than its batch
            _lanczos(*image)
    # A remainder of nothing but rounding ends a basis: what follows is set apart, with the eigenvalue -2, below all.
    sound = (beside > BREAKDOWN).cumprod(dim=-1)
    projected = torch.diag_embed(torch.where(sound > 0, diagonal, -2)) + torch.diag_embed((sound * beside)[:, 1:], -1)
    _, ritz = torch.linalg.eigh(projected)  # reads the lower triangle
    y = inv_sqrt * matmul(ritz[:, None, :, -1], basis[:, 1:])[:, 0]
    largest = y.abs().argmax(dim=-1, keepdim=True)
    return y * y.gather(-1, largest).sign()


def _lanczos(M: Tensor, w: Tensor, basis: Tensor, diagonal: Tensor, beside: Tensor) -> None:
    """Fill `basis` [., N], zero after its first vector, and M in it: its diagonal, and what is beside."""
    for fresh, alpha, length in zip(basis[1:], diagonal, beside, strict=True):
        for _ in range(2):  # twice is enough
            w = w.addmv(basis.T, basis.mv(w), alpha=-1)
        torch.linalg.vector_norm(w, out=length)
        torch.div(w, length.clamp(min=BREAKDOWN), out=fresh)
        w = M.mv(fresh)
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
    dis, tgt = attention_sets(distraction, target, q.shape[2])
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)  # a log-sum-exp has no gradient
    out = torch.empty_like(v.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    if q.device.type == "cpu" and not differentiated and not torch.compiler.is_compiling():
        for b in range(len(q)):
            image = slice(b, b + 1)
            out[image] = _by_groups(q[image], k[image], v[image], dis[b], tgt[b], beta, scale)
        return out
    for b, rows, A in _tiles(q, k, scale):
        moved = move_attention(A[None], dis[b : b + 1], tgt[b : b + 1], beta, rows.start)[0]
        out[b, :, rows] = matmul(moved, v[b]).to(v.dtype)
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


def pamr(image: Tensor, mask: Tensor, iterations: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """`rfclip.reference.pamr`, one class after another."""
    dilations = pamr_inputs(image, mask, iterations, dilations)
    dtype = torch.promote_types(computing_dtype(image), computing_dtype(mask))
    weight = _pamr_weights(image.to(dtype), dilations)
    refined = []
    for out in mask.to(dtype, copy=True).split(1, dim=1):
        for _ in range(iterations):
            before, out = out, torch.zeros_like(out)
            for w, near in zip(weight, _neighbours(before, dilations), strict=True):
                out.addcmul_(w, near)
        refined.append(out)
    return torch.cat(refined, dim=1).to(mask.dtype)


def _pamr_weights(x: Tensor, dilations: list[int]) -> Tensor:
    """The shares of a pixel's neighbours [P, B, 1, H, W], from a picture [B, CI, H, W]."""
    near, itself = _neighbours(x, dilations), len(dilations)
    count = len(near) + itself
    mean = (sum(near) + itself * x) / count
    variance = sum((n - mean).square() for n in near) + itself * (x - mean).square()
    spread = 1e-8 + 0.1 * (variance / (count - 1)).sqrt()
    return torch.stack([-((x - n).abs() / spread).mean(dim=1, keepdim=True) for n in near]).softmax(dim=0)


def _neighbours(x: Tensor, dilations: list[int]) -> list[Tensor]:
    """Views of x [B, C, H, W], moved to each place around a pixel; the edge repeats beyond the border."""
    reach, (H, W) = max(dilations), x.shape[2:]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    around = [(reach + d * dy, reach + d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    return [padded[:, :, y : y + H, x0 : x0 + W] for y, x0 in around]


def _by_groups(q: Tensor, k: Tensor, v: Tensor, dis: Tensor, tgt: Tensor, beta: float, scale: float) -> Tensor:
    """Refocused attention of one image, its keys in the order S, T, R of the groups; sets [T]."""
    groups = [mask.nonzero()[:, 0] for mask in (dis, tgt, ~(dis | tgt))]
    sizes = [len(group) for group in groups]
    if not sizes[0] or not sizes[1]:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    sizes = [size for size in sizes if size]
    order = torch.cat(groups)
    k, v = (tensor.index_select(2, order) for tensor in (k, v))
    if len(order) < FLASH_TOKENS:
        A = torch.softmax(matmul(q, k.mT.to(computing_dtype(k)) * scale), dim=-1)
        groups = A.split(sizes, dim=-1)[:2]
        mass = [group.sum(dim=-1, keepdim=True) for group in groups]
        for group, before, after in zip(groups, mass, _moved(*mass, beta), strict=True):
            # The quotient by the mass comes first: it is at most 1.
            group.div_(before.where(before > 0, 1)).mul_(after)
        return matmul(A, v)
    q = q if q.stride(-1) == 1 else q.contiguous()  # the operator below reads anything else wrongly
    keys_values = zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outs, log_sum_exp = zip(*(flash(q, key, value, scale=scale) for key, value in keys_values), strict=True)
    taken, given, *rest = torch.softmax(torch.stack(log_sum_exp), dim=0)[..., None]
    shares = [*_moved(taken, given, beta), *rest]
    merged = outs[0] * shares[0]  # in this order the product has the layout of its first factor
    for out, share in zip(outs[1:], shares[1:], strict=True):
        merged.addcmul_(out, share)
    return merged


def _moved(taken: Tensor, given: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The masses of S and T, [1, H, T, 1], after S has given to T: equations 9 to 12."""
    omega = (beta * taken).where(given > 0, 0)
    omega[:, :, 0] = 0  # the row of CLS
    return taken - omega, given + omega


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
