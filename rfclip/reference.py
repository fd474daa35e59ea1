"""The reference: each step of RF-CLIP as one plain PyTorch function, written like its equation.

Paper: "Target Refocusing via Attention Redistribution for Open-Vocabulary Semantic Segmentation: An Explainability
Perspective", AAAI 2026, arXiv 2511.16170. [P n] is its equation n, [R] the behaviour of the code its authors released,
and [D] a decision of this project where neither of them says.

Notation: B images of N = gh * gw patches and T = N + 1 tokens, CLS being token 0; H heads of D dimensions, width
d = H * D; L blocks. A = softmax(q k^T * scale) is [B, H, T, T], row i being the query and column j the key, and the
scale is D ** -0.5 unless it is given. D_dis are the distraction dimensions, T_dis the distraction tokens and T_def the
defocused tokens. Masks are over the N patches and True means "in the set".

Precision: everything is computed in float32, or in float64 for float64 inputs, and rounded once at the end. Functions
that return tokens (`redistribute_embeddings`, `refocused_attention`, `proxy_attention`) return the dtype of their
input, as does `pamr`; functions that return scores (`distraction_scores`, `received_attention`, `key_similarity`,
`fiedler_vector`, `average_windows`, `class_probabilities`) return float32, or float64 for float64 inputs, so that no
comparison is decided by half-precision rounding.

All functions are pure: they return new tensors and leave their arguments as they were, but where `inplace` is asked
for. None reads a value back from
the device, and a batch may be empty. Wrong arguments raise ValueError, which says what was expected and what was given.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip_kernels.checks import (
    averaging_inputs,
    cut_inputs,
    defocus_inputs,
    masked_tokens,
    pamr_inputs,
    probability_inputs,
    proxy_inputs,
    query_key,
    refocused_inputs,
    scores_inputs,
    self_inputs,
    similarity_inputs,
    tensor_sizes,
    upsampling_inputs,
)

__all__ = [
    "average_windows",
    "clamp_embeddings",
    "class_probabilities",
    "defocus_mask",
    "dimension_weights",
    "distraction_mask",
    "distraction_scores",
    "fiedler_vector",
    "filter_embeddings",
    "key_similarity",
    "pamr",
    "proxy_attention",
    "received_attention",
    "redistribute_embeddings",
    "refocused_attention",
    "self_attention",
    "upsample_argmax",
]

BAND = 1 << 22  # upsampled logits that `upsample_argmax` holds at a time


def dimension_weights(x: Tensor, *, shifted: bool = True) -> Tensor:
    """The share of each dimension in its token, which equation 6 of the paper takes the maximum of [P 6].

    w[i, j] = f[i, j] / sum_k f[i, k]

    Args:
        x: patch tokens [B, N, d], any floating-point dtype.
        shifted: f = x - min_k x[k] per token [R], which makes the weights non-negative; False takes f = x.

    Returns:
        w [B, N, d], float32, or float64 for float64 input. A token whose sum is 0 (when shifted: all of its values are
        equal) has weights 0 [D].

    Raises:
        ValueError: x is not a floating-point [B, N, d].
    """
    tensor_sizes("x", x, "B N d")
    f, total = _shifted_sum(x, shifted)
    return torch.where(total == 0, 0, f / total)


def distraction_scores(x: Tensor, dims: Sequence[int], *, shifted: bool = True) -> Tensor:
    """How far the distraction dimensions dominate each token: equation 6 of the paper [P 6].

    phi[i] = max over j in D_dis of w[i, j], w being `dimension_weights`.

    Args:
        x: patch tokens [B, N, d], any floating-point dtype.
        dims: D_dis, distinct indices in 0 .. d - 1. Without any, every score is 0 [D].
        shifted: as in `dimension_weights`.

    Returns:
        phi [B, N], float32, or float64 for float64 input.

    Raises:
        ValueError: x is not a floating-point [B, N, d]; dims are out of range or repeated.
    """
    dims, _ = scores_inputs(x, dims, None)
    if not dims:
        return x.new_zeros(x.shape[:2], dtype=computing_dtype(x))
    f, total = _shifted_sum(x, shifted)
    total = total.mT
    return torch.where(total == 0, 0, _columns(f, dims) / total).amax(dim=1)


def distraction_mask(x: Tensor, dims: Sequence[int], threshold: float | None = None, *, shifted: bool = True) -> Tensor:
    """T_dis, the distraction tokens: phi[i] > tau, the criterion of equation 6 of the paper [P 6].

    The joint criterion for ViT-L/14 (appendix A) is this mask and `received_attention` above its own threshold.

    Args:
        x: patch tokens [B, N, d], any floating-point dtype.
        dims: D_dis, distinct indices in 0 .. d - 1. Without any, no token is one of distraction [D].
        threshold: tau; None takes 5 / d.
        shifted: as in `distraction_scores`.

    Returns:
        bool [B, N]. The comparison is strict and made in the dtype of the scores: float32, or float64 for float64.

    Raises:
        ValueError: as `distraction_scores`; threshold is not a number.
    """
    dims, threshold = scores_inputs(x, dims, threshold)
    phi = distraction_scores(x, dims, shifted=shifted)
    # Without dims phi is 0, which a negative threshold would let through.
    return phi > threshold if len(dims) else torch.zeros_like(phi, dtype=torch.bool)


def received_attention(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """How much attention each patch receives: the joint criterion for ViT-L/14 (appendix A of the paper).

    a[i] = mean over heads and patch queries of A[., i]. There a distraction token also has a[i] > tau_attn; the
    paper's threshold is not known, and this project takes 5 / N, five times the uniform share [D].

    Args:
        q, k: queries and keys [B, H, T, D] of the same floating-point dtype, CLS being token 0.
        scale: factor of the logits; None takes D ** -0.5.

    Returns:
        a [B, N], float32, or float64 for float64 input. The softmax runs over all T keys, so that a sums to 1 less the
        share of CLS.

    Raises:
        ValueError: q or k is not a floating-point [B, H, T, D] with T >= 2, or they differ in shape or dtype.
    """
    _, scale = query_key(scale, q=q, k=k)
    A = _attention(q, k, scale)
    return A[:, :, 1:, 1:].mean(dim=(1, 2))


def redistribute_embeddings(
    x: Tensor, mask: Tensor, dims: Sequence[int], grid: tuple[int, int], *, size: int = 3, inplace: bool = False
) -> Tensor:
    """Fill the distraction dimensions of distraction tokens from their neighbours: equation 13 of the paper [P 13].

    x[i, j] <- mean of x[n, j] over the neighbours n of i, for i in T_dis and j in D_dis only. The neighbours are the
    size x size window on the patch grid without its centre; those off the grid are left out and the mean divides by
    the number of those that exist [D]. All reads are of the values before the update. Every other token and dimension
    keeps its bits exactly.

    Args:
        x: patch tokens [B, N, d], any floating-point dtype, in row-major order of the grid.
        mask: T_dis, bool [B, N].
        dims: D_dis, distinct indices in 0 .. d - 1.
        grid: (gh, gw) with gh * gw = N. On a 1 x 1 grid, which has no neighbours, the token is left as it is [D].
        size: side of the window, odd and at least 3; the paper compares 3, 5 and 7.
        inplace: write into x and return it.

    Returns:
        [B, N, d] of x's dtype, a new tensor unless `inplace`.

    Raises:
        ValueError: x is not a floating-point [B, N, d]; mask is not a bool [B, N]; dims are out of range or repeated;
            the grid is empty or does not have N patches; size is not an odd integer of at least 3.
    """
    dims, (gh, gw) = masked_tokens(x, mask, dims, grid, size)
    out = x if inplace else x.clone()
    if not dims:
        return out
    before = _columns(x, dims)  # [B, |D_dis|, N]
    planes = before.to(computing_dtype(x)).unflatten(-1, (gh, gw))
    total, count = neighbour_sum(F.pad(planes, (0, 0, 0, 0, 0, 1), value=1), size).split([len(dims), 1], dim=1)
    mean = (total / count).to(x.dtype)
    after = torch.where(mask[:, None] & (count > 0), mean, before)
    for j, values in zip(dims, after.unbind(dim=1), strict=True):
        out[..., j] = values
    return out


def clamp_embeddings(
    x: Tensor, mask: Tensor, dims: Sequence[int], threshold: float | None = None, *, shifted: bool = True
) -> Tensor:
    """Clamp the distraction dimensions of distraction tokens to the threshold: a variant of the paper's table 1.

    f[i, j] <- min(f[i, j], tau * sum_k f[i, k]) for i in T_dis and j in D_dis, the sum being the one before [D].

    Args:
        x, mask, dims: as in `redistribute_embeddings`.
        threshold, shifted: as in `distraction_mask`.

    Returns:
        A new tensor [B, N, d] of x's dtype; all other values keep their bits.

    Raises:
        ValueError: as `redistribute_embeddings`; threshold is not a number.
    """
    dims, _ = masked_tokens(x, mask, dims, None)
    _, threshold = scores_inputs(x, dims, threshold)
    values = x.to(computing_dtype(x))
    least = values.amin(dim=-1, keepdim=True) if shifted else torch.zeros_like(values[..., :1])
    most = least + threshold * (values - least).sum(dim=-1, keepdim=True)  # [B, N, 1]
    out = x.clone()
    for j in dims:
        clamped = torch.minimum(values[..., j], most[..., 0]).to(x.dtype)
        out[..., j] = torch.where(mask, clamped, x[..., j])
    return out


def filter_embeddings(
    x: Tensor, mask: Tensor, grid: tuple[int, int], *, size: int = 3, statistic: str = "mean"
) -> Tensor:
    """Replace the embeddings of masked tokens by their window's mean or median: variants of the paper's tables 1 and 4.

    The window is size x size on the patch grid, its centre included; places off the grid are left out [D]. All
    dimensions are replaced. The median of an even number of values is the mean of the middle two [D].

    Args:
        x, mask, grid, size: as in `redistribute_embeddings`.
        statistic: "mean" or "median".

    Returns:
        A new tensor [B, N, d] of x's dtype; tokens that are not masked keep their bits.

    Raises:
        ValueError: as `redistribute_embeddings`; statistic is neither "mean" nor "median".
    """
    _, (gh, gw) = masked_tokens(x, mask, None, grid, size)
    if statistic not in ("mean", "median"):
        raise ValueError(f'statistic must be "mean" or "median", got {statistic!r}')
    planes = x.to(computing_dtype(x)).mT.unflatten(-1, (gh, gw))  # [B, d, gh, gw]
    padded = F.pad(planes, (size // 2,) * 4, value=float("nan"))
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4)  # [B, d, gh, gw, size^2]
    if statistic == "mean":
        filtered = windows.nanmean(dim=-1)
    else:
        ordered, count = windows.sort(dim=-1).values, windows.isfinite().sum(dim=-1, keepdim=True)  # NaN sorts last
        filtered = (ordered.gather(-1, (count - 1) // 2) + ordered.gather(-1, count // 2)).squeeze(-1) / 2
    return torch.where(mask[..., None], filtered.flatten(2).mT.to(x.dtype), x).contiguous()


def key_similarity(
    k: Tensor,
    running: Tensor | None = None,
    count: int = 0,
    *,
    scale: float | None = None,
    inplace: bool = False,
    heads: Tensor | None = None,
) -> Tensor:
    """Similarity of the patches' keys, averaged over the layers so far: equation 7 of the paper [P 7].

    S[l] = (1 / l) * sum over l' <= l of mean_h softmax(k k^T * scale), one layer a call: with S of the `count` layers
    before, it returns (S * count + new) / (count + 1). The softmax runs over all T keys; the row and the column of CLS
    are dropped after it, without renormalizing.

    Args:
        k: this layer's keys [B, H, T, D], any floating-point dtype, CLS being token 0.
        running: the value returned for the layer before, [B, N, N] float32 (float64 if k is); None at the first layer.
        count: the number of layers in `running`; 0 at the first layer.
        scale: factor of the logits; None takes D ** -0.5.
        inplace: write into `running`, where there is one, and return it.
        heads: the sum over layers of softmax(k k^T * scale) for each head, [B, H, N, N] of the dtype of `running`: this
            layer's is added to it in place, so that `proxy_attention` need not compute it again.

    Returns:
        S [B, N, N], float32, or float64 for float64 input.

    Raises:
        ValueError: k is not a floating-point [B, H, T, D] with T >= 2; running is not a [B, N, N] of the dtype above;
            count is not an integer of at least 0; only one of running and count >= 1 is given.
    """
    _, scale = similarity_inputs(k, running, count, scale, computing_dtype(k), heads)
    A = _attention(k, k, scale)[:, :, 1:, 1:]
    if heads is not None:
        heads += A
    new = A.mean(dim=1)
    if running is None:
        return new
    mean = (running * count + new) / (count + 1)
    return running.copy_(mean) if inplace else mean


def fiedler_vector(similarity: Tensor, start: Tensor | None = None) -> Tensor:
    """The second smallest eigenvector of the normalized cut: equation 8 of the paper [P 8].

    (Deg - W) y = lambda Deg y  with  W = (S + S^T) / 2 [D] and Deg = diag(W 1). With y = Deg^-1/2 u it is the
    symmetric problem (I - Deg^-1/2 W Deg^-1/2) u = lambda u, solved exactly by `torch.linalg.eigh`. The eigenvector of
    lambda = 0 is known, u = Deg^1/2 1, and its eigenvalue is moved above all others (none exceeds 2), so that y is the
    first vector of what remains, also where clusters are so far apart that the second eigenvalue is 0 up to rounding.

    Args:
        similarity: S [B, N, N], any floating-point dtype, no value negative.
        start: [B, N], the first guess of the backends that iterate. This exact reference checks its shape and does not
            use it.

    Returns:
        y [B, N], float32, or float64 for float64 input, of the scale y^T Deg y = 1. The sign of an eigenvector is
        arbitrary: y is oriented so that the token of largest |y| is positive, hence defocused [D]. Where two tokens
        share the largest |y|, or two vectors the eigenvalue, rounding decides. A token without any similarity, whose
        row and column are 0, gets 0 [D], and so does a single patch (N = 1).

    Raises:
        ValueError: similarity is not a floating-point [B, N, N]; start is not a floating-point [B, N].
    """
    sizes = cut_inputs(similarity, start)
    S = similarity.to(computing_dtype(similarity))
    if sizes["N"] == 1:
        return torch.zeros_like(S[..., 0])
    W = (S + S.mT) / 2
    deg = W.sum(dim=-1)  # [B, N]
    inv_sqrt = torch.where(deg > 0, deg.rsqrt(), 0)  # Deg^-1/2
    trivial = F.normalize(deg.sqrt(), dim=-1)  # u of lambda = 0
    laplacian = torch.eye(sizes["N"], dtype=S.dtype, device=S.device) - inv_sqrt[:, :, None] * W * inv_sqrt[:, None, :]
    _, u = torch.linalg.eigh(laplacian + 3 * trivial[:, :, None] * trivial[:, None, :])
    y = inv_sqrt * u[..., 0]
    largest = y.abs().argmax(dim=-1, keepdim=True)
    return y * y.gather(-1, largest).sign()


def defocus_mask(fiedler: Tensor, *, threshold: str = "mean") -> Tensor:
    """The defocused tokens, those above the cut: y[i] > mean(y), below equation 8 of the paper [P 8].

    T_def excludes T_dis [D], which this function does not know: the caller takes `defocus_mask(y) & ~distraction`.

    Args:
        fiedler: y [B, N], any floating-point dtype, as `fiedler_vector` returns it.
        threshold: "mean", or "otsu" for the variant of the paper's table 5: of the N - 1 ways to split the image's
            sorted values in two, the one with the largest between-class variance (exact, without a histogram [D]; the
            lowest of equals), the threshold being the largest value of the lower class.

    Returns:
        bool [B, N]. A single patch (N = 1) is never above its own threshold, nor is any of N equal values with "otsu".

    Raises:
        ValueError: fiedler is not a floating-point [B, N]; threshold is neither "mean" nor "otsu".
    """
    N = defocus_inputs(fiedler, threshold)
    y = fiedler.to(computing_dtype(fiedler))
    if threshold == "mean" or N == 1:
        return y > y.mean(dim=-1, keepdim=True)
    ordered = y.sort(dim=-1).values
    centred = ordered - ordered.mean(dim=-1, keepdim=True)
    low = torch.arange(1, N, device=y.device)  # size of the lower class, for each split
    high = N - low
    low_sum = centred.cumsum(dim=-1)[:, :-1]
    variance = low * high * (low_sum / low - (centred.sum(dim=-1, keepdim=True) - low_sum) / high) ** 2
    return y > ordered.gather(-1, variance.argmax(dim=-1, keepdim=True))


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
    """Attention that hands weight from distraction tokens to the target: equations 9 to 12 of the paper [P 9-12].

    Per head, for patch rows i (the row of CLS is left as it is [R]):

        A'[i, j] = (1 - beta) A[i, j]                                              for j in T_dis
        Omega[i] = beta * sum over j in T_dis of A[i, j]
        A'[i, j] = A[i, j] + Omega[i] * A[i, j] / sum over m in T_def of A[i, m]   for j in T_def
        A'[i, j] = A[i, j]                                                         for all other j, CLS included

    Every row still sums to 1. A row without mass on T_dis or on T_def, as where one of the two is empty, is left
    unchanged: no weight is ever lost.

    Args:
        q, k, v: queries, keys and values [B, H, T, D] of the same floating-point dtype, CLS being token 0.
        distraction: T_dis, bool [B, N].
        target: where the weight goes, T_def or another set (the paper's table 6), bool [B, N] over the patches or
            [B, T] over all tokens with CLS at 0. The two sets must be disjoint; a token in both counts as one of
            distraction only.
        beta: the share of the weight that is taken, in [0, 1]; the paper's is 0.7. 0 is plain attention.
        scale: factor of the logits; None takes D ** -0.5.

    Returns:
        A' v, [B, H, T, D] of the inputs' dtype; logits, softmax and sums are in float32, or in float64 for float64.

    Raises:
        ValueError: q, k or v is not a floating-point [B, H, T, D] with T >= 2, or they differ in shape or dtype; a mask
            is not bool or of another shape; beta is not in [0, 1].
    """
    scale = refocused_inputs(q, k, v, distraction, target, beta, scale)
    A = move_attention(_attention(q, k, scale), *attention_sets(distraction, target, q.shape[2]), beta)
    return matmul(A, v).to(v.dtype)


def self_attention(u: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """Attention of a vector with itself, softmax(u u^T * scale + bias) v, which most other methods build on.

    SCLIP and ClearCLIP take u = q, k or both; NACLIP takes u = k and a Gaussian of the distance of two patches as bias.

    Args:
        u, v: queries or keys, and values, [B, H, T, D] of the same floating-point dtype, CLS being token 0.
        bias: added to the logit of patches i and j at bias[row_i - row_j + gh - 1, column_i - column_j + gw - 1], a
            floating-point [2 gh - 1, 2 gw - 1] with gh * gw = N, the same for all images and heads; the row and the
            column of CLS have none.
        scale: factor of the logits; None takes D ** -0.5.

    Returns:
        [B, H, T, D] of the inputs' dtype; logits, softmax and sums are in float32, or in float64 for float64.

    Raises:
        ValueError: u or v is not a floating-point [B, H, T, D] with T >= 2, or they differ in shape or dtype; the bias
            is not as above.
    """
    scale = self_inputs(u, v, bias, scale)
    matrix = None if bias is None else offset_bias(bias.to(computing_dtype(u)))
    A = _attention(u, u, scale, matrix)
    return matmul(A, v).to(v.dtype)


def proxy_attention(
    keys: Tensor, v: Tensor, *, scale: float | None = None, heads: Tensor | None = None, count: int = 0
) -> Tensor:
    """The attention of the dense prediction, before the output projection: equation 14 of the paper [P 14].

    Abar = (1 / L) * sum over l of softmax(k[l] k[l]^T * scale) per head, its row and column of CLS dropped afterwards
    without renormalizing [R], times the values of the patches. One layer's matrix is added at a time.

    Args:
        keys: the keys of the L layers [L, B, H, T, D], any floating-point dtype, CLS being token 0.
        v: the values of the last layer [B, H, T, D], of the same dtype.
        scale: factor of the logits; None takes D ** -0.5.
        heads, count: the sum of softmax(k k^T * scale) over `count` more layers, as `key_similarity` adds it up.

    Returns:
        Abar v, [B, H, N, D] of the inputs' dtype.

    Raises:
        ValueError: keys is not a floating-point [L, B, H, T, D] with T >= 2; v is not a [B, H, T, D] of its sizes and
            dtype.
    """
    scale = proxy_inputs(keys, v, scale, heads, count)
    total = sum(_attention(k, k, scale)[:, :, 1:, 1:] for k in keys)
    Abar = (total if heads is None else heads + total) / (len(keys) + count)
    return matmul(Abar, v[:, :, 1:]).to(v.dtype)


def average_windows(logits: Tensor, corners: Sequence[tuple[int, int]], side: int, size: tuple[int, int]) -> Tensor:
    """The patch logits of overlapping windows as logits of the pixels below them: step 9 of the method.

    Each window is resized bilinearly (align_corners=False) to side x side pixels; a pixel's logits are the mean over
    the windows that cover it.

    Args:
        logits: those of W windows for K names, [W, K, gh, gw], any floating-point dtype.
        corners: the (top, left) pixel of each window, W pairs of integers.
        side: height and width of a window in pixels.
        size: (h, w) of the picture in pixels.

    Returns:
        [K, h, w], float32, or float64 for float64 input.

    Raises:
        ValueError: logits is not a floating-point [W, K, gh, gw]; corners are not W pairs of integers; side or size is
            not positive; a window is not inside the picture; there is a pixel that no window covers.
    """
    corners = averaging_inputs(logits, corners, side, size)
    dtype = computing_dtype(logits)
    total = logits.new_zeros((logits.shape[1], *size), dtype=dtype)
    seen = logits.new_zeros(size, dtype=dtype)
    for window, (top, left) in zip(logits, corners, strict=True):
        resized = F.interpolate(window[None].to(dtype), size=(side, side), mode="bilinear", align_corners=False)[0]
        total[:, top : top + side, left : left + side] += resized
        seen[top : top + side, left : left + side] += 1
    return total.div_(seen)


def class_probabilities(
    logits: Tensor,
    size: tuple[int, int],
    logit_scale: float,
    class_of_name: Tensor,
    classes: int,
    rows: range | None = None,
) -> Tensor:
    """The probability of each class at each pixel of a picture: step 9 of the method.

    Logits are resized bilinearly (align_corners=False), multiplied by the scale and made probabilities by a softmax
    over names; a class has the largest one of its names.

    Args:
        logits: those of K names, [K, h, w], any floating-point dtype.
        size: (H, W) of the picture.
        logit_scale: factor of the logits.
        class_of_name: the class of each name, int64 [K] with values in 0 .. classes - 1, which are not checked. The
            names of a class need not be neighbours. A class without a name has probability 0.
        classes: C, the number of classes.
        rows: which rows of the picture to return; None: all of them.

    Returns:
        [C, len(rows), W], float32, or float64 for float64 input.

    Raises:
        ValueError: logits is not a floating-point [K, h, w]; class_of_name is not an int64 [K]; size or classes is not
            positive; logit_scale is not a number; rows is not a range within the picture.
    """
    rows = probability_inputs(logits, size, logit_scale, class_of_name, classes, rows)
    probability = _name_probabilities(logits, size, logit_scale, rows)
    out = probability.new_zeros((classes, *probability.shape[1:]))
    index = class_of_name[:, None, None].expand_as(probability)
    return out.scatter_reduce_(0, index, probability, "amax")


def upsample_argmax(
    logits: Tensor,
    size: tuple[int, int],
    logit_scale: float,
    class_of_name: Tensor,
    threshold: float | None = None,
) -> Tensor:
    """The most probable class at each pixel of a picture: step 9 of the method.

    It is the argmax over `class_probabilities`, the lowest class of equals, found without them, a band of rows at a
    time: it is the class of the most probable name.

    Args:
        logits: those of K names, [K, h, w], any floating-point dtype.
        size: (H, W) of the picture.
        logit_scale: factor of the logits.
        class_of_name: the class of each name, int64 [K] with values in 0 .. 2^31 - 2, which are not checked.
        threshold: a pixel whose largest class probability is below it gets no class; None: every pixel gets one.

    Returns:
        int32 [H, W], the class, or -1 for none.

    Raises:
        ValueError: as `class_probabilities`; threshold is not in [0, 1].
    """
    upsampling_inputs(logits, size, logit_scale, class_of_name, threshold)
    H, W = size
    out = logits.new_empty(size, dtype=torch.int32)
    band = max(1, BAND // (len(logits) * W))
    for top in range(0, H, band):
        rows = range(top, min(top + band, H))
        probability = _name_probabilities(logits, size, logit_scale, rows)
        best = probability.amax(dim=0)  # [rows, W]
        none = torch.iinfo(torch.int32).max
        label = torch.where(probability == best, class_of_name[:, None, None], none).amin(dim=0)
        out[top : rows.stop] = label if threshold is None else torch.where(best < threshold, -1, label)
    return out


def pamr(image: Tensor, mask: Tensor, iterations: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """Pixel-adaptive mask refinement: step 10 of the method.

    Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020. A pixel's neighbours p are
    the 8 places around it at each dilation d, at offsets of -d, 0 or d along both axes; beyond the border the picture
    repeats its edge. In each iteration a pixel of the mask becomes the mean of its neighbours, itself left out,
    weighted by the softmax over p of

        mean over channels c of  -|image[c] - image[c, p]| / (1e-8 + 0.1 std[c])

    with std[c] the unbiased standard deviation over all neighbours and, once for each dilation, the pixel itself.

    Args:
        image: [B, CI, H, W] of any number CI of channels, any floating-point dtype.
        mask: scores or probabilities of C classes, [B, C, H, W], any floating-point dtype.
        iterations: how often; 0 returns a copy of the mask.
        dilations: in pixels; they may be larger than the picture.

    Returns:
        [B, C, H, W] of mask's dtype. It is computed in float64 where image or mask is float64, else in float32.

    Raises:
        ValueError: image is not a floating-point [B, CI, H, W], or mask not a floating-point [B, C, H, W] of its size;
            iterations is not an integer of at least 0; dilations are not integers of at least 1, or there are none.
    """
    dilations = pamr_inputs(image, mask, iterations, dilations)
    dtype = torch.promote_types(computing_dtype(image), computing_dtype(mask))
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    around = [(d * dy, d * dx) for d in dilations for dy, dx in steps if (dy, dx) != (0, 0)]
    x = image.to(dtype)
    near = torch.stack([_shifted(x, *offset) for offset in around])  # [P, B, CI, H, W]
    every = torch.cat([near, x.expand(len(dilations), *x.shape)])
    std = ((every - every.mean(dim=0)).square().sum(dim=0) / (len(every) - 1)).sqrt()
    weight = (-(x - near).abs() / (1e-8 + 0.1 * std)).mean(dim=2, keepdim=True).softmax(dim=0)  # [P, B, 1, H, W]
    out = mask.to(dtype, copy=True)
    for _ in range(iterations):
        out = sum(w * _shifted(out, *offset) for w, offset in zip(weight, around, strict=True))
    return out.to(mask.dtype).contiguous()


def computing_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _columns(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Some dimensions of x [B, N, d], as [B, len(dims), N]; a list as an index would be copied to the device."""
    return torch.stack([x[..., j] for j in dims], dim=1)


def _shifted_sum(x: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """f of equation 6 and its sum over dimensions: [B, N, d] and [B, N, 1] in the computing dtype."""
    f = x.to(computing_dtype(x))
    if shifted:
        f = f - f.amin(dim=-1, keepdim=True)
    return f, f.sum(dim=-1, keepdim=True)


def attention_sets(distraction: Tensor, target: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The columns of A that give and those that get, bool [B, T]; CLS is in neither unless the target says so."""
    dis = F.pad(distraction, (1, 0))
    return dis, F.pad(target, (T - target.shape[-1], 0)) & ~dis


def move_attention(A: Tensor, dis: Tensor, tgt: Tensor, beta: float, first: int = 0) -> Tensor:
    """A' of equations 9 to 12 for rows of A [B, H, ., T], of which `first` is the first, and sets [B, T]."""
    dis, tgt = dis[:, None, None, :], tgt[:, None, None, :]
    patch_rows = torch.arange(first, first + A.shape[2], device=A.device)[:, None] > 0
    dis_mass = torch.where(dis, A, 0).sum(dim=-1, keepdim=True)
    tgt_mass = torch.where(tgt, A, 0).sum(dim=-1, keepdim=True)
    omega = beta * dis_mass
    # A / tgt_mass comes first: it is at most 1, while omega / tgt_mass can overflow.
    moved = torch.where(dis, (1 - beta) * A, torch.where(tgt, A + omega * (A / tgt_mass), A))
    return torch.where(patch_rows & (tgt_mass > 0), moved, A)  # without mass on T_dis, omega = 0 changes nothing


def _attention(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """A = softmax(q k^T * scale + bias) over all T keys, [B, H, T, T] in the computing dtype."""
    logits = matmul(q, k.mT) * scale  # [T, D] @ [D, T] -> [T, T]
    return torch.softmax(logits if bias is None else logits + bias, dim=-1)


def offset_bias(bias: Tensor) -> Tensor:
    """The matrix [T, T] of a bias by offset [2 gh - 1, 2 gw - 1], 0 in the row and the column of CLS."""
    gh, gw = ((side + 1) // 2 for side in bias.shape)
    rows, columns = (torch.arange(side, device=bias.device) for side in (gh, gw))
    down = (rows[:, None] - rows + gh - 1)[:, None, :, None]
    right = (columns[:, None] - columns + gw - 1)[None, :, None, :]
    return F.pad(bias[down, right].reshape(gh * gw, gh * gw), (1, 0, 1, 0))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product in the computing dtype, also where autocast would lower it."""
    dtype = computing_dtype(a)
    with no_autocast(a.device):
        return a.to(dtype) @ b.to(dtype)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Products in the dtype of their factors; where autocast is off, or unknown to the device, that is so already."""
    lowered = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if lowered else nullcontext()


def neighbour_sum(planes: Tensor, size: int) -> Tensor:
    """Sum over the size x size window without its centre, zeros off the grid: [B, C, gh, gw] -> [B, C, N].

    The centre is left out rather than subtracted: it can outweigh its neighbours by orders of magnitude.
    """
    (gh, gw), centre = planes.shape[2:], size // 2
    padded = F.pad(planes, (centre,) * 4)
    places = [(r, c) for r in range(size) for c in range(size) if (r, c) != (centre, centre)]
    return sum(padded[:, :, r : r + gh, c : c + gw] for r, c in places).flatten(2)


def _name_probabilities(logits: Tensor, size: tuple[int, int], logit_scale: float, rows: range) -> Tensor:
    """Softmax over names of some rows of logits [K, h, w] resized to `size`: [K, len(rows), W], computing dtype."""
    resized = _resize_rows(logits.to(computing_dtype(logits)), rows, size)
    return (logit_scale * resized).softmax(dim=0)


def _resize_rows(x: Tensor, rows: range, size: tuple[int, int]) -> Tensor:
    """Some rows of x [K, h, w] resized bilinearly to `size`: [K, len(rows), W], as F.interpolate has them."""
    places = torch.arange(rows.start, rows.stop, rows.step, dtype=x.dtype, device=x.device)
    at = ((places + 0.5) * (x.shape[1] / size[0]) - 0.5).clamp(0, x.shape[1] - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=x.shape[1] - 1)
    mixed = torch.lerp(x[:, low], x[:, high], (at - low)[:, None])
    return F.interpolate(mixed, size=size[1], mode="linear", align_corners=False)


def _shifted(x: Tensor, down: int, right: int) -> Tensor:
    """The value `down` and `right` of each pixel of x [B, C, H, W], the edge repeating beyond the border."""
    H, W = x.shape[2:]
    rows = (torch.arange(H, device=x.device) + down).clamp(0, H - 1)
    columns = (torch.arange(W, device=x.device) + right).clamp(0, W - 1)
    return x[:, :, rows[:, None], columns]
