"""The operations that cost time, in fast PyTorch that runs anywhere; the reference runs all others.

What differs from the reference is the order of the work, not its result (relative error at most 1e-5 in float32):

- No matrix over all heads and tokens is kept: rows are processed in tiles that stay in the cache.
- Refocused attention on a CPU is the attention to the keys of each group, merged by the groups' shares; with many
  tokens it is a flash attention whose log-sum-exp gives the shares.
- The graph cut takes fifteen Lanczos steps from the last block's vector.
- The proxy attention of several layers on a CPU sums their matrices, tile by tile, and multiplies by the values once.
- `KeyAverage` keeps the sum over layers of each head's attention, so that the softmax that the similarity needs anyway
  also feeds the proxy attention.
- PAMR's neighbours are views of a padded picture, processed class by class, so that a class stays in the cache.

A compiler or exporter would unroll the tiles and the loops over images, for one size only. It is given the reference's
whole matrices and the graph cut of all images at once instead.

Half-precision inputs are computed in float32, except in flash attention, which multiplies in their own dtype.
"""

from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.ops import key_average, reference
from rfclip.ops.numerics import computing_dtype, matmul, no_autocast
from rfclip.ops.reference import attention_bias, attention_sets, move_attention, over_heads

__all__ = [
    "blend_embeddings",
    "cosine_aggregation",
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
FLASH_TOKENS = 256  # from this many on, a flash attention per group is faster than one matrix of attention
SUMMED_LAYERS = 3  # from this many on, the proxy attention sums matrices; a flash attention each is slower
STEPS = 15  # of Lanczos
BREAKDOWN = 1e-6  # a vector with less than this that is new ends the basis
SQUARINGS = 16  # of the projected matrix, where its leading eigenvector is found by squaring it
HEADS_BUDGET = 128 << 20  # bytes that `KeyAverage` may take for sums over layers of each head's attention


def distraction_mask(x: Tensor, dims: list[int], threshold: float, shifted: bool) -> Tensor:
    """With sum_k f[k] = sum_k x[k] - d min_k x[k], so that f is never stored."""
    if not shifted:
        return reference.distraction_mask(x, dims, threshold, shifted)
    x = x.to(computing_dtype(x))
    least = x.amin(dim=-1)
    total = x.sum(dim=-1) - x.shape[-1] * least
    most = torch.stack([x[..., j] for j in dims]).amax(dim=0) - least
    return torch.where(total == 0, 0, most / total) > threshold


def blend_embeddings(x: Tensor, mask: Tensor, gh: int, gw: int) -> None:
    """In place; only masked tokens and their neighbours are read."""
    if torch.compiler.is_compiling():
        reference.blend_embeddings(x, mask, gh, gw)
        return
    steps = torch.arange(-1, 2, device=x.device)
    for b, chosen in enumerate(mask):
        places = chosen.nonzero()[:, 0]
        if not len(places):
            continue
        row, column = places // gw + steps[:, None, None], places % gw + steps[:, None]
        inside = (row >= 0) & (row < gh) & (column >= 0) & (column < gw)  # [3, 3, places]
        near = torch.where(inside, row * gw + column, places).flatten()
        window = x[b].index_select(0, near).to(computing_dtype(x)).unflatten(0, (9, -1))  # [9, places, d]
        total = window.masked_fill_(~inside.flatten(0, 1)[..., None], 0).sum(dim=0)
        x[b, places] = (0.6 * window[4] + 0.4 / 9 * total).to(x.dtype)


def received_attention(q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    """The mean is taken tile by tile."""
    if torch.compiler.is_compiling():
        return reference.received_attention(q, k, scale, prefix)
    B, H, T, _ = q.shape
    out = q.new_zeros((B, T - prefix), dtype=computing_dtype(q))
    for b, _, A in _patch_tiles(q, k, scale, prefix):
        out[b] += A.sum(dim=(0, 1))
    return out / (H * (T - prefix))


def key_similarity(k: Tensor, running: Tensor, count: int, scale: float, prefix: int) -> None:
    """Tile by tile."""
    if torch.compiler.is_compiling():
        reference.key_similarity(k, running, count, scale, prefix)
    else:
        _add_layer(k, running, count, scale, prefix, None)


class KeyAverage(key_average.KeyAverage):
    """Sums each head's attention over the layers whose similarity is needed, so that `gather` need not recompute it.

    It does so if the sums, [B, H, N, N], fit into `HEADS_BUDGET`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads: Tensor | None = None

    def add(self, k: Tensor) -> None:
        B, H, T, D = k.shape
        N = T - self.prefix
        size = torch.finfo(computing_dtype(k)).bits // 8 * B * H * N * N
        unneeded = not self.gathers or self.count >= self.similar
        if unneeded or torch.compiler.is_compiling() or size > HEADS_BUDGET:
            super().add(k)
            return
        if self._heads is None:
            self._heads = k.new_zeros((B, H, N, N), dtype=computing_dtype(k))
        if self.similarity is None:
            self.similarity = k.new_empty((B, N, N), dtype=computing_dtype(k))
        elif k.requires_grad:
            self.similarity = self.similarity.clone()
        _add_layer(k, self.similarity, self.count, D**-0.5, self.prefix, self._heads)
        self.count += 1

    def gather(self, v: Tensor) -> Tensor:
        if self._heads is None:
            return super().gather(v)
        out = matmul(self._heads, v[:, :, self.prefix :])
        for term in _proxy_terms(self.keys, v, v.shape[-1] ** -0.5, self.prefix):
            out = out + term
        return (out / self.count).to(v.dtype)


def _add_layer(k: Tensor, running: Tensor, count: int, scale: float, prefix: int, heads: Tensor | None) -> None:
    """Add a layer to the running mean, and each head's attention to `heads`, in place."""
    for b, rows, A in _patch_tiles(k, k, scale, prefix):
        mean = A.mean(dim=0)
        if count:
            running[b, rows].lerp_(mean, 1 / (count + 1))
        else:
            running[b, rows] = mean
        if heads is not None:
            heads[b, :, rows].add_(A)


def fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    """By fifteen Lanczos steps.

    It has no gradient: its purpose, the mask of defocused tokens, has none either.
    """
    S = similarity.detach().to(computing_dtype(similarity))
    B, N = S.shape[:2]
    W2, inv_sqrt, known, w = _start_of_cut(S, start)
    M = W2.mul_(inv_sqrt[:, :, None] / 2).mul_(inv_sqrt[:, None])
    with no_autocast(S.device):
        u = _ritz_vectors_at_once(M, w, known) if torch.compiler.is_compiling() else _ritz_vectors(M, w, known)
    y = inv_sqrt * u
    largest = y.abs().argmax(dim=-1, keepdim=True)
    return y * y.gather(-1, largest).sign()


def _start_of_cut(S: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        w = F.normalize(start.to(S.dtype) * root, dim=-1) + 1e-3 * (12 / S.shape[1]) ** 0.5 * w
    return W2, torch.where(degree > 0, degree.rsqrt(), 0), F.normalize(root, dim=-1), w.expand_as(root).contiguous()


def _ritz_vectors(M: Tensor, w: Tensor, known: Tensor) -> Tensor:
    """The vector [B, N] of the Krylov space of M [B, N, N] and w, orthogonal to `known`, that is nearest the cut's."""
    B, N = w.shape
    basis = M.new_zeros((B, STEPS + 1, N))
    basis[:, 0] = known
    diagonal, beside = (M.new_empty((B, STEPS)) for _ in range(2))
    for image in zip(M, w, basis, diagonal, beside, strict=True):
        _lanczos(*image)  # a single matrix-vector product beats the batched one
    # A remainder that is nothing but rounding ends the basis: what follows gets the eigenvalue -2, below all others.
    sound = (beside > BREAKDOWN).cumprod(dim=-1)
    projected = torch.diag_embed(torch.where(sound > 0, diagonal, -2)) + torch.diag_embed((sound * beside)[:, 1:], -1)
    _, ritz = torch.linalg.eigh(projected)  # reads the lower triangle
    return (ritz[:, None, :, -1] @ basis[:, 1:])[:, 0]


def _lanczos(M: Tensor, w: Tensor, basis: Tensor, diagonal: Tensor, beside: Tensor) -> None:
    """Fill `basis` [., N], which is zero after its first vector, and M in it: the diagonal and the one beside it."""
    for fresh, alpha, length in zip(basis[1:], diagonal, beside, strict=True):
        for _ in range(2):  # twice is enough
            w = w.addmv(basis.T, basis.mv(w), alpha=-1)
        torch.linalg.vector_norm(w, out=length)
        torch.div(w, length.clamp(min=BREAKDOWN), out=fresh)
        w = M.mv(fresh)
        torch.dot(w, fresh, out=alpha)


def _ritz_vectors_at_once(M: Tensor, w: Tensor, known: Tensor) -> Tensor:
    """The same for all images at once, by operations that every exporter knows; ONNX has no `eigh`."""
    basis, w = known[:, None], w[..., None]
    for _ in range(STEPS):
        for _ in range(2):
            w = torch.baddbmm(w, basis.mT, torch.bmm(basis, w), alpha=-1)
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        fresh = torch.where(length > BREAKDOWN, w / length, 0)  # once it is 0, so are all that follow
        basis = torch.cat([basis, fresh.mT], dim=1)
        w = torch.bmm(M, fresh)
    basis = basis[:, 1:]
    # M + 2 has no negative eigenvalue: squaring it in the basis leaves the eigenvector of its largest.
    power = torch.bmm(basis, torch.bmm(M, basis.mT) + 2 * basis.mT)
    for _ in range(SQUARINGS):
        power = power / power.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        power = torch.bmm(power, power)
    largest = power.diagonal(dim1=1, dim2=2).argmax(dim=-1)
    ritz = power.gather(1, largest[:, None, None].expand(-1, 1, STEPS))
    return torch.bmm(F.normalize(ritz, dim=-1), basis)[:, 0]


def refocused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distraction: Tensor,
    target: Tensor,
    beta: float,
    scale: float,
    prefix: int,
    order: Tensor | None,
) -> Tensor:
    """Group by group."""
    if torch.compiler.is_compiling():
        return reference.refocused_attention(q, k, v, distraction, target, beta, scale, prefix, order)
    dis, tgt = attention_sets(distraction, target, prefix)
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)  # a log-sum-exp has no gradient
    out = torch.empty_like(v.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    if q.device.type == "cpu" and not differentiated:
        for b in range(len(q)):
            image = slice(b, b + 1)
            out[image] = _by_groups(q[image], k[image], v[image], dis[b], tgt[b], beta, scale, prefix)
        return out
    for b, rows, A in _tiles(q, k, scale):
        moved = move_attention(A[None], dis[b : b + 1], tgt[b : b + 1], beta, prefix, rows.start)[0]
        out[b, :, rows] = matmul(moved, v[b]).to(v.dtype)
    return out


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    prefix: int,
    factor: float,
    out: Tensor | None,
) -> Tensor:
    """A flash attention with the bias as its mask."""
    mask = None if bias is None else attention_bias(bias, prefix).to(q.dtype)
    if isinstance(scale, Tensor):
        q, scale = (q * over_heads(scale, q)).to(q.dtype), 1.0
    gathered = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if out is not None:
        return out.add_(gathered, alpha=factor)
    return gathered if factor == 1 else gathered * factor


def proxy_attention(keys: Tensor, v: Tensor, scale: float, prefix: int, normalizers: Tensor | None) -> Tensor:
    """A flash attention per layer, or else one product with the values for all layers."""
    differentiated = torch.is_grad_enabled() and (keys.requires_grad or v.requires_grad)
    at_once = len(keys) >= SUMMED_LAYERS and v.device.type == "cpu" and not differentiated
    if at_once and not torch.compiler.is_compiling():
        return _proxy_at_once(keys, v, scale, prefix)
    out = reduce(torch.add, _proxy_terms(keys, v, scale, prefix))
    return (out / len(keys)).to(v.dtype)


def _proxy_at_once(keys: Tensor, v: Tensor, scale: float, prefix: int) -> Tensor:
    """Sum the layers' matrices in tiles of a few heads, or of a few rows of one head, always in the same memory."""
    L, B, H, T, D = keys.shape
    group = min(H, max(1, TILE // 2 // T**2))
    size = min(T - prefix, max(32, TILE // 2 // (group * T)))
    tiles = v.new_empty((2, group, size, T), dtype=computing_dtype(v))
    out = v.new_empty((B, T - prefix, H, D)).transpose(1, 2)
    for b, h, start in product(range(B), range(0, H, group), range(prefix, T, size)):
        heads, rows = slice(h, h + group), slice(start, start + size)
        total, A = tiles[:, : H - h, : T - start]
        total.zero_()
        with no_autocast(v.device):
            for k in keys[:, b, heads].to(total.dtype):
                torch.matmul(k[:, rows], k.mT * scale, out=A)
                total += torch.softmax(A, dim=-1, out=A)
        out[b, heads, start - prefix : start - prefix + size] = matmul(total[..., prefix:], v[b, heads, prefix:]) / L
    return out


def _proxy_terms(keys: Iterable[Tensor], v: Tensor, scale: float, prefix: int) -> Iterator[Tensor]:
    """Each layer's share of the sum that `proxy_attention` averages, [B, H, N, D] in the computing dtype."""
    patches_only = torch.cat([torch.zeros_like(v[:, :, :prefix]), v[:, :, prefix:]], dim=2)
    for k in keys:
        gathered = F.scaled_dot_product_attention(k, k, patches_only, scale=scale)
        yield gathered[:, :, prefix:].to(computing_dtype(v))


def pamr(image: Tensor, mask: Tensor, iterations: int, dilations: list[int]) -> Tensor:
    """One class after another."""
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
    """The weights of a pixel's neighbours [P, B, 1, H, W], from a picture [B, CI, H, W]."""
    near, itself = _neighbours(x, dilations), len(dilations)
    count = len(near) + itself
    mean = (sum(near) + itself * x) / count
    variance = sum((n - mean).square() for n in near) + itself * (x - mean).square()
    spread = 1e-8 + 0.1 * (variance / (count - 1)).sqrt()
    return torch.stack([-((x - n).abs() / spread).mean(dim=1, keepdim=True) for n in near]).softmax(dim=0)


def _neighbours(x: Tensor, dilations: list[int]) -> list[Tensor]:
    """Views of x [B, C, H, W], shifted to each place around a pixel; beyond the border the edge repeats."""
    reach, (H, W) = max(dilations), x.shape[2:]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    around = [(reach + d * dy, reach + d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    return [padded[:, :, y : y + H, x0 : x0 + W] for y, x0 in around]


def _by_groups(
    q: Tensor, k: Tensor, v: Tensor, dis: Tensor, tgt: Tensor, beta: float, scale: float, prefix: int
) -> Tensor:
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
        mass = groups[0].sum(dim=-1, keepdim=True), groups[1].sum(dim=-1, keepdim=True)
        for group, before, after in zip(groups, mass, _after_giving(*mass, beta, prefix), strict=True):
            # The quotient by the mass comes first: it is at most 1.
            group.div_(before.where(before > 0, 1)).mul_(after)
        return matmul(A, v)
    q = q if q.stride(-1) == 1 else q.contiguous()  # the operator below reads anything else wrongly
    keys_values = zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outs, log_sum_exp = zip(*(flash(q, key, value, scale=scale) for key, value in keys_values), strict=True)
    taken, given, *rest = torch.softmax(torch.stack(log_sum_exp), dim=0)[..., None]
    shares = [*_after_giving(taken, given, beta, prefix), *rest]
    merged = outs[0] * shares[0]  # in this order, so that the product has the layout of its first factor
    for out, share in zip(outs[1:], shares[1:], strict=True):
        merged.addcmul_(out, share)
    return merged


def _after_giving(taken: Tensor, given: Tensor, beta: float, prefix: int) -> tuple[Tensor, Tensor]:
    """The masses of S and T, [1, H, T, 1], after S has given to T: equations 9 to 12."""
    omega = (beta * taken).where(given > 0, 0)
    omega[:, :, :prefix] = 0
    return taken - omega, given + omega


def cosine_aggregation(guide: Tensor, x: Tensor, cut: float | Tensor, gain: float | None) -> Tensor:
    """Tile by tile."""
    if torch.compiler.is_compiling():
        return reference.cosine_aggregation(guide, x, cut, gain)
    unit = F.normalize(guide.to(computing_dtype(guide)), dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = max(32, TILE // x.shape[1])
    for b, start in product(range(len(x)), range(0, x.shape[1], size)):
        rows = slice(start, start + size)
        weight = matmul(unit[b, rows], unit[b].T)
        kept = weight >= (cut[b] if isinstance(cut, Tensor) else cut)
        if gain is None:
            weight = weight.where(kept, 0)
        else:
            kept.diagonal(start).fill_(True)
            weight = (gain * weight).masked_fill_(~kept, -torch.inf).softmax(dim=-1)
        out[b, rows] = matmul(weight, x[b]).to(x.dtype)
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


def _patch_tiles(q: Tensor, k: Tensor, scale: float, prefix: int) -> Iterator[tuple[int, slice, Tensor]]:
    """`_tiles` without the rows and columns of the prefix; rows count patches."""
    for b, rows, A in _tiles(q, k, scale, first=prefix):
        yield b, slice(rows.start - prefix, rows.stop - prefix), A[:, :, prefix:]
