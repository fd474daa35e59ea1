"""The reference: each operation as a plain PyTorch function that reads like its equation.

`rfclip_kernels.operations` has the contract of each: what it computes, its shapes and its notation. Functions here are
called with checked arguments and with every default filled in. None reads a value back from the device.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.ops.numerics import computing_dtype, matmul
from rfclip_kernels.operations import affinity_dtype, affinity_unit

BAND = 1 << 22  # upsampled logits that `upsample_argmax` holds at a time


# Steps 1 to 3: distraction tokens, and the repair of their embeddings


def dimension_weights(x: Tensor, shifted: bool) -> Tensor:
    f, total = _shifted_sum(x, shifted)
    return torch.where(total == 0, 0, f / total)


def distraction_scores(x: Tensor, dims: list[int], shifted: bool) -> Tensor:
    f, total = _shifted_sum(x, shifted)
    total = total.mT
    return torch.where(total == 0, 0, _columns(f, dims) / total).amax(dim=1)


def distraction_mask(x: Tensor, dims: list[int], threshold: float, shifted: bool) -> Tensor:
    return distraction_scores(x, dims, shifted) > threshold


def received_attention(q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    A = _attention(q, k, scale)
    return A[:, :, prefix:, prefix:].mean(dim=(1, 2))


def redistribute_embeddings(x: Tensor, mask: Tensor, dims: list[int], gh: int, gw: int, size: int) -> None:
    """In place."""
    before = _columns(x, dims)  # [B, |D_dis|, N]
    planes = before.to(computing_dtype(x)).unflatten(-1, (gh, gw))
    total, count = neighbour_sum(F.pad(planes, (0, 0, 0, 0, 0, 1), value=1), size).split([len(dims), 1], dim=1)
    mean = (total / count).to(x.dtype)
    after = torch.where(mask[:, None] & (count > 0), mean, before)
    for j, values in zip(dims, after.unbind(dim=1), strict=True):
        x[..., j] = values


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = _joined(x, branch)
    return x, _layer_norm(x, weight, bias, eps)


def repaired_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dims: list[int],
    threshold: float,
    gh: int,
    gw: int,
    shifted: bool,
    size: int,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _joined(x, branch)
    patches = x[:, prefix:]
    mask = distraction_mask(patches, dims, threshold, shifted)
    redistribute_embeddings(patches, mask, dims, gh, gw, size)
    return x, _layer_norm(x, weight, bias, eps), mask


def candidate_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dims: list[int],
    threshold: float,
    shifted: bool,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _joined(x, branch)
    patches = x[:, prefix:]
    candidates = distraction_mask(patches, dims, threshold, shifted)
    return x, _layer_norm(x, weight, bias, eps), candidates, _columns(patches, dims).mT.contiguous()


def joint_repair(
    x: Tensor,
    y: Tensor,
    before: Tensor,
    candidates: Tensor,
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dims: list[int],
    threshold: float,
    gh: int,
    gw: int,
    size: int,
    scale: float,
    prefix: int,
) -> Tensor:
    """In place; x itself has what is in `before`."""
    mask = candidates & (received_attention(q, k, scale, prefix) > threshold)
    redistribute_embeddings(x[:, prefix:], mask, dims, gh, gw, size)
    changed = F.pad(mask, (prefix, 0))[..., None]
    y.copy_(torch.where(changed, _layer_norm(x, weight, bias, eps), y))
    return mask


def project_tokens(y: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, prefix: int) -> None:
    """In place."""
    dtype = computing_dtype(out)
    projected = matmul(y.to(out.dtype), weight.to(out.dtype).mT)
    projected = projected if bias is None else projected + bias.to(dtype)
    out.copy_(torch.where(F.pad(mask, (prefix, 0))[..., None], projected.to(out.dtype), out))


def quick_gelu(x: Tensor, inplace: bool) -> Tensor:
    values = x.to(computing_dtype(x))
    values = values * torch.sigmoid(1.702 * values)
    return x.copy_(values) if inplace else values.to(x.dtype).contiguous()


def clamp_embeddings(x: Tensor, mask: Tensor, dims: list[int], threshold: float, shifted: bool) -> Tensor:
    values = x.to(computing_dtype(x))
    least = values.amin(dim=-1, keepdim=True) if shifted else torch.zeros_like(values[..., :1])
    most = least + threshold * (values - least).sum(dim=-1, keepdim=True)  # [B, N, 1]
    out = x.clone()
    for j in dims:
        clamped = torch.minimum(values[..., j], most[..., 0]).to(x.dtype)
        out[..., j] = torch.where(mask, clamped, x[..., j])
    return out


def filter_embeddings(x: Tensor, mask: Tensor, gh: int, gw: int, size: int, statistic: str) -> Tensor:
    planes = x.to(computing_dtype(x)).mT.unflatten(-1, (gh, gw))  # [B, d, gh, gw]
    padded = F.pad(planes, (size // 2,) * 4, value=float("nan"))
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4)  # [B, d, gh, gw, size^2]
    if statistic == "mean":
        filtered = windows.nanmean(dim=-1)
    else:
        ordered, count = windows.sort(dim=-1).values, windows.isfinite().sum(dim=-1, keepdim=True)  # NaN sorts last
        filtered = (ordered.gather(-1, (count - 1) // 2) + ordered.gather(-1, count // 2)).squeeze(-1) / 2
    return torch.where(mask[..., None], filtered.flatten(2).mT.to(x.dtype), x).contiguous()


def blend_embeddings(x: Tensor, mask: Tensor, gh: int, gw: int) -> None:
    """In place."""
    values = x.to(computing_dtype(x), copy=True)  # a gradient may need it
    means = F.avg_pool2d(values.mT.unflatten(-1, (gh, gw)), 3, stride=1, padding=1).flatten(2).mT
    x.copy_(torch.where(mask[..., None], (0.6 * values + 0.4 * means).to(x.dtype), x))


# Step 4: the defocused foreground


def key_similarity(k: Tensor, running: Tensor, count: int, scale: float, prefix: int) -> None:
    """In place in `running`, whose values count only if `count` does."""
    new = _layer_similarity(k, scale, prefix)
    running.copy_((running * count + new) / (count + 1) if count else new)


def key_normalizers(k: Tensor, copy: Tensor | None, scale: float, prefix: int) -> Tensor:
    if copy is not None:
        copy.copy_(k)
    return (matmul(k, k.mT) * scale).logsumexp(dim=-1)


def key_affinity(
    k: Tensor, normalizers: Tensor, running: Tensor | None, count: int, scale: float, prefix: int
) -> Tensor:
    """In place after the first layer."""
    new = _layer_similarity(k, scale, prefix)
    new = (new + new.mT) * (affinity_unit(new.shape[-1]) / 2)
    if running is None:
        return new.to(affinity_dtype(k))
    return running.copy_((running.to(new.dtype) * count + new) / (count + 1))


def fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    """Exactly, by `torch.linalg.eigh`.

    With y = Deg^-1/2 u the problem is symmetric: (I - Deg^-1/2 W Deg^-1/2) u = lambda u. The eigenvector of lambda = 0
    is known, u = Deg^1/2 1. Its eigenvalue is moved above all others, none of which exceeds 2, so that y is the first
    vector of what remains even if two clusters are so far apart that the second eigenvalue is 0 up to rounding.
    """
    S = similarity.to(computing_dtype(similarity))
    W = (S + S.mT) / 2
    deg = W.sum(dim=-1)  # [B, N]
    inv_sqrt = torch.where(deg > 0, deg.rsqrt(), 0)  # Deg^-1/2
    trivial = F.normalize(deg.sqrt(), dim=-1)  # u of lambda = 0
    identity = torch.eye(S.shape[1], dtype=S.dtype, device=S.device)
    laplacian = identity - inv_sqrt[:, :, None] * W * inv_sqrt[:, None, :]
    _, u = torch.linalg.eigh(laplacian + 3 * trivial[:, :, None] * trivial[:, None, :])
    y = inv_sqrt * u[..., 0]
    largest = y.abs().argmax(dim=-1, keepdim=True)
    return y * y.gather(-1, largest).sign()


def defocus_mask(fiedler: Tensor, distraction: Tensor | None, threshold: str) -> Tensor:
    y = fiedler.to(computing_dtype(fiedler))
    above = y > (y.mean(dim=-1, keepdim=True) if threshold == "mean" else _otsu_threshold(y))
    return above if distraction is None else above & ~distraction


def defocused_tokens(
    affinity: Tensor, distraction: Tensor, start: Tensor | None, threshold: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = fiedler_vector(affinity.to(computing_dtype(affinity)) / affinity_unit(affinity.shape[1]), None)
    target = defocus_mask(y, distraction, threshold)
    patches = torch.argsort((~target).int() + distraction.int(), dim=-1, stable=True)
    order = torch.where(distraction.gather(-1, patches), -1 - patches, patches)
    return y[:, None], target, torch.cat([target.sum(dim=-1, keepdim=True), order], dim=-1).int()


# Steps 5 and 6: attention


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
    dis, tgt = attention_sets(distraction, target, prefix)
    A = move_attention(_attention(q, k, scale), dis, tgt, beta, prefix)
    return matmul(A, v).to(v.dtype)


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
    matrix = None if bias is None else attention_bias(bias.to(computing_dtype(q)), prefix)
    gathered = factor * matmul(_attention(q, k, over_heads(scale, q), matrix), v)
    return gathered.to(v.dtype) if out is None else out.copy_(out + gathered)


def proxy_attention(keys: Tensor, v: Tensor, scale: float, prefix: int, normalizers: Tensor | None) -> Tensor:
    matrices = (_attention(k, k, scale)[:, :, prefix:, prefix:] for k in keys)  # one layer's at a time
    total = reduce(torch.add, matrices)
    return matmul(total / len(keys), v[:, :, prefix:]).to(v.dtype)


def cosine_aggregation(guide: Tensor, x: Tensor, cut: float | Tensor, gain: float | None) -> Tensor:
    unit = F.normalize(guide.to(computing_dtype(guide)), dim=-1)
    weight = matmul(unit, unit.mT)
    kept = weight >= (cut[:, None, None] if isinstance(cut, Tensor) else cut)
    if gain is None:
        return matmul(weight.where(kept, 0), x).to(x.dtype)
    kept = kept | torch.eye(weight.shape[-1], dtype=torch.bool, device=x.device)
    return matmul((gain * weight).where(kept, -torch.inf).softmax(dim=-1), x).to(x.dtype)


# Steps 8 and 9: from windows to pixels


def average_windows(logits: Tensor, corners: list[tuple[int, int]], height: int, width: int, h: int, w: int) -> Tensor:
    dtype = computing_dtype(logits)
    total = logits.new_zeros((logits.shape[1], h, w), dtype=dtype)
    seen = logits.new_zeros((h, w), dtype=dtype)
    for window, (top, left) in zip(logits, corners, strict=True):
        resized = F.interpolate(window[None].to(dtype), size=(height, width), mode="bilinear", align_corners=False)[0]
        total[:, top : top + height, left : left + width] += resized
        seen[top : top + height, left : left + width] += 1
    return total.div_(seen)


def class_probabilities(
    logits: Tensor, H: int, W: int, logit_scale: float, class_of_name: Tensor, classes: int, rows: range
) -> Tensor:
    probability = _name_probabilities(logits, H, W, logit_scale, rows)
    out = probability.new_zeros((classes, *probability.shape[1:]))
    index = class_of_name[:, None, None].expand_as(probability)
    return out.scatter_reduce_(0, index, probability, "amax")


def upsample_argmax(
    logits: Tensor, H: int, W: int, logit_scale: float, class_of_name: Tensor, threshold: float | None
) -> Tensor:
    """A band of rows at a time."""
    out = logits.new_empty((H, W), dtype=torch.int32)
    band = max(1, BAND // (len(logits) * W))
    for top in range(0, H, band):
        rows = range(top, min(top + band, H))
        probability = _name_probabilities(logits, H, W, logit_scale, rows)
        best = probability.amax(dim=0)  # [rows, W]
        none = torch.iinfo(torch.int32).max
        label = torch.where(probability == best, class_of_name[:, None, None], none).amin(dim=0)
        out[top : rows.stop] = label if threshold is None else torch.where(best < threshold, -1, label)
    return out


def pamr(image: Tensor, mask: Tensor, iterations: int, dilations: list[int]) -> Tensor:
    dtype = torch.promote_types(computing_dtype(image), computing_dtype(mask))
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    around = [(d * dy, d * dx) for d in dilations for dy, dx in steps if (dy, dx) != (0, 0)]
    x = image.to(dtype)
    near = torch.stack([_moved(x, *offset) for offset in around])  # [P, B, CI, H, W]
    every = torch.cat([near, x.expand(len(dilations), *x.shape)])
    std = ((every - every.mean(dim=0)).square().sum(dim=0) / (len(every) - 1)).sqrt()
    weight = (-(x - near).abs() / (1e-8 + 0.1 * std)).mean(dim=2, keepdim=True).softmax(dim=0)  # [P, B, 1, H, W]
    out = mask.to(dtype, copy=True)
    for _ in range(iterations):
        out = sum(w * _moved(out, *offset) for w, offset in zip(weight, around, strict=True))
    return out.to(mask.dtype).contiguous()


# Parts of the operations, some of which explanations and other methods also use


def attention_sets(distraction: Tensor, target: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The columns of A that give and those that receive, bool [B, T]; the prefix is in neither unless in the target."""
    dis = F.pad(distraction, (prefix, 0))
    return dis, F.pad(target, (dis.shape[-1] - target.shape[-1], 0)) & ~dis


def move_attention(A: Tensor, dis: Tensor, tgt: Tensor, beta: float, prefix: int, first: int = 0) -> Tensor:
    """A' of equations 9 to 12 for rows of A [B, H, ., T], the first of which is row `first`, and sets [B, T]."""
    dis, tgt = dis[:, None, None, :], tgt[:, None, None, :]
    patch_rows = torch.arange(first, first + A.shape[2], device=A.device)[:, None] >= prefix
    dis_mass = torch.where(dis, A, 0).sum(dim=-1, keepdim=True)
    tgt_mass = torch.where(tgt, A, 0).sum(dim=-1, keepdim=True)
    omega = beta * dis_mass
    # A / tgt_mass comes first: it is at most 1, while omega / tgt_mass can overflow.
    moved = torch.where(dis, (1 - beta) * A, torch.where(tgt, A + omega * (A / tgt_mass), A))
    return torch.where(patch_rows & (tgt_mass > 0), moved, A)  # without mass on T_dis, omega = 0 changes nothing


def over_heads(scale: float | Tensor, q: Tensor) -> float | Tensor:
    """A scale for each image [B] as [B, 1, 1, 1] in the dtype that q is computed in."""
    return scale[:, None, None, None].to(computing_dtype(q)) if isinstance(scale, Tensor) else scale


def attention_bias(bias: Tensor, prefix: int) -> Tensor:
    """The matrix [T, T] or [B, 1, T, T] of a bias of `self_attention`, 0 in the rows and columns of the prefix."""
    if bias.dim() == 3:
        return F.pad(bias[:, None], (prefix, 0, prefix, 0))
    gh, gw = ((side + 1) // 2 for side in bias.shape)
    rows, columns = (torch.arange(side, device=bias.device) for side in (gh, gw))
    down = (rows[:, None] - rows + gh - 1)[:, None, :, None]
    right = (columns[:, None] - columns + gw - 1)[None, :, None, :]
    return F.pad(bias[down, right].reshape(gh * gw, gh * gw), (prefix, 0, prefix, 0))


def neighbour_sum(planes: Tensor, size: int) -> Tensor:
    """Sum over the size x size window without its centre, zeros off the grid: [B, C, gh, gw] -> [B, C, N].

    The centre is left out rather than subtracted: it can outweigh its neighbours by orders of magnitude.
    """
    (gh, gw), centre = planes.shape[2:], size // 2
    padded = F.pad(planes, (centre,) * 4)
    places = [(r, c) for r in range(size) for c in range(size) if (r, c) != (centre, centre)]
    return reduce(torch.add, (padded[:, :, r : r + gh, c : c + gw] for r, c in places)).flatten(2)


def _columns(x: Tensor, dims: list[int]) -> Tensor:
    """Some dimensions of x [B, N, d], as [B, len(dims), N]; a list as an index would be copied to the device."""
    return torch.stack([x[..., j] for j in dims], dim=1)


def _shifted_sum(x: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """f of equation 6 and its sum over dimensions: [B, N, d] and [B, N, 1] in the computing dtype."""
    f = x.to(computing_dtype(x))
    if shifted:
        f = f - f.amin(dim=-1, keepdim=True)
    return f, f.sum(dim=-1, keepdim=True)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In the computing dtype, rounded to that of x."""
    dtype = computing_dtype(x)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def _otsu_threshold(y: Tensor) -> Tensor:
    """Of each row of y [B, N], [B, 1]."""
    N = y.shape[1]
    if N == 1:
        return y
    ordered = y.sort(dim=-1).values
    centred = ordered - ordered.mean(dim=-1, keepdim=True)
    low = torch.arange(1, N, device=y.device)  # size of the lower class, for each split
    high = N - low
    low_sum = centred.cumsum(dim=-1)[:, :-1]
    variance = low * high * (low_sum / low - (centred.sum(dim=-1, keepdim=True) - low_sum) / high) ** 2
    return ordered.gather(-1, variance.argmax(dim=-1, keepdim=True))


def _joined(x: Tensor, branch: Tensor | None) -> Tensor:
    """A stream and its branch, if there is one, as a new tensor."""
    return x.clone(memory_format=torch.contiguous_format) if branch is None else (x + branch).contiguous()


def _layer_similarity(k: Tensor, scale: float, prefix: int) -> Tensor:
    """One layer's part of equation 7 [B, N, N]."""
    return _attention(k, k, scale)[:, :, prefix:, prefix:].mean(dim=1)


def _attention(q: Tensor, k: Tensor, scale: float | Tensor, bias: Tensor | None = None) -> Tensor:
    """A = softmax(q k^T * scale + bias) over all T keys, [B, H, T, T] in the computing dtype."""
    logits = matmul(q, k.mT) * scale  # [T, D] @ [D, T] -> [T, T]
    return torch.softmax(logits if bias is None else logits + bias, dim=-1)


def _name_probabilities(logits: Tensor, H: int, W: int, logit_scale: float, rows: range) -> Tensor:
    """Softmax over names of some rows of logits [K, h, w] resized to H x W: [K, len(rows), W], computing dtype."""
    resized = _resized_rows(logits.to(computing_dtype(logits)), H, W, rows)
    return (logit_scale * resized).softmax(dim=0)


def _resized_rows(x: Tensor, H: int, W: int, rows: range) -> Tensor:
    """Some rows of x [K, h, w] resized bilinearly to H x W: [K, len(rows), W], as F.interpolate computes them."""
    places = torch.arange(rows.start, rows.stop, rows.step, dtype=x.dtype, device=x.device)
    at = ((places + 0.5) * (x.shape[1] / H) - 0.5).clamp(0, x.shape[1] - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=x.shape[1] - 1)
    mixed = torch.lerp(x[:, low], x[:, high], (at - low)[:, None])
    return F.interpolate(mixed, size=W, mode="linear", align_corners=False)


def _moved(x: Tensor, down: int, right: int) -> Tensor:
    """The value `down` and `right` of each pixel of x [B, C, H, W]; beyond the border the edge repeats."""
    H, W = x.shape[2:]
    rows = (torch.arange(H, device=x.device) + down).clamp(0, H - 1)
    columns = (torch.arange(W, device=x.device) + right).clamp(0, W - 1)
    return x[:, :, rows[:, None], columns]
