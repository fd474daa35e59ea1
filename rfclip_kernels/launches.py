"""What every operator launches, recorded from the operator itself, and counted: operations and bytes.

Each operator runs on tensors without data, and what it would launch is kept with its grid, arguments and options, so
that what `rfclip_kernels.report` compiles and counts cannot drift from what runs. Nothing here is measured.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton import cdiv
from triton.runtime.jit import JITFunction, MockTensor

from rfclip_kernels import attention, cut, distraction, refinement, similarity, upsample

MOST_OPERATIONS = 1.02  # of plain flash attention's
MOST_BYTES = 1.10  # of the least


@dataclass(frozen=True)
class Shape:
    """An image tower at one size of image, batch 1."""

    model: str
    size: tuple[int, int] = (224, 224)
    dtype: torch.dtype = torch.float16
    D: int = 64

    @property
    def H(self) -> int:
        return 12 if self.model == "ViT-B/16" else 16

    @property
    def L(self) -> int:
        return 12 if self.model == "ViT-B/16" else 24

    @property
    def grid(self) -> tuple[int, int]:
        patch = int(self.model[-2:])
        return self.size[0] // patch, self.size[1] // patch

    @property
    def image(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"

    @property
    def N(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def T(self) -> int:
        return self.N + 1

    @property
    def dims(self) -> list[int]:
        """Eight distraction dimensions."""
        return list(range(4, self.H * self.D, self.H * self.D // 8))

    def empty(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(sizes, dtype=dtype or self.dtype, device="cuda")

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [B, H, T, D], as views of the packed projection."""
        return self.empty(1, self.T, 3, self.H, self.D).permute(2, 0, 3, 1, 4).unbind()

    def patches(self) -> Tensor:
        return self.empty(1, self.T, self.H * self.D)[:, 1:]

    def mask(self) -> Tensor:
        return self.empty(1, self.N, dtype=torch.bool)

    def similarity(self) -> Tensor:
        return self.empty(1, self.N, self.N, dtype=torch.float32)

    def vector(self) -> Tensor:
        return self.empty(1, self.N, dtype=torch.float32)


SHAPES = [Shape(model, size) for model in ("ViT-B/16", "ViT-L/14") for size in ((224, 224), (336, 448), (672, 896))]


@dataclass(frozen=True)
class Op:
    """A public operator, called as `function(*inputs(shape))`.

    An operator that multiplies matrices is compared with `sweeps` plain flash attentions of `rows` queries. The least
    for each is a product of [rows, D] with [D, T] a head and, where `products` is 2, one of [rows, N] with [N, D].
    """

    name: str
    function: Callable
    inputs: Callable[[Shape], tuple]
    products: int = 0
    sweeps: Callable[[Shape], int] = lambda s: 1
    rows: Callable[[Shape], int] = lambda s: s.N
    goal: bool = False  # is it an attention sweep, held to the goals
    head_dims: bool = False  # is it compiled for every head dimension


def _refocused(s: Shape) -> tuple:
    return *s.heads(), s.mask(), s.mask(), 0.7


def _biased(s: Shape) -> tuple:
    return *s.heads()[1:], s.empty(2 * s.grid[0] - 1, 2 * s.grid[1] - 1, dtype=torch.float32)


def _redistributed(s: Shape) -> tuple:
    return s.patches(), s.mask(), s.dims, s.grid


def _windows(s: Shape) -> tuple:
    """Four square windows that overlap by half, for 171 names."""
    side, g = s.size[0], s.grid[0]
    corners = [(top, left) for top in (0, side // 2) for left in (0, side // 2)]
    return s.empty(4, 171, g, g), corners, side, (3 * side // 2, 3 * side // 2)


def _picture(s: Shape) -> tuple:
    """Logits of 171 names for a picture of twice the size."""
    h, w = s.size
    return s.empty(171, h, w, dtype=torch.float32), (2 * h, 2 * w), 40.0, s.empty(171, dtype=torch.int64), 0.1


def _attention_op(name: str, function: Callable, inputs: Callable[[Shape], tuple]) -> Op:
    return Op(name, function, inputs, 2, rows=lambda s: s.T, goal=True, head_dims=True)


OPS = [
    Op("distraction_scores", distraction.distraction_scores, lambda s: (s.patches(), s.dims)),
    Op("distraction_mask", distraction.distraction_mask, lambda s: (s.patches(), s.dims)),
    Op(
        "distraction_mask, not shifted",
        partial(distraction.distraction_mask, shifted=False),
        lambda s: (s.patches(), s.dims),
    ),
    Op("redistribute_embeddings", distraction.redistribute_embeddings, _redistributed),
    Op("redistribute_embeddings, 7 x 7", partial(distraction.redistribute_embeddings, size=7), _redistributed),
    _attention_op("refocused_attention", attention.refocused_attention, _refocused),
    _attention_op("self_attention", attention.self_attention, lambda s: s.heads()[1:]),
    _attention_op("self_attention, bias", attention.self_attention, _biased),
    Op(
        "proxy_attention",
        attention.proxy_attention,
        lambda s: (s.empty(s.L, 1, s.H, s.T, s.D), s.heads()[2]),
        products=2,
        sweeps=lambda s: s.L,
        goal=True,
        head_dims=True,
    ),
    Op("key_similarity, first block", similarity.key_similarity, lambda s: (s.heads()[1],), 1, head_dims=True),
    Op(
        "key_similarity, later block",
        partial(similarity.key_similarity, count=1, inplace=True),
        lambda s: (s.heads()[1], s.similarity()),
        products=1,
    ),
    Op("received_attention", similarity.received_attention, lambda s: s.heads()[:2], 1, head_dims=True),
    Op("fiedler_vector", cut.fiedler_vector, lambda s: (s.similarity(), s.vector())),
    Op("defocus_mask", cut.defocus_mask, lambda s: (s.vector(),)),
    Op("defocus_mask, Otsu", partial(cut.defocus_mask, threshold="otsu"), lambda s: (s.vector(),)),
    Op("average_windows", upsample.average_windows, _windows),
    Op("upsample_argmax", upsample.upsample_argmax, _picture),
    Op("pamr", refinement.pamr, lambda s: (s.empty(1, 3, *s.size), s.empty(1, 21, *s.size))),
]


@dataclass(frozen=True)
class Kernel:
    """What a launch does not tell.

    `tiles` gives the products of [BM, BD] with [BD, BN] in one program, one number for each possible count of target
    keys where it depends on that, and `vectors` those of [BM, BD] with [BD], the key of CLS. Tensors named in `updated`
    are read and written; of those in `sparse` only a few places are, which count nothing.
    """

    tiles: Callable[[dict], Iterable[int]] | None = None
    vectors: Callable[[dict], int] = lambda a: 0
    updated: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()


def _two_runs(a: dict) -> list[int]:
    N = a["T"] - 1
    return [2 * (cdiv(n, a["BN"]) + cdiv(N - n, a["BN"])) for n in range(N + 1)]


KERNELS = {
    "refocused_attention_kernel": Kernel(_two_runs, lambda a: 1),
    "self_attention_kernel": Kernel(lambda a: [2 * a["L"] * cdiv(a["T"] - 1, a["BN"])], lambda a: a["L"]),
    "row_logsumexp_kernel": Kernel(lambda a: [cdiv(a["T"] - 1, a["BN"])], lambda a: 1),
    "key_similarity_kernel": Kernel(lambda a: [a["H"]], updated=("running_ptr",)),
    "received_attention_kernel": Kernel(lambda a: [a["H"] * cdiv(a["T"] - 1, a["BM"])]),
    "redistribute_kernel": Kernel(sparse=("x_ptr",)),
}


@dataclass(frozen=True)
class Launch:
    """One launch as recorded; a tensor among the arguments became a `MockTensor` of its dtype and shape."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]

    @property
    def facts(self) -> Kernel:
        return KERNELS.get(self.kernel.__name__, Kernel())

    @property
    def operations(self) -> np.ndarray:
        """Of the products, padding included, for each possible count of target keys."""
        a = self.arguments
        columns = np.array(self.facts.tiles(a)) * a["BN"] + self.facts.vectors(a)
        return columns * math.prod(self.grid) * 2.0 * a["BM"] * a["BD"]


@dataclass
class Recording:
    """What one call of an operator launched and moved, and the bytes of its inputs and outputs, each once."""

    launches: list[Launch] = field(default_factory=list)
    moved: int = 0
    least: int = 0


class CountingMode(FakeTensorMode):
    """Tensors without data, on a GPU that need not be there; counts the bytes that PyTorch's own operators move."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.cache_enabled = False  # or a second call of an operator would not reach its launches
        self.recording = recording
        self.inside = False  # an operator whose parts do not count again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counts = func.namespace == "aten" and not self.inside
        self.inside |= counts
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.inside &= not counts
        if counts and "empty" not in func.name():
            read, written = _tensors((args, kwargs)), _tensors(out)
            known = {tensor.untyped_storage()._cdata for tensor in read}
            viewed = all(tensor.untyped_storage()._cdata in known for tensor in written)
            if func._schema.is_mutable or not viewed:
                self.recording.moved += _bytes(read) + _bytes(written)
        return out


def record(op: Op, shape: Shape, hip: bool = False) -> Recording:
    """Call an operator on tensors without data, as on a CUDA or a ROCm device."""
    recording = Recording()

    def run(kernel: JITFunction, *, grid: tuple[int, ...], warmup: bool, **arguments) -> None:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        mocks = {name: MockTensor(value.dtype, value.shape) for name, value in tensors.items()}
        launch = Launch(kernel, grid, arguments | mocks)
        once = {id(value): value for name, value in tensors.items() if name not in launch.facts.sparse}
        recording.moved += _bytes(once.values()) + _bytes(tensors[name] for name in launch.facts.updated)
        recording.launches.append(launch)

    with (
        CountingMode(recording),
        set_wrap_triton_enabled(False),
        patch.object(JITFunction, "run", run),
        patch.object(attention, "on_hip", lambda: hip),
    ):
        inputs = op.inputs(shape)
        recording.moved = 0
        outputs = op.function(*inputs)
        recording.least = _bytes(_tensors(inputs)) + _bytes(_tensors(outputs))
    return recording


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@dataclass(frozen=True)
class Cost:
    """A call's operations and bytes over others; the operations are None where no matrices are multiplied."""

    moved: float  # bytes over the least
    flash: float | None = None  # operations over plain flash attention's, the mean over counts of target keys
    flash_worst: float | None = None
    least: float | None = None  # operations over the least, which has no padding

    def missed(self) -> list[str]:
        """The goals of an attention sweep that are missed."""
        goals = (
            (self.flash, MOST_OPERATIONS, "flash attention's operations"),
            (self.moved, MOST_BYTES, "the least bytes"),
        )
        return [f"{ratio:.4f} of {name}" for ratio, most, name in goals if ratio > most]


def cost(op: Op, shape: Shape) -> Cost:
    recording = record(op, shape)
    moved = recording.moved / recording.least
    matrix = [launch for launch in recording.launches if launch.facts.tiles is not None]
    if not matrix:
        return Cost(moved)
    rows, a = op.rows(shape), matrix[0].arguments
    heads = op.sweeps(shape) * shape.H
    flash = heads * 2 * cdiv(rows, a["BM"]) * cdiv(shape.T, a["BN"]) * 2 * a["BM"] * a["BN"] * a["BD"]
    least = heads * 2 * rows * (shape.T + (op.products - 1) * shape.N) * shape.D  # the value of CLS starts the sum
    operations = sum(launch.operations for launch in matrix)
    return Cost(moved, operations.mean() / flash, operations.max() / flash, operations.mean() / least)
