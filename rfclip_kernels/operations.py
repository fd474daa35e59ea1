"""The contract of every operation: its signature, what it computes, its shapes and errors, and the argument check.

`Operations` is the one front door. Each method checks its arguments, fills in the defaults and calls the function of
the same name of an implementation, which therefore contains only the work: `rfclip.ops.reference` and
`rfclip.ops.eager` in PyTorch, the `launch_*` functions of this package in Triton.

Sources: the paper "Target Refocusing via Attention Redistribution for Open-Vocabulary Semantic Segmentation: An
Explainability Perspective", AAAI 2026, arXiv 2511.16170. [P n] is its equation n, [R] the behaviour of the code its
authors released, [D] a decision of this project where neither says. Steps are numbered as in docs/method.md.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import tensor_sizes


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that an operation computes in: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def affinity_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of `Operations.key_affinity` for keys of some dtype."""
    return torch.float16 if tensor.itemsize == 2 else tensor.dtype


def affinity_unit(N: int) -> int:
    """What W is multiplied by in `Operations.key_affinity`: its mean is then about 1, and float16 can hold it."""
    return min(N, 1 << 15)


class Operations:
    """The operations of RF-CLIP and of its peers on one backend.

    Notation: B images of N = gh * gw patches and T = prefix + N tokens, of which the first `prefix` are not patches
    (CLIP has one, CLS; registers would add to it); H heads of D dimensions, width d = H * D; L blocks. A = softmax(q
    k^T * scale) is [B, H, T, T], row i being the query and column j the key. D_dis are the distraction dimensions,
    T_dis the distraction tokens and T_def the defocused tokens. Masks are over the N patches; True means "in the set".

    Precision: everything is computed in float32, or in float64 for float64 inputs, and rounded once at the end.
    Operations that return tokens (`joint_repair`, `project_tokens`, `redistribute_embeddings`, `clamp_embeddings`,
    `filter_embeddings`, `blend_embeddings`, `refocused_attention`, `self_attention`, `proxy_attention`,
    `cosine_aggregation`) and `pamr` return the dtype of their input. Operations that return scores return float32, or
    float64 for float64 inputs, so that half-precision rounding never decides a comparison.

    Inputs may have any strides, and a batch may be empty. Operations return new tensors and leave their arguments
    unchanged, except where `inplace` is asked for. Every method raises ValueError for arguments of the wrong type,
    shape or range, stating what was expected and what was given.

    Args:
        implementation: the function that does the work, for each operation by name.
    """

    def __init__(self, implementation: Mapping[str, Any]) -> None:
        self._run = implementation

    # Step 1: distraction tokens

    def dimension_weights(self, x: Tensor, *, shifted: bool = True) -> Tensor:
        """The share of each dimension in its token, whose maximum equation 6 takes [P 6].

        w[i, j] = f[i, j] / sum_k f[i, k]

        Args:
            x: patch tokens [B, N, d], any floating-point dtype.
            shifted: f = x - min_k x[k] per token [R], which makes the weights non-negative; False takes f = x.

        Returns:
            w [B, N, d], float32 or float64. A token whose sum is 0 (when shifted: whose values are all equal) has
            weights 0 [D].
        """
        tensor_sizes("x", x, "B N d")
        return self._run["dimension_weights"](x, shifted)

    def distraction_scores(self, x: Tensor, dims: Sequence[int], *, shifted: bool = True) -> Tensor:
        """How far the distraction dimensions dominate each token: equation 6 [P 6].

        phi[i] = max over j in D_dis of w[i, j], w being `dimension_weights`.

        Args:
            x: patch tokens [B, N, d], any floating-point dtype.
            dims: D_dis, distinct indices in 0 .. d - 1. If empty, every score is 0 [D].
            shifted: as in `dimension_weights`.

        Returns:
            phi [B, N], float32 or float64.
        """
        dims = checks.dimension_list(dims, tensor_sizes("x", x, "B N d")["d"])
        if not dims:
            return x.new_zeros(x.shape[:2], dtype=computing_dtype(x))
        return self._run["distraction_scores"](x, dims, shifted)

    def distraction_mask(self, x: Tensor, dims: Sequence[int], threshold: float, *, shifted: bool = True) -> Tensor:
        """T_dis, the distraction tokens: phi[i] > threshold, the criterion of equation 6 [P 6].

        The joint criterion for ViT-L/14 (step 2) is this mask and `received_attention` above its own threshold.

        Args:
            x, dims, shifted: as in `distraction_scores`. Without dims, no token is a distraction token [D].
            threshold: a share of a token's sum; the paper's is 5 / d.

        Returns:
            bool [B, N]. The comparison is strict and made in the dtype of the scores.
        """
        dims = checks.dimension_list(dims, tensor_sizes("x", x, "B N d")["d"])
        threshold = checks.number("threshold", threshold)
        if not dims:
            return x.new_zeros(x.shape[:2], dtype=torch.bool)
        return self._run["distraction_mask"](x, dims, threshold, shifted)

    # Steps 1 and 3 between the branches of a block

    def add_layer_norm(
        self, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        """A branch joins the residual stream, and the stream is normalized for the next: no equation, but every block.

        s = x + branch,  y = (s - mean) / sqrt(var + eps) * weight + bias, mean and variance over d

        Args:
            x, branch: stream and branch [B, T, d], any floating-point dtypes.
            weight, bias: those of a `torch.nn.LayerNorm`, [d].
            eps: added to the variance.

        Returns:
            s and y, [B, T, d] of the dtype that x + branch has.
        """
        self._normed(x, branch, weight, bias)
        return self._run["add_layer_norm"](x, branch, weight, bias, checks.number("eps", eps, 0))

    def repaired_layer_norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        dims: Sequence[int],
        threshold: float,
        grid: tuple[int, int],
        *,
        eps: float = 1e-5,
        shifted: bool = True,
        size: int = 3,
        prefix: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`add_layer_norm` with the patches repaired in between, as the stream enters a block [P 6, P 13].

        s = x + branch, whose patches `distraction_mask` judges and `redistribute_embeddings` repairs; y is its norm.

        Args:
            x, branch, weight, bias, eps: as in `add_layer_norm`; the first block has no branch.
            dims, threshold, shifted: as in `distraction_mask`, at least one dimension.
            grid, size: as in `redistribute_embeddings`.
            prefix: as in `received_attention`.

        Returns:
            s and y, [B, T, d] of the dtype that x + branch has, and T_dis, bool [B, N].
        """
        sizes = self._normed(x, branch, weight, bias, {"prefix": checks.integer("prefix", prefix, 0)})
        checks.window_side(size)
        dims, (gh, gw) = self._some_dimensions(dims, sizes["d"]), checks.grid_sides(grid, sizes["N"])
        eps, threshold = checks.number("eps", eps, 0), checks.number("threshold", threshold)
        given = (x, branch, weight, bias, eps, dims, threshold, gh, gw, shifted, size, prefix)
        return self._run["repaired_layer_norm"](*given)

    def candidate_layer_norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        dims: Sequence[int],
        threshold: float,
        *,
        eps: float = 1e-5,
        shifted: bool = True,
        prefix: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`add_layer_norm` with the candidates of the joint criterion, the patches that `distraction_mask` marks.

        None is repaired yet: `joint_repair` does it, once queries and keys are known.

        Args:
            x, branch, weight, bias, eps, dims, threshold, shifted, prefix: as in `repaired_layer_norm`.

        Returns:
            s = x + branch and its norm y, [B, T, d] of the dtype that x + branch has; the candidates, bool [B, N]; and
            what s has in D_dis, a copy [B, N, |D_dis|].
        """
        sizes = self._normed(x, branch, weight, bias, {"prefix": checks.integer("prefix", prefix, 0)})
        dims = self._some_dimensions(dims, sizes["d"])
        eps, threshold = checks.number("eps", eps, 0), checks.number("threshold", threshold)
        given = (x, branch, weight, bias, eps, dims, threshold, shifted, prefix)
        return self._run["candidate_layer_norm"](*given)

    @staticmethod
    def _some_dimensions(dims: Sequence[int], d: int) -> list[int]:
        """Check distraction dimensions of a repair, which has at least one."""
        dims = checks.dimension_list(dims, d)
        if not dims:
            raise ValueError("dims must have at least one dimension; use add_layer_norm where nothing is repaired")
        return dims

    @staticmethod
    def _normed(
        x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, known: dict[str, int] | None = None
    ) -> dict[str, int]:
        """Check a stream and its norm; returns the sizes."""
        sizes = tensor_sizes("x", x, "B T d", known)
        if branch is not None:
            tensor_sizes("branch", branch, "B T d", sizes)
        for name, value in (("weight", weight), ("bias", bias)):
            tensor_sizes(name, value, "d", sizes)
        return sizes

    def quick_gelu(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        """OpenAI's approximation of GELU, x * sigmoid(1.702 x), elementwise.

        Args:
            x: of any shape and floating-point dtype.
            inplace: write into x and return it.

        Returns:
            Of x's shape and dtype, a new tensor unless `inplace`.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"x must be a floating-point tensor, got {checks.given(x)}")
        return self._run["quick_gelu"](x, inplace)

    # Step 2: the joint criterion

    def received_attention(self, q: Tensor, k: Tensor, *, scale: float | None = None, prefix: int = 1) -> Tensor:
        """The attention that each patch receives: the joint criterion for ViT-L/14 (appendix A of the paper).

        a[i] = mean over heads and patch queries of A[., i]. A distraction token must also have a[i] > tau_attn / N;
        the paper's threshold is unknown, and this project takes 5 / N, five times the uniform share [D].

        Args:
            q, k: queries and keys [B, H, T, D] of the same floating-point dtype.
            scale: factor of the logits, at least 0, D ** -0.5 by default.
            prefix: the number of leading tokens that are not patches, T > prefix.

        Returns:
            a [B, N], float32 or float64. The softmax runs over all T keys, so a sums to 1 minus the prefix's share.
        """
        sizes, scale = checks.heads(scale, prefix, q=q, k=k)
        return self._run["received_attention"](q, k, scale, sizes["prefix"])

    def joint_repair(
        self,
        x: Tensor,
        y: Tensor,
        before: Tensor,
        candidates: Tensor,
        q: Tensor,
        k: Tensor,
        weight: Tensor,
        bias: Tensor,
        dims: Sequence[int],
        threshold: float,
        grid: tuple[int, int],
        *,
        eps: float = 1e-5,
        size: int = 3,
        scale: float | None = None,
        prefix: int = 1,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 2 and 3 after `candidate_layer_norm`: T_dis among the candidates, and the repair of these tokens alone.

        T_dis = candidates with a[i] > threshold, a being `received_attention`; `redistribute_embeddings` repairs these
        patches of x, and y becomes their norm. All other tokens keep their bits.

        Args:
            x, y, candidates, before: as `candidate_layer_norm` returns them, [B, T, d] twice, bool [B, N] and
                [B, N, |D_dis|].
            q, k, scale, prefix: as in `received_attention`: queries and keys of y.
            weight, bias, eps: as in `add_layer_norm`, the norm that made y.
            dims: D_dis, of which there is at least one.
            threshold: of the received attention, the paper's tau_attn / N.
            grid, size: as in `redistribute_embeddings`.
            inplace: write into x and y and return them.

        Returns:
            x and y, [B, T, d] of their dtypes, new tensors unless `inplace`, and T_dis, bool [B, N].
        """
        sizes, scale = checks.heads(scale, prefix, q=q, k=k)
        sizes = self._normed(x, None, weight, bias, sizes)
        tensor_sizes("y", y, "B T d", sizes, x.dtype)
        checks.window_side(size)
        dims, (gh, gw) = self._some_dimensions(dims, sizes["d"]), checks.grid_sides(grid, sizes["N"])
        tensor_sizes("before", before, "B N J", sizes | {"J": len(dims)}, x.dtype)
        tensor_sizes("candidates", candidates, "B N", sizes, torch.bool)
        eps, threshold = checks.number("eps", eps, 0), checks.number("threshold", threshold)
        if not inplace:
            x, y = x.clone(), y.clone()
        given = (x, y, before, candidates, q, k, weight, bias, eps, dims, threshold, gh, gw, size, scale)
        return x, y, self._run["joint_repair"](*given, sizes["prefix"])

    def project_tokens(
        self,
        y: Tensor,
        mask: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        *,
        prefix: int = 1,
        inplace: bool = False,
    ) -> Tensor:
        """A linear layer on the masked patches alone, where `joint_repair` changed its input.

        out[i] <- y[i] weight^T + bias  for i in the mask; all other tokens keep their bits.

        Args:
            y: tokens [B, T, d], any floating-point dtype.
            mask: T_dis, bool [B, N].
            weight, bias: those of a `torch.nn.Linear`, [e, d] and [e], or None for no bias.
            out: what the layer made of y before, [B, T, e].
            prefix: as in `received_attention`.
            inplace: write into out and return it.

        Returns:
            [B, T, e] of out's dtype, a new tensor unless `inplace`. Factors are rounded to that dtype, as autocast does
            it, and their products summed in float32 or float64.
        """
        sizes = tensor_sizes("y", y, "B T d", {"prefix": checks.integer("prefix", prefix, 0)})
        tensor_sizes("mask", mask, "B N", sizes, torch.bool)
        sizes = tensor_sizes("weight", weight, "e d", sizes)
        if bias is not None:
            tensor_sizes("bias", bias, "e", sizes)
        tensor_sizes("out", out, "B T e", sizes)
        if not inplace:
            out = out.clone()
        self._run["project_tokens"](y, mask, weight, bias, out, sizes["prefix"])
        return out

    # Step 3: embeddings are repaired

    def redistribute_embeddings(
        self,
        x: Tensor,
        mask: Tensor,
        dims: Sequence[int],
        grid: tuple[int, int],
        *,
        size: int = 3,
        inplace: bool = False,
    ) -> Tensor:
        """Fill the distraction dimensions of distraction tokens from their neighbours: equation 13 [P 13].

        x[i, j] <- mean of x[n, j] over the neighbours n of i, for i in T_dis and j in D_dis only. The neighbours are
        the size x size window on the patch grid without its centre; those off the grid are left out, and the mean
        divides by the number that exist [D]. All reads are of the values before the update. Every other token and
        dimension keeps its bits exactly.

        Args:
            x: patch tokens [B, N, d], any floating-point dtype, in row-major order of the grid.
            mask: T_dis, bool [B, N].
            dims: D_dis, distinct indices in 0 .. d - 1.
            grid: (gh, gw) with gh * gw = N. On a 1 x 1 grid, which has no neighbours, the token stays as it is [D].
            size: side of the window, odd and at least 3; the paper compares 3, 5 and 7.
            inplace: write into x and return it.

        Returns:
            [B, N, d] of x's dtype, a new tensor unless `inplace`.
        """
        sizes = tensor_sizes("x", x, "B N d")
        tensor_sizes("mask", mask, "B N", sizes, torch.bool)
        checks.window_side(size)
        dims, (gh, gw) = checks.dimension_list(dims, sizes["d"]), checks.grid_sides(grid, sizes["N"])
        out = x if inplace else x.clone()
        if dims:
            self._run["redistribute_embeddings"](out, mask, dims, gh, gw, size)
        return out

    def clamp_embeddings(
        self, x: Tensor, mask: Tensor, dims: Sequence[int], threshold: float, *, shifted: bool = True
    ) -> Tensor:
        """Clamp the distraction dimensions of distraction tokens to the threshold: a variant of the paper's table 1.

        f[i, j] <- min(f[i, j], threshold * sum_k f[i, k]) for i in T_dis and j in D_dis, the sum taken before [D].

        Args:
            x, mask, dims: as in `redistribute_embeddings`.
            threshold, shifted: as in `distraction_mask`.

        Returns:
            A new tensor [B, N, d] of x's dtype; all other values keep their bits.
        """
        sizes = tensor_sizes("x", x, "B N d")
        tensor_sizes("mask", mask, "B N", sizes, torch.bool)
        dims = checks.dimension_list(dims, sizes["d"])
        return self._run["clamp_embeddings"](x, mask, dims, checks.number("threshold", threshold), shifted)

    def filter_embeddings(
        self, x: Tensor, mask: Tensor, grid: tuple[int, int], *, size: int = 3, statistic: str = "mean"
    ) -> Tensor:
        """Replace masked tokens by their window's mean or median: variants of the paper's tables 1 and 4.

        The window is size x size on the patch grid, its centre included; places off the grid are left out [D]. All
        dimensions are replaced. The median of an even number of values is the mean of the middle two [D].

        Args:
            x, mask, grid, size: as in `redistribute_embeddings`.
            statistic: "mean" or "median".

        Returns:
            A new tensor [B, N, d] of x's dtype; tokens that are not masked keep their bits.
        """
        sizes = tensor_sizes("x", x, "B N d")
        tensor_sizes("mask", mask, "B N", sizes, torch.bool)
        checks.window_side(size)
        gh, gw = checks.grid_sides(grid, sizes["N"])
        if statistic not in ("mean", "median"):
            raise ValueError(f'statistic must be "mean" or "median", got {statistic!r}')
        return self._run["filter_embeddings"](x, mask, gh, gw, size, statistic)

    def blend_embeddings(self, x: Tensor, mask: Tensor, grid: tuple[int, int], *, inplace: bool = False) -> Tensor:
        """Blend masked tokens with the mean of their 3 x 3 window: the repair of the released code [R].

        x[i] <- 0.6 x[i] + (0.4 / 9) * sum of x[n] over the window of i, its centre included, for i in the mask. Places
        off the grid count as zeros. All reads are of the values before the update.

        Args:
            x, mask, grid, inplace: as in `redistribute_embeddings`.

        Returns:
            [B, N, d] of x's dtype, a new tensor unless `inplace`; tokens that are not masked keep their bits.
        """
        sizes = tensor_sizes("x", x, "B N d")
        tensor_sizes("mask", mask, "B N", sizes, torch.bool)
        gh, gw = checks.grid_sides(grid, sizes["N"])
        out = x if inplace else x.clone()
        self._run["blend_embeddings"](out, mask, gh, gw)
        return out

    # Step 4: the defocused foreground

    def key_similarity(
        self,
        k: Tensor,
        running: Tensor | None = None,
        count: int = 0,
        *,
        scale: float | None = None,
        prefix: int = 1,
        inplace: bool = False,
    ) -> Tensor:
        """Similarity of the patches' keys, averaged over the layers so far: equation 7 [P 7].

        S[l] = (1 / l) * sum over l' <= l of mean_h softmax(k k^T * scale), one layer per call: given S of `count`
        layers, it returns (S * count + new) / (count + 1). The softmax runs over all T keys; the rows and columns of
        the prefix are dropped afterwards, without renormalizing.

        Args:
            k: this layer's keys [B, H, T, D], any floating-point dtype.
            running: the value returned for the layer before, [B, N, N] float32 (float64 if k is); None at the first.
            count: the number of layers in `running`; 0 at the first layer.
            scale, prefix: as in `received_attention`.
            inplace: write into `running`, if given, and return it.

        Returns:
            S [B, N, N], float32 or float64.
        """
        sizes, scale = checks.heads(scale, prefix, k=k)
        self._running(running, count, sizes, computing_dtype(k))
        if running is None:
            running = k.new_empty((sizes["B"], sizes["N"], sizes["N"]), dtype=computing_dtype(k))
        elif not inplace:
            running = running.clone()
        self._run["key_similarity"](k, running, count, scale, sizes["prefix"])
        return running

    def key_normalizers(
        self, k: Tensor, *, copy: Tensor | None = None, scale: float | None = None, prefix: int = 1
    ) -> Tensor:
        """The normalizers of key-key attention, which equations 7 and 14 share: the log of every row's sum.

        z[i] = log(sum over j of exp(k[i] . k[j] * scale))

        Args:
            k: keys [B, H, T, D], any floating-point dtype.
            copy: where to put a copy of the keys, while they are read: [B, H, T, D] of k's dtype.
            scale, prefix: as in `received_attention`.

        Returns:
            z [B, H, T], float32 or float64.
        """
        sizes, scale = checks.heads(scale, prefix, k=k)
        if copy is not None:
            tensor_sizes("copy", copy, "B H T D", sizes, k.dtype)
        return self._run["key_normalizers"](k, copy, scale, sizes["prefix"])

    def key_affinity(
        self,
        k: Tensor,
        normalizers: Tensor,
        running: Tensor | None = None,
        count: int = 0,
        *,
        scale: float | None = None,
        prefix: int = 1,
        inplace: bool = False,
    ) -> Tensor:
        """W of equation 8 as `defocused_tokens` reads it: `key_similarity` in half the memory [P 7].

        W = u (S + S^T) / 2  with  u = min(N, 2^15), the `affinity_unit` [D].

        Args:
            k, count, scale, prefix, inplace: as in `key_similarity`.
            normalizers: `key_normalizers` of k, [B, H, T].
            running: the value returned for the layer before; None at the first.

        Returns:
            W [B, N, N], float16 for keys in half precision, else float32 or float64; rows need not be contiguous.
        """
        sizes, scale = checks.heads(scale, prefix, k=k)
        tensor_sizes("normalizers", normalizers, "B H T", sizes, computing_dtype(k))
        self._running(running, count, sizes, affinity_dtype(k))
        if running is not None and not inplace:
            running = running.clone()
        return self._run["key_affinity"](k, normalizers, running, count, scale, sizes["prefix"])

    @staticmethod
    def _running(running: Tensor | None, count: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
        """Check a running mean [B, N, N] over `count` layers."""
        checks.integer("count", count, 0)
        if (running is None) != (count == 0):
            passed = "None" if running is None else "a tensor"
            raise ValueError(
                f"running must come with count >= 1, and None with count 0, got running {passed}, count {count}"
            )
        if running is not None:
            tensor_sizes("running", running, "B N N", sizes, dtype)

    def fiedler_vector(self, similarity: Tensor, start: Tensor | None = None) -> Tensor:
        """The second smallest eigenvector of the normalized cut: equation 8 [P 8].

        (Deg - W) y = lambda Deg y  with  W = (S + S^T) / 2 [D] and Deg = diag(W 1).

        Args:
            similarity: S [B, N, N], any floating-point dtype, no value negative.
            start: [B, N], an initial guess for the backends that iterate; the exact reference ignores it.

        Returns:
            y [B, N], float32 or float64, scaled to y^T Deg y = 1. The sign of an eigenvector is arbitrary: y is
            oriented so that the token of largest |y| is positive, hence defocused [D]. Where two tokens share the
            largest |y|, or two vectors the eigenvalue, rounding decides. A token without any similarity, whose row and
            column are 0, gets 0 [D], and so does a single patch (N = 1).
        """
        sizes = tensor_sizes("similarity", similarity, "B N N")
        if start is not None:
            tensor_sizes("start", start, "B N", sizes)
        if sizes["N"] == 1:
            return similarity.new_zeros((sizes["B"], 1), dtype=computing_dtype(similarity))
        return self._run["fiedler_vector"](similarity, start)

    def defocus_mask(self, fiedler: Tensor, distraction: Tensor | None = None, *, threshold: str = "mean") -> Tensor:
        """The defocused tokens, those above the cut: y[i] > mean(y), below equation 8 [P 8], except T_dis [D].

        Args:
            fiedler: y [B, N], any floating-point dtype, as `fiedler_vector` returns it.
            distraction: T_dis, bool [B, N]; without it, none is excepted. It does not change the threshold.
            threshold: "mean", or "otsu" for the variant of the paper's table 5: of the N - 1 ways to split the image's
                sorted values in two, the one with the largest between-class variance (exact, without a histogram [D];
                the lowest of equals), the threshold being the largest value of the lower class.

        Returns:
            bool [B, N]. A single patch (N = 1) is never above its own threshold, nor is any of N equal values with
            "otsu".
        """
        sizes = tensor_sizes("fiedler", fiedler, "B N")
        if distraction is not None:
            tensor_sizes("distraction", distraction, "B N", sizes, torch.bool)
        checks.cut_threshold(threshold)
        return self._run["defocus_mask"](fiedler, distraction, threshold)

    def defocused_tokens(
        self, affinity: Tensor, distraction: Tensor, start: Tensor | None = None, *, threshold: str = "mean"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`fiedler_vector` and `defocus_mask` at once, and the order in which attention reads the patches.

        Args:
            affinity: W [B, N, N] as `key_affinity` returns it, symmetric.
            distraction, threshold: as in `defocus_mask`.
            start: the vectors that this operation returned for the layer before; None at the first.

        Returns:
            vectors [B, R, N], float32 or float64, of which the first is y, and others, if there are any, help the next
            layer; the defocused tokens, bool [B, N]; and the order of the patches for `refocused_attention`, int32
            [B, N + 1]: the number of defocused tokens, those tokens, those that are neither, and distraction tokens n
            as -1 - n, each in ascending order. What is returned for an image without distraction is not specified.
        """
        sizes = tensor_sizes("affinity", affinity, "B N N")
        tensor_sizes("distraction", distraction, "B N", sizes, torch.bool)
        if start is not None:
            tensor_sizes("start", start, "B R N", sizes)
        checks.cut_threshold(threshold)
        return self._run["defocused_tokens"](affinity, distraction, start, threshold)

    # Step 5: attention moves

    def refocused_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        distraction: Tensor,
        target: Tensor,
        beta: float,
        *,
        scale: float | None = None,
        prefix: int = 1,
        order: Tensor | None = None,
    ) -> Tensor:
        """Attention that hands weight from distraction tokens to the target: equations 9 to 12 [P 9-12].

        Per head, for the rows i of patches (the rows of the prefix stay as they are [R]):

            A'[i, j] = (1 - beta) A[i, j]                                              for j in T_dis
            Omega[i] = beta * sum over j in T_dis of A[i, j]
            A'[i, j] = A[i, j] + Omega[i] * A[i, j] / sum over m in T_def of A[i, m]   for j in T_def
            A'[i, j] = A[i, j]                                                         for all other j

        Every row still sums to 1. A row without mass on T_dis or on T_def, for instance because one of the two is
        empty, stays unchanged: no weight is ever lost.

        Args:
            q, k, v: queries, keys and values [B, H, T, D] of the same floating-point dtype.
            distraction: T_dis, bool [B, N].
            target: where the weight goes, T_def or another set (the paper's table 6), bool [B, N] over the patches or
                [B, T] over all tokens. A token in both sets counts as distraction only.
            beta: the share of the weight that is taken, in [0, 1]; the paper's is 0.7. 0 is plain attention.
            scale, prefix: as in `received_attention`.
            order: of these sets, from `defocused_tokens`, if it is known; which is not checked.

        Returns:
            A' v, [B, H, T, D] of the inputs' dtype; logits, softmax and sums are float32 or float64.
        """
        sizes, scale = checks.heads(scale, prefix, q=q, k=k, v=v)
        tensor_sizes("distraction", distraction, "B N", sizes, torch.bool)
        tensor_sizes("target", target, "B N | B T", sizes, torch.bool)
        if order is not None:
            tensor_sizes("order", order, "B N1", sizes | {"N1": sizes["N"] + 1}, torch.int32)
        beta = checks.number("beta", beta, 0, 1)
        return self._run["refocused_attention"](q, k, v, distraction, target, beta, scale, sizes["prefix"], order)

    def self_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        prefix: int = 1,
        factor: float = 1.0,
        out: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """out + factor softmax(q k^T * scale + bias) v, on which most other methods build.

        SCLIP and ClearCLIP take the same vector for q and k; NACLIP adds a Gaussian of the distance between patches;
        others add the attention of several blocks, one call after the other.

        Args:
            q, k, v: queries, keys and values, [B, H, T, D] of the same floating-point dtype.
            bias: floating-point, the same for all heads; the rows and columns of the prefix have none. The logit of
                patches i and j gets bias[row_i - row_j + gh - 1, column_i - column_j + gw - 1] of [2 gh - 1, 2 gw - 1]
                with gh * gw = N, which is for all images, or bias[b, i, j] of [B, N, N].
            scale: a factor of the logits, at least 0, D ** -0.5 by default; or any for each image, floating-point [B].
            prefix: as in `received_attention`.
            factor: of what is added.
            out: to what it is added, [B, H, T, D] of the inputs' dtype; nothing by default.
            inplace: write into `out`, if given, and return it.

        Returns:
            [B, H, T, D] of the inputs' dtype, a new tensor unless `inplace`; logits, softmax and sums are float32 or
            float64.
        """
        scales = scale if isinstance(scale, Tensor) else None
        sizes, scale = checks.heads(None if isinstance(scale, Tensor) else scale, prefix, q=q, k=k, v=v)
        if scales is not None:
            tensor_sizes("scale", scales, "B", sizes)
        factor = checks.number("factor", factor)
        if isinstance(bias, Tensor) and bias.dim() == 3:
            tensor_sizes("bias", bias, "B N N", sizes)
        elif bias is not None:
            checks.offset_table(bias, sizes["N"])
        if out is not None:
            tensor_sizes("out", out, "B H T D", sizes, v.dtype)
            out = out if inplace else out.clone()
        scale = scale if scales is None else scales
        return self._run["self_attention"](q, k, v, bias, scale, sizes["prefix"], factor, out)

    # Step 6: dense features

    def proxy_attention(
        self,
        keys: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        prefix: int = 1,
        normalizers: Tensor | None = None,
    ) -> Tensor:
        """The attention of the dense prediction, before the output projection: equation 14 [P 14].

        Abar = (1 / L) * sum over l of softmax(k[l] k[l]^T * scale) per head, the rows and columns of the prefix dropped
        afterwards without renormalizing [R], times the values of the patches.

        Args:
            keys: the keys of L layers [L, B, H, T, D], any floating-point dtype.
            v: the values of the last layer [B, H, T, D], of the same dtype.
            scale, prefix: as in `received_attention`.
            normalizers: `key_normalizers` of every layer, [L, B, H, T], if they are known.

        Returns:
            Abar v, [B, H, N, D] of the inputs' dtype.
        """
        sizes = tensor_sizes("keys", keys, "L B H T D", {"prefix": checks.integer("prefix", prefix, 0)})
        tensor_sizes("v", v, "B H T D", sizes, keys.dtype)
        if normalizers is not None:
            tensor_sizes("normalizers", normalizers, "L B H T", sizes, computing_dtype(keys))
        scale = checks.attention_scale(scale, sizes["D"])
        return self._run["proxy_attention"](keys, v, scale, sizes["prefix"], normalizers)

    def cosine_aggregation(self, guide: Tensor, x: Tensor, cut: float | Tensor, *, gain: float | None = None) -> Tensor:
        """Sum over similar patches, weighted by their cosines: the last block's input in the released code [R].

        out[i] = sum of w[i, j] x[j] over the j with w[i, j] >= cut,  w[i, j] = <g[i], g[j]> / (|g[i]| |g[j]|)

        Weights are not normalized. A g[i] of zeros has cosines 0. A cosine within rounding of the cut may fall on
        either side of it. With a gain, as attention across windows has it, the patch itself always counts, and

        out[i] = sum of exp(gain w[i, j]) x[j] / sum of exp(gain w[i, j]) over the same j

        Args:
            guide: g, patch tokens [B, N, d], any floating-point dtype.
            x: what is summed, [B, N, e] of the same dtype; several tensors share the cosines if they are concatenated.
            cut: the least cosine that counts, or one for each image, floating-point [B]; the released code's is 0.4.
            gain: a factor of at least 0.

        Returns:
            A new tensor [B, N, e] of x's dtype.
        """
        sizes = tensor_sizes("guide", guide, "B N d")
        tensor_sizes("x", x, "B N e", sizes, guide.dtype)
        if isinstance(cut, Tensor):
            tensor_sizes("cut", cut, "B", sizes)
        else:
            cut = checks.number("cut", cut)
        gain = gain if gain is None else checks.number("gain", gain, 0)
        return self._run["cosine_aggregation"](guide, x, cut, gain)

    # Step 8: from windows to pixels

    def average_windows(
        self, logits: Tensor, corners: Sequence[tuple[int, int]], window: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """The patch logits of overlapping windows as logits of the pixels below them.

        Each window is resized bilinearly (align_corners=False) to its pixels; a pixel's logits are the mean over the
        windows that cover it.

        Args:
            logits: those of W windows for K names, [W, K, gh, gw], any floating-point dtype.
            corners: the (top, left) pixel of each window. Every window must lie inside the picture, and together they
                must cover it.
            window: (height, width) of a window in pixels.
            size: (h, w) of the picture in pixels.

        Returns:
            [K, h, w], float32 or float64.
        """
        windows = tensor_sizes("logits", logits, "W K gh gw")["W"]
        h, w = checks.picture_size(size)
        height, width = checks.picture_size(window, "window")
        corners = checks.covering_windows(corners, windows, height, width, h, w)
        return self._run["average_windows"](logits, corners, height, width, h, w)

    def class_probabilities(
        self,
        logits: Tensor,
        size: tuple[int, int],
        logit_scale: float,
        class_of_name: Tensor,
        classes: int,
        rows: range | None = None,
    ) -> Tensor:
        """The probability of each class at each pixel of a picture.

        Logits are resized bilinearly (align_corners=False), multiplied by the scale and turned into probabilities by a
        softmax over names; a class takes the largest probability of its names.

        Args:
            logits: those of K names, [K, h, w], any floating-point dtype.
            size: (H, W) of the picture.
            logit_scale: factor of the logits.
            class_of_name: the class of each name, int64 [K] with values in 0 .. classes - 1, which are not checked. The
                names of a class need not be adjacent. A class without a name has probability 0.
            classes: C, the number of classes.
            rows: which rows of the picture to return; all of them by default.

        Returns:
            [C, len(rows), W], float32 or float64.
        """
        H, W = self._pixels(logits, size, logit_scale, class_of_name)
        checks.integer("classes", classes, 1)
        every = range(H)
        rows = every if rows is None else rows
        if not isinstance(rows, range) or not len(rows) or rows[0] not in every or rows[-1] not in every:
            raise ValueError(f"rows must be a range, not empty, of rows in 0 .. {H - 1}, got {rows!r}")
        return self._run["class_probabilities"](logits, H, W, float(logit_scale), class_of_name, classes, rows)

    def upsample_argmax(
        self,
        logits: Tensor,
        size: tuple[int, int],
        logit_scale: float,
        class_of_name: Tensor,
        threshold: float | None = None,
    ) -> Tensor:
        """The most probable class at each pixel of a picture.

        It is the argmax over `class_probabilities`, the lowest class of equals, without storing them: it is the class
        of the most probable name.

        Args:
            logits, size, logit_scale: as in `class_probabilities`.
            class_of_name: the class of each name, int64 [K] with values in 0 .. 2^31 - 2, which are not checked.
            threshold: pixels whose largest class probability is below it, in [0, 1], get no class; by default every
                pixel gets one.

        Returns:
            int32 [H, W], the class, or -1 for none.
        """
        H, W = self._pixels(logits, size, logit_scale, class_of_name)
        if threshold is not None:
            threshold = checks.number("threshold", threshold, 0, 1)
        return self._run["upsample_argmax"](logits, H, W, float(logit_scale), class_of_name, threshold)

    @staticmethod
    def _pixels(logits: Tensor, size: tuple[int, int], logit_scale: float, class_of_name: Tensor) -> tuple[int, int]:
        """Check what the two operations on a picture's logits share; returns (H, W)."""
        sizes = tensor_sizes("logits", logits, "K h w")
        tensor_sizes("class_of_name", class_of_name, "K", sizes, torch.int64)
        checks.number("logit_scale", logit_scale)
        return checks.picture_size(size)

    # Step 9: PAMR

    def pamr(self, image: Tensor, mask: Tensor, iterations: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
        """Pixel-adaptive mask refinement.

        Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020. A pixel's neighbours p
        are the 8 places around it at each dilation d, at offsets of -d, 0 or d along both axes; beyond the border the
        picture repeats its edge. In each iteration a pixel of the mask becomes the mean of its neighbours, itself left
        out, weighted by the softmax over p of

            mean over channels c of  -|image[c] - image[c, p]| / (1e-8 + 0.1 std[c])

        with std[c] the unbiased standard deviation over all neighbours and, once for each dilation, the pixel itself.

        Args:
            image: [B, CI, H, W] of any number CI of channels, any floating-point dtype.
            mask: scores or probabilities of C classes, [B, C, H, W], any floating-point dtype.
            iterations: how often to refine; 0 returns a copy of the mask.
            dilations: in pixels; they may exceed the picture.

        Returns:
            [B, C, H, W] of mask's dtype. It is computed in float64 if image or mask is float64, else in float32.
        """
        sizes = tensor_sizes("image", image, "B CI H W")
        tensor_sizes("mask", mask, "B C H W", sizes)
        iterations = checks.integer("iterations", iterations, 0)
        whole = isinstance(dilations, Sequence) and all(isinstance(d, Integral) and d >= 1 for d in dilations)
        if not whole or not dilations:
            raise ValueError(
                f"dilations must be a sequence of integers of at least 1, and not empty, got {dilations!r}"
            )
        return self._run["pamr"](image, mask, iterations, [int(d) for d in dilations])


OPERATIONS = tuple(name for name in vars(Operations) if not name.startswith("_"))
