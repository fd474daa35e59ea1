"""Every operation with example inputs, and the kernel that runs it: one entry for each.

Tests, `make report` and `make bench` call an operation with the inputs of its entry, on tensors of a tower's sizes:
random ones on a CPU or a GPU, or tensors without data.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .operations import affinity_dtype

Inputs = dict[str, object]


@dataclass(frozen=True)
class Sizes:
    """The sizes of an image tower at one size of image, and how tensors of these sizes are made.

    Attributes:
        B, H, D, L: images, heads, head dimension, layers.
        grid: (gh, gw).
        prefix: tokens in front of the patches.
        dtype: of activations; scores are float32, or float64 if activations are.
        device: where tensors live.
        seed: of random values; None leaves tensors uninitialized, which tensors without data need.
        names: class names K.
        patch: pixels per patch.
        iterations: of PAMR.
    """

    B: int = 1
    H: int = 12
    D: int = 64
    L: int = 12
    grid: tuple[int, int] = (14, 14)
    prefix: int = 1
    dtype: torch.dtype = torch.float16
    device: str = "cpu"
    seed: int | None = 0
    names: int = 171
    patch: int = 16
    iterations: int = 10

    @property
    def N(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def T(self) -> int:
        return self.prefix + self.N

    @property
    def d(self) -> int:
        return self.H * self.D

    @property
    def dims(self) -> list[int]:
        """Up to eight distraction dimensions."""
        return list(range(min(4, self.d - 1), self.d, math.ceil(self.d / 8)))

    @property
    def score_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed or 0)

    def tensor(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed values, or none."""
        dtype = dtype or self.dtype
        if self.seed is None:
            return torch.empty(sizes, dtype=dtype, device=self.device)
        return torch.randn(sizes, generator=self._generator, device=self.device, dtype=torch.float32).to(dtype)

    def scores(self, *sizes: int) -> Tensor:
        return self.tensor(*sizes, dtype=self.score_dtype)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [B, H, T, D], as views of the packed projection."""
        q, k, v = self.tensor(self.B, self.T, 3, self.H, self.D).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def patches(self) -> Tensor:
        """Patch tokens [B, N, d], as a view of all tokens; every tenth is over-active."""
        x = self.tensor(self.B, self.T, self.d)[:, self.prefix :]
        if self.seed is not None:
            x[..., self.dims[0]] += 40 * self.mask(10)
        return x

    def mask(self, every: int) -> Tensor:
        """bool [B, N], True at every `every`-th patch, at another offset in each image."""
        if self.seed is None:
            return torch.empty((self.B, self.N), dtype=torch.bool, device=self.device)
        patch = torch.arange(self.N, device=self.device) + torch.arange(self.B, device=self.device)[:, None]
        return patch % every == 0

    def similarity(self) -> Tensor:
        """[B, N, N], of patches in two groups."""
        noise = self.scores(self.B, self.N, self.N)
        if self.seed is None:
            return noise
        group = self.group()
        return (2.0 * (group[:, None] == group) + noise / 2).softmax(dim=-1)

    def group(self) -> Tensor:
        """Whether a patch is in the first of the two groups, bool [N]."""
        return torch.arange(self.N, device=self.device) < math.ceil(self.N / 3)

    def near_cut(self, affinity: Tensor) -> Tensor:
        """Vectors [B, 7, N] near those that the cut of W [B, N, N] looks for."""
        start = self.scores(self.B, 7, self.N)
        if self.seed is None:
            return start
        root = affinity.double().sum(dim=-1, keepdim=True).sqrt()
        _, u = torch.linalg.eigh(affinity / root / root.mT)
        exact = (u / root)[:, :, -8:-1].flip(-1).mT
        return (exact + start.double() * exact.std() / 1000).to(start.dtype)

    def affinity(self) -> Tensor:
        """W [B, N, N] of the same groups, symmetric, with rows that are aligned."""
        dtype = affinity_dtype(torch.empty(0, dtype=self.dtype))
        W = self.tensor(self.B, self.N, -(-self.N // 16) * 16, dtype=dtype)[:, :, : self.N]
        if self.seed is not None:
            S = self.similarity()
            W.copy_((S + S.mT) * (self.N / 2))
        return W

    def normalizers(self, keys: Tensor) -> Tensor:
        """Those of keys [L, B, H, T, D], layer by layer."""
        if self.seed is None:
            return self.scores(*keys.shape[:-1])
        return torch.stack([(k @ k.mT * self.D**-0.5).logsumexp(dim=-1) for k in keys.to(self.score_dtype)])

    def classes(self) -> Tensor:
        """The class of each name, int64 [K], three names to a class."""
        if self.seed is None:
            return torch.empty(self.names, dtype=torch.int64, device=self.device)
        return torch.arange(self.names, device=self.device) // 3


@dataclass(frozen=True)
class Products:
    """What a Triton kernel multiplies and reads, for the report; the arguments `a` are those of its launch.

    Attributes:
        tiles: products of [BM, BD] with [BD, BN] in one program, one number for each possible count of target keys, or
            of marked patches, if it depends on that; None if the kernel multiplies no matrices.
        vectors: products of [BM, BD] with a single key [BD].
        updated: the names of tensors that a launch reads and writes.
        sparse: tensors of which only a few places are touched, which count as nothing.
        few: whether it multiplies a few vectors only, which counts as nothing and is no fault in fp32.
    """

    tiles: Callable[[dict], Iterable[float]] | None = None
    vectors: Callable[[dict], int] = lambda a: 0
    updated: Callable[[dict], tuple[str, ...]] = lambda a: ()
    sparse: tuple[str, ...] = ()
    few: bool = False


@dataclass(frozen=True)
class Sweep:
    """An operation that multiplies matrices, compared with `count` plain flash attentions of `rows` queries.

    The least work per head is a product of [rows, D] with [D, T] and, for what `products` is more than 1, of [rows, N]
    with [N, D].
    """

    products: Callable[[Sizes], float]
    count: Callable[[Sizes], int] = lambda s: 1
    rows: Callable[[Sizes], int] = lambda s: s.N
    goal: bool = False  # held to the goals of the report
    head_dims: bool = True  # compiled for every head dimension


@dataclass(frozen=True)
class Example:
    """An operation with example inputs.

    Attributes:
        operation: a method of `Operations`.
        inputs: its arguments by name.
        variant: tells apart the examples of one operation; "" for the plain one.
        module: where `launch_<operation>` and its kernels are; None where PyTorch runs the operation.
        sweep: for operations that multiply matrices.
        kernels: what their Triton kernels multiply and read, by name, unless that is nothing special.
        batched: whether it works on a batch of images, rather than on one picture.
    """

    operation: str
    inputs: Callable[[Sizes], Inputs]
    variant: str = ""
    module: str | None = None
    sweep: Sweep | None = None
    kernels: dict[str, Products] = field(default_factory=dict, hash=False)
    batched: bool = True

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.variant}" if self.variant else self.operation


def _scored(s: Sizes) -> Inputs:
    return {"x": s.patches(), "dims": s.dims}


def _masked(s: Sizes) -> Inputs:
    return {"x": s.patches(), "mask": s.mask(10), "dims": s.dims}


def _stream(s: Sizes) -> Tensor:
    """All tokens [B, T, d]."""
    x = s.tensor(s.B, s.T, s.d)
    x[:, s.prefix :] = s.patches()
    return x


def _normed(s: Sizes) -> Inputs:
    return {"x": _stream(s), "branch": s.tensor(s.B, s.T, s.d), "weight": s.scores(s.d), "bias": s.scores(s.d)}


def _repaired(s: Sizes) -> Inputs:
    return _normed(s) | {"dims": s.dims, "threshold": 5 / s.d, "grid": s.grid, "prefix": s.prefix}


def _candidates(s: Sizes) -> Inputs:
    return _normed(s) | {"dims": s.dims, "threshold": 5 / s.d, "prefix": s.prefix}


def _joint(s: Sizes) -> Inputs:
    """Of the candidates, those that receive more than the uniform share are repaired."""
    q, k, _ = s.heads()
    x, y = _stream(s), s.tensor(s.B, s.T, s.d)
    before = torch.stack([x[:, s.prefix :, j] for j in s.dims], dim=-1)
    inputs: Inputs = {"x": x, "y": y, "before": before, "candidates": s.mask(4), "q": q, "k": k, "threshold": 1 / s.T}
    inputs |= {"weight": s.scores(s.d), "bias": s.scores(s.d)}
    return inputs | {"dims": s.dims, "grid": s.grid, "prefix": s.prefix}


def _projected(s: Sizes) -> Inputs:
    """The packed projection of query, key and value."""
    inputs = {"y": s.tensor(s.B, s.T, s.d), "mask": s.mask(10), "weight": s.tensor(3 * s.d, s.d) / s.d**0.5}
    return inputs | {"bias": s.tensor(3 * s.d), "out": s.tensor(s.B, s.T, 3 * s.d), "prefix": s.prefix}


def _filtered(s: Sizes) -> Inputs:
    return {"x": s.patches(), "mask": s.mask(10), "grid": s.grid}


def _keys(s: Sizes) -> Inputs:
    return {"k": s.heads()[1], "prefix": s.prefix}


def _affine(s: Sizes) -> Inputs:
    k = s.heads()[1]
    return {"k": k, "normalizers": s.normalizers(k[None])[0], "prefix": s.prefix}


def _proxy(s: Sizes) -> Inputs:
    return {"keys": s.tensor(s.L, s.B, s.H, s.T, s.D), "v": s.heads()[2], "prefix": s.prefix}


def _known(s: Sizes) -> Inputs:
    keys = s.tensor(s.L, s.B, s.H, s.T, s.D)
    return {"keys": keys, "v": s.heads()[2], "prefix": s.prefix, "normalizers": s.normalizers(keys)}


def _tokens(s: Sizes) -> Inputs:
    return {"affinity": s.affinity(), "distraction": s.mask(10)}


def _later_tokens(s: Sizes) -> Inputs:
    affinity = s.affinity()
    return {"affinity": affinity, "distraction": s.mask(10), "start": s.near_cut(affinity)}


def _cut(s: Sizes) -> Inputs:
    return {"fiedler": s.scores(s.B, s.N), "distraction": s.mask(10)}


def _aggregated(s: Sizes) -> Inputs:
    """Two tensors at once."""
    x = s.patches()
    return {"guide": x, "x": torch.cat([x, s.patches()], dim=-1), "cut": 0.4}


def _refocused(s: Sizes) -> Inputs:
    q, k, v = s.heads()
    return {"q": q, "k": k, "v": v, "distraction": s.mask(10), "target": s.mask(3), "beta": 0.7, "prefix": s.prefix}


def _self(s: Sizes) -> Inputs:
    _, k, v = s.heads()
    return {"q": k, "k": k, "v": v, "prefix": s.prefix}


def _added(s: Sizes) -> Inputs:
    """Another block's attention, with a bias and a scale of each image."""
    q, k, v = s.heads()
    inputs = {"q": q, "k": k, "v": v, "bias": s.scores(s.B, s.N, s.N), "scale": s.scores(s.B) ** 2, "factor": 0.5}
    return inputs | {"prefix": s.prefix, "out": s.tensor(s.B, s.H, s.T, s.D), "inplace": True}


def _windows(s: Sizes) -> Inputs:
    """Four square windows that overlap by half."""
    gh = min(s.grid)
    side = gh * s.patch
    corners = [(top, left) for top in (0, side // 2) for left in (0, side // 2)]
    far = side + side // 2
    return {"logits": s.tensor(4, s.names, gh, gh), "corners": corners, "window": (side, side), "size": (far, far)}


def _pixels(s: Sizes) -> Inputs:
    """Logits for a picture of twice the size of what the tower saw."""
    h, w = (side * s.patch for side in s.grid)
    logits = s.scores(s.names, h, w)
    return {"logits": logits, "size": (2 * h, 2 * w), "logit_scale": 40.0, "class_of_name": s.classes()}


def _pamr(s: Sizes) -> Inputs:
    h, w = (side * s.patch for side in s.grid)
    return {"image": s.tensor(s.B, 3, h, w), "mask": s.tensor(s.B, 21, h, w), "iterations": s.iterations}


def _two_runs(a: dict) -> list[int]:
    N = a["T"] - a["PREFIX"]
    return [2 * (-(-n // a["BN"]) + -(-(N - n) // a["BN"])) for n in range(N + 1)]


def _cosines(a: dict) -> list[int]:
    return [-(-a["N"] // a["BN"]) * (-(-a["d"] // a["BD"]) + a["BC"] // a["BD"])]


def _patches(a: dict) -> int:
    return a["T"] - a["PREFIX"]


def _columns(a: dict) -> list[float]:
    """The log-sum-exp, and the columns of the candidates, of which an image without any needs neither."""
    N, BN = _patches(a), a["BN"]
    every = -(-N // BN)
    return [every + -(-n // BN) if n else 0 for n in (range(N + 1) if a["CHOOSE"] else [N])]


def _some_rows(a: dict) -> list[float]:
    """The mean over programs, of which those beyond the tokens do nothing."""
    N, BM = _patches(a), a["BM"]
    return [-(-n // BM) / -(-N // BM) * -(-a["d"] // a["BD"]) for n in range(N + 1)]


def _one(s: Sizes) -> float:
    return 1


def _two(s: Sizes) -> float:
    return 2


_ATTENTION = Sweep(_two, rows=lambda s: s.T, goal=True)
_REFOCUSED = {"refocused_attention_kernel": Products(_two_runs, lambda a: a["PREFIX"])}
_SWEPT = {
    "self_attention_kernel": Products(
        lambda a: [2 * a["L"] * -(-_patches(a) // a["BN"])],
        lambda a: a["L"] * a["PREFIX"],
        updated=lambda a: ("out_ptr",) if a["ADD"] else (),
    )
}
_SUMMED = {"proxy_attention_kernel": Products(lambda a: [(a["L"] + 1) * -(-_patches(a) // a["BN"])])}
_LOGSUMEXP = {"row_logsumexp_kernel": Products(lambda a: [-(-_patches(a) // a["BN"])], lambda a: a["PREFIX"])}
_SIMILARITY = _LOGSUMEXP | {
    "key_similarity_kernel": Products(lambda a: [a["H"]], updated=lambda a: ("running_ptr",) if a["count"] else ())
}
_RECEIVED = {"received_attention_kernel": Products(_columns, lambda a: a["PREFIX"], sparse=("sums_ptr",))}
_JOINT = _RECEIVED | {"joint_repair_kernel": Products(sparse=("sums_ptr", "before_ptr", "x_ptr", "y_ptr"))}
_PROJECTED = {"project_tokens_kernel": Products(_some_rows, sparse=("y_ptr", "out_ptr"))}
_CUT = {f"cut{step}_kernel": Products(few=True) for step in ("", "_first", "_next", "_round")}
_REPAIRED = {"redistribute_kernel": Products(sparse=("x_ptr",))}

EXAMPLES = (
    Example("dimension_weights", lambda s: {"x": s.patches()}),
    Example("distraction_scores", _scored, module="distraction"),
    Example("distraction_mask", lambda s: _scored(s) | {"threshold": 5 / s.d}, module="distraction"),
    Example(
        "distraction_mask",
        lambda s: _scored(s) | {"threshold": 5 / s.d, "shifted": False},
        "not shifted",
        module="distraction",
    ),
    Example(
        "received_attention",
        lambda s: dict(zip("qk", s.heads()[:2], strict=True)) | {"prefix": s.prefix},
        module="joint",
        sweep=Sweep(_one),
        kernels=_RECEIVED,
    ),
    Example("joint_repair", _joint, module="joint", sweep=Sweep(_one), kernels=_JOINT),
    Example(
        "joint_repair",
        lambda s: _joint(s) | {"inplace": True, "size": 5},
        "in place",
        module="joint",
        sweep=Sweep(_one, head_dims=False),
        kernels=_JOINT,
    ),
    Example("project_tokens", _projected, module="joint", kernels=_PROJECTED),
    Example("project_tokens", lambda s: _projected(s) | {"bias": None}, "no bias", module="joint", kernels=_PROJECTED),
    Example(
        "redistribute_embeddings", lambda s: _masked(s) | {"grid": s.grid}, module="distraction", kernels=_REPAIRED
    ),
    Example(
        "redistribute_embeddings",
        lambda s: _masked(s) | {"grid": s.grid, "size": 7},
        "7 x 7",
        module="distraction",
        kernels=_REPAIRED,
    ),
    Example("add_layer_norm", _normed, module="stream"),
    Example("repaired_layer_norm", _repaired, module="stream"),
    Example("repaired_layer_norm", lambda s: _repaired(s) | {"branch": None, "size": 5}, "no branch", module="stream"),
    Example("candidate_layer_norm", _candidates, module="stream"),
    Example(
        "quick_gelu",
        lambda s: {"x": s.tensor(s.B, s.T, 4 * s.d)},
        module="stream",
        kernels={"quick_gelu_kernel": Products(updated=lambda a: ("out_ptr",) if a["out_ptr"] is a["x_ptr"] else ())},
    ),
    Example("clamp_embeddings", lambda s: _masked(s) | {"threshold": 5 / s.d}),
    Example("filter_embeddings", _filtered),
    Example("filter_embeddings", lambda s: _filtered(s) | {"statistic": "median"}, "median"),
    Example("blend_embeddings", _filtered, module="released", kernels={"blend_kernel": Products(sparse=("x_ptr",))}),
    Example(
        "key_similarity",
        _keys,
        "first block",
        module="similarity",
        sweep=Sweep(_one),
        kernels=_SIMILARITY,
    ),
    Example(
        "key_similarity",
        lambda s: {"k": s.heads()[1], "running": s.similarity(), "count": 1, "prefix": s.prefix, "inplace": True},
        "later block",
        module="similarity",
        sweep=Sweep(_one, head_dims=False),
        kernels=_SIMILARITY,
    ),
    Example(
        "key_normalizers",
        lambda s: _keys(s) | {"copy": s.tensor(s.B, s.H, s.T, s.D)},
        module="similarity",
        sweep=Sweep(_one),
        kernels=_SIMILARITY,
    ),
    Example(
        "key_affinity",
        _affine,
        "first block",
        module="similarity",
        sweep=Sweep(_one),
        kernels=_SIMILARITY,
    ),
    Example(
        "key_affinity",
        lambda s: _affine(s) | {"running": s.affinity(), "count": 1, "inplace": True},
        "later block",
        module="similarity",
        sweep=Sweep(_one, head_dims=False),
        kernels=_SIMILARITY,
    ),
    Example(
        "fiedler_vector",
        lambda s: {"similarity": s.similarity(), "start": s.scores(s.B, s.N)},
        module="cut",
        kernels=_CUT,
    ),
    Example("defocus_mask", _cut, module="defocus"),
    Example("defocus_mask", lambda s: _cut(s) | {"threshold": "otsu"}, "Otsu", module="defocus"),
    Example("defocused_tokens", _tokens, "first block", module="cut", kernels=_CUT),
    Example("defocused_tokens", _later_tokens, "later block", module="cut", kernels=_CUT),
    Example("refocused_attention", _refocused, module="attention", sweep=_ATTENTION, kernels=_REFOCUSED),
    Example("self_attention", _self, module="attention", sweep=_ATTENTION, kernels=_SWEPT),
    Example(
        "self_attention",
        lambda s: _self(s) | {"bias": s.scores(2 * s.grid[0] - 1, 2 * s.grid[1] - 1)},
        "bias",
        module="attention",
        sweep=_ATTENTION,
        kernels=_SWEPT,
    ),
    Example("self_attention", _added, "added, bias of patches", module="attention", sweep=_ATTENTION, kernels=_SWEPT),
    Example(
        "proxy_attention",
        _proxy,
        module="attention",
        sweep=Sweep(_two, count=lambda s: s.L, goal=True),
        kernels=_SWEPT,
    ),
    Example(
        "proxy_attention",
        _known,
        "known normalizers",
        module="attention",
        sweep=Sweep(lambda s: 1 + 1 / s.L - s.prefix / s.N, count=lambda s: s.L, goal=True),
        kernels=_SUMMED,
    ),
    Example(
        "cosine_aggregation",
        _aggregated,
        module="released",
        kernels={"cosine_aggregation_kernel": Products(_cosines)},
    ),
    Example(
        "cosine_aggregation",
        lambda s: _aggregated(s) | {"cut": s.scores(s.B) / 10, "gain": 3.0},
        "gain",
        module="released",
        kernels={"cosine_aggregation_kernel": Products(_cosines)},
    ),
    Example("average_windows", _windows, module="upsample", batched=False),
    Example("class_probabilities", lambda s: _pixels(s) | {"classes": -(-s.names // 3)}, batched=False),
    Example("upsample_argmax", lambda s: _pixels(s) | {"threshold": 0.1}, module="upsample", batched=False),
    Example("pamr", _pamr, module="refinement"),
)
KERNELS = {example.operation: example for example in EXAMPLES if example.module}
