"""The operations that cost time, in fast PyTorch that runs anywhere; the reference runs all others.

What differs from the reference is the order of the work, not its result (relative error at most 1e-5 in float32):

- No matrix over all heads and tokens is kept: rows are processed in tiles that stay in the caches of the threads.
- Refocused attention on a CPU is the attention to the keys of each group, merged by the groups' shares; with many
  tokens it is a flash attention whose log-sum-exp gives the shares.
- The graph cut filters the last block's vectors, as the kernels do.
- The proxy attention of several layers on a CPU sums their matrices, tile by tile, and multiplies by the values once.
- `KeyAverage` keeps the sum over layers of each head's attention, so that the softmax that the similarity needs anyway
  also feeds the proxy attention.
- QuickGELU is PyTorch's SiLU of 1.702 x, and no further temporaries are made: SiLU is one pass over the numbers.
- PAMR's neighbours are views of a padded picture, processed class by class, so that a class stays in the cache.

A compiler or exporter would unroll the tiles and the loops over images, for one size only. It is given the reference's
whole matrices and the graph cut of all images at once instead.

Half-precision inputs are computed in float32, except in flash attention, which multiplies in their own dtype.
"""

import math
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfclip.ops import cut, key_average, reference
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
    "quick_gelu",
    "received_attention",
    "refocused_attention",
    "self_attention",
]

TILE = 1 << 19  # numbers in a tile of attention, 2 MB in float32, of as many heads as fit, but one or more a thread
ROWS = 320  # in a tile of long ones, at most: products of fewer are slower, even in the cache
VECTOR = 16  # float32 in 64 bytes
FLASH_TOKENS = 400  # from this many on, a flash attention per group is faster than one matrix of attention
SUMMED_LAYERS = 3  # from this many on, the proxy attention sums matrices; a flash attention each is slower
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


def quick_gelu(x: Tensor, inplace: bool) -> Tensor:
    """silu(1.702 x) / 1.702."""
    if torch.compiler.is_compiling() or x.requires_grad:
        return reference.quick_gelu(x, inplace)
    if x.dtype != computing_dtype(x):
        values = quick_gelu(x.to(computing_dtype(x)), True)
        return x.copy_(values) if inplace else values.to(x.dtype).contiguous()
    values = x.mul_(1.702) if inplace else x.mul(1.702).contiguous()
    return F.silu(values, inplace=True).mul_(1 / 1.702)


def quick_gelu_mlp(x: Tensor, first: nn.Linear, last: nn.Linear) -> Tensor:
    """last(QuickGELU(first(x))) of x [..., T, d], with the factors of silu(1.702 x) / 1.702 in the products."""
    hidden = torch.addmm(first.bias, x.flatten(0, -2), first.weight.T, beta=1.702, alpha=1.702)
    out = torch.addmm(last.bias, F.silu(hidden, inplace=True), last.weight.T, alpha=1 / 1.702)
    return out.unflatten(0, x.shape[:-1])


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
    for b, _, _, A in _tiles(q, k, scale, prefix):
        out[b] += A.sum(dim=(0, 1))
    return out / (H * (T - prefix))


def key_similarity(k: Tensor, running: Tensor, count: int, scale: float, prefix: int) -> None:
    """Tile by tile."""
    if torch.compiler.is_compiling():
        reference.key_similarity(k, running, count, scale, prefix)
        return
    running.mul_(count / (count + 1)) if count else running.zero_()
    for b, _, rows, A in _tiles(k, k, scale, prefix):
        # Head by head a CPU is quicker; elsewhere each would be a launch, and with gradients a node.
        summed = A if A.device.type == "cpu" and not A.requires_grad else A.sum(dim=0, keepdim=True)
        for head in summed:
            running[b, rows].add_(head, alpha=1 / (k.shape[1] * (count + 1)))


class KeyAverage(key_average.KeyAverage):
    """Sums each head's attention over the layers whose similarity is needed, so that `gather` need not recompute it.

    It does so if the sums, [B, H, N, N], fit into `HEADS_BUDGET`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads: Tensor | None = None
        self._vectors: Tensor | None = None

    def add(self, k: Tensor) -> None:
        B, H, T, D = k.shape
        N = T - self.prefix
        size = torch.finfo(computing_dtype(k)).bits // 8 * B * H * N * N
        unneeded = not self.gathers or self.count >= self.similar
        if unneeded or torch.compiler.is_compiling() or size > HEADS_BUDGET:
            super().add(k)
            return
        first = self._heads is None
        if self._heads is None:
            self._heads = k.new_empty((B, H, N, N), dtype=computing_dtype(k))
        for b, heads, rows, A in _tiles(k, k, D**-0.5, self.prefix):
            place = self._heads[b, heads, rows]
            place.copy_(A) if first else place.add_(A)
        self.count += 1

    def cut(self, distraction: Tensor, threshold: str) -> key_average.Cut:
        rounds = cut.TOWER_ROUNDS if self._vectors is None else cut.TOWER_FROM_START
        self._vectors = cut.leading_vectors(_affinity(self.similarity), self._vectors, rounds)
        y = self._vectors[:, 0]
        return key_average.Cut(y, self.ops.defocus_mask(y, distraction, threshold=threshold), None)

    @property
    def similarity(self) -> Tensor:
        if self._heads is not None:
            return self._heads.mean(dim=1).div_(min(self.count, self.similar))
        assert self._similarity is not None  # what super() has; a compiler does not know its properties
        return self._similarity

    def gather(self, v: Tensor) -> Tensor:
        if self._heads is None:
            return super().gather(v)
        out = matmul(self._heads, v[:, :, self.prefix :])
        for term in _proxy_terms(self.keys, v, v.shape[-1] ** -0.5, self.prefix):
            out = out + term
        return (out / self.count).to(v.dtype)


def fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    """By 24 rounds of the filter in `rfclip.ops.cut`, or three from a start.

    It has no gradient: its purpose, the mask of defocused tokens, has none either.
    """
    first = None if start is None else start[:, None]
    rounds = cut.ROUNDS if start is None else cut.FROM_START
    return cut.leading_vectors(_affinity(similarity), first, rounds)[:, 0].contiguous()


def _affinity(similarity: Tensor) -> Tensor:
    """W, without a gradient."""
    S = similarity.detach().to(computing_dtype(similarity))
    return (S + S.mT).div_(2)


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
        B, H, T, _ = q.shape
        memory = q.new_empty(H * T * T, dtype=computing_dtype(q)) if T < FLASH_TOKENS else None
        for b in range(B):
            image = slice(b, b + 1)
            out[image] = _by_groups(q[image], k[image], v[image], dis[b], tgt[b], beta, scale, prefix, memory)
        return out
    for b, heads, rows, A in _tiles(q, k, scale):
        moved = move_attention(A[None], dis[b : b + 1], tgt[b : b + 1], beta, prefix, rows.start)[0]
        out[b, heads, rows] = matmul(moved, v[b, heads]).to(v.dtype)
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
    """Sum the layers' matrices tile by tile."""
    L, B, H, T, D = keys.shape
    out = v.new_empty((B, T - prefix, H, D)).transpose(1, 2)
    total, memory = (_tile_memory(v) for _ in range(2))
    for b in range(B):
        k = keys[:, b].to(computing_dtype(v))  # [L, H, T, D]
        for heads, rows in _parts(H, T, prefix):
            queries, others = k[:, heads, rows], k[:, heads].mT
            summed, place = (_part(each, *queries.shape[1:3], T) for each in (total, memory))
            _attention(queries[0], others[0], scale, summed)
            for layer in zip(queries[1:], others[1:], strict=True):
                summed += _attention(*layer, scale, place)
            after = slice(rows.start - prefix, rows.stop - prefix)
            out[b, heads, after] = matmul(summed[..., prefix:], v[b, heads, prefix:]) / L
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dis: Tensor,
    tgt: Tensor,
    beta: float,
    scale: float,
    prefix: int,
    memory: Tensor | None,
) -> Tensor:
    """Refocused attention of one image, its keys in the order S, T, R of the groups; sets [T].

    One matrix of attention in given memory, or a flash attention for each group if there is none.
    """
    groups = [mask.nonzero()[:, 0] for mask in (dis, tgt, ~(dis | tgt))]
    sizes = [len(group) for group in groups]
    if not sizes[0] or not sizes[1]:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if memory is not None:
        k, v = (tensor.index_select(2, torch.cat(groups)) for tensor in (k, v))
        queries, keys = (tensor[0].to(memory.dtype) for tensor in (q, k))
        A = _attention(queries, keys.mT, scale, memory.view(*queries.shape[:2], -1))
        parts = A.split(sizes, dim=-1)[:2]
        mass = parts[0].sum(dim=-1, keepdim=True), parts[1].sum(dim=-1, keepdim=True)
        for part, before, after in zip(parts, mass, _after_giving(*mass, beta, prefix), strict=True):
            # The quotient by the mass comes first: it is at most 1.
            part.div_(before.where(before > 0, 1)).mul_(after)
        return matmul(A, v)
    q = q if q.stride(-1) == 1 else q.contiguous()  # the operator below reads anything else wrongly
    outs, log_sum_exp = zip(*(_attend_to(group, q, k, v, scale) for group in groups if len(group)), strict=True)
    taken, given, *rest = torch.softmax(torch.stack(log_sum_exp), dim=0)[..., None]
    shares = [*_after_giving(taken, given, beta, prefix), *rest]
    merged = outs[0] * shares[0]  # in this order, so that the product has the layout of its first factor
    for out, share in zip(outs[1:], shares[1:], strict=True):
        merged.addcmul_(out, share)
    return merged


def _attend_to(group: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention to some keys [B, H, T, D], and its log-sum-exp [B, H, T].

    Their number is rounded up to whole vectors, which it is faster with; the mask keeps out what is added.
    """
    more = (0, -len(group) % VECTOR)
    places, mask = F.pad(group, more), F.pad(q.new_zeros(len(group)), more, value=-torch.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q,
        k.index_select(2, places),
        v.index_select(2, places),
        scale=scale,
        attn_mask=mask.expand(1, 1, q.shape[2], -1),
    )


def _after_giving(taken: Tensor, given: Tensor, beta: float, prefix: int) -> tuple[Tensor, Tensor]:
    """The masses of S and T, [1, H, T, 1], after S has given to T: equations 9 to 12."""
    omega = (beta * taken).where(given > 0, 0)
    omega[..., :prefix, :] = 0
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


def _tiles(q: Tensor, k: Tensor, scale: float, first: int = 0) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Image, heads, rows, and their A = softmax(q k^T * scale), [heads, rows, columns]; both counted from `first` on.

    A is in the computing dtype, and good until the next, which takes its memory unless a gradient is recorded.
    """
    B, H, T, _ = q.shape
    dtype, recorded = computing_dtype(k), torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    memory, out = None if recorded else _tile_memory(q), None
    group, size = _tile_sides(H, T)
    for b in range(B):
        queries, keys = q[b, :, first:].to(dtype), k[b].mT.to(dtype)  # [H, rows, D], [H, D, T]
        parts = [part for heads in queries.split(group) for part in heads.split(size, dim=1)]  # quicker than slices
        for part, (heads, rows) in zip(parts, _parts(H, T, first), strict=True):
            if memory is not None and (out is None or out.shape[:2] != part.shape[:2]):
                out = _part(memory, *part.shape[:2], T)
            if rows.start == first:
                others = keys[heads]
            A = _attention(part, others, scale, out)[..., first:]
            yield b, heads, slice(rows.start - first, rows.stop - first), A


def _parts(H: int, T: int, first: int) -> list[tuple[slice, slice]]:
    """Heads and rows of [H, T], from row `first` on, that share a tile."""
    group, size = _tile_sides(H, T)
    starts = product(range(0, H, group), range(first, T, size))
    return [(slice(h, min(h + group, H)), slice(start, min(start + size, T))) for h, start in starts]


def _tile_sides(H: int, T: int) -> tuple[int, int]:
    """How many heads and how many rows share a tile.

    Each thread has a head or more, so that what it has multiplied is in its cache when it takes the softmax.
    """
    heads = min(H, max(torch.get_num_threads(), TILE // T**2))
    most = max(ROWS, TILE // (heads * T))
    return heads, math.ceil(T / math.ceil(T / most))


def _tile_memory(like: Tensor) -> Tensor:
    """For a tile of attention of what `like` [B, H, T, D] has."""
    heads, rows = _tile_sides(*like.shape[1:3])
    return like.new_empty(heads * rows * like.shape[2], dtype=computing_dtype(like))


def _part(memory: Tensor, *sizes: int) -> Tensor:
    return memory[: math.prod(sizes)].view(sizes)


def _attention(q: Tensor, k: Tensor, scale: float, out: Tensor | None) -> Tensor:
    """softmax(scale * q k) of q [heads, rows, D] and k [heads, D, T], in a given place if there is one."""
    unused = q.new_empty((1, 1, 1)) if out is None else out
    with no_autocast(q.device):
        logits = torch.baddbmm(unused, q, k, beta=0, alpha=scale, out=out)
        return torch.softmax(logits, dim=-1, out=out)
