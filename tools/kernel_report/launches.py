"""What every operation launches, recorded from the operation itself, and counted: operations and bytes.

Each example of `rfclip_kernels.registry` runs on tensors without data, and what it would launch is kept with its grid,
arguments and options, so that what is compiled and counted cannot drift from what runs. Nothing here is measured.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton import cdiv
from triton.runtime.jit import JITFunction, MockTensor

import rfclip_kernels
from rfclip_kernels import tiles
from rfclip_kernels.registry import EXAMPLES, Example, Products, Sizes

SIMILARITY = {"similarity_ptr", "affinity_ptr", "running_ptr"}  # arguments that are [B, N, N]
MOST_OPERATIONS = 1.15  # of plain flash attention's: the fastest tiles are wide, and two runs are padded to them
MOST_BYTES = 1.10  # of the least
OPS = [example for example in EXAMPLES if example.module]
PRODUCTS = {kernel: products for example in EXAMPLES for kernel, products in example.kernels.items()}


@dataclass(frozen=True)
class Shape:
    """An image tower at one size of image, batch 1."""

    model: str
    size: tuple[int, int] = (224, 224)
    dtype: torch.dtype = torch.float16
    D: int = 64

    @property
    def image(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"

    @property
    def sizes(self) -> Sizes:
        """On a CUDA device, without data."""
        patch, (H, L) = int(self.model[-2:]), {"ViT-B/16": (12, 12), "ViT-L/14": (16, 24)}[self.model]
        grid = self.size[0] // patch, self.size[1] // patch
        return Sizes(H=H, D=self.D, L=L, grid=grid, dtype=self.dtype, device="cuda", seed=None, patch=patch)


SHAPES = [Shape(model, size) for model in ("ViT-B/16", "ViT-L/14") for size in ((224, 224), (336, 448), (672, 896))]


@dataclass(frozen=True)
class Launch:
    """One launch as recorded; a tensor among the arguments became a `MockTensor` of its dtype and shape."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    products: Products

    @property
    def operations(self) -> np.ndarray:
        """Of the products, padding included, for each possible count of target keys."""
        a = self.arguments
        assert self.products.tiles is not None
        columns = np.array(self.products.tiles(a)) * a["BN"] + self.products.vectors(a)
        return columns * math.prod(self.grid) * 2.0 * a["BM"] * a["BD"]


class Step(NamedTuple):
    """A launch of a Triton kernel, or an operator of PyTorch, which counts as one.

    Attributes:
        operations: of matrix products.
        moved, similarity: bytes of all tensors, and of the similarity among them.
    """

    name: str
    triton: bool
    operations: float
    moved: int
    similarity: int = 0


@dataclass
class Recording:
    """What was launched: its steps, the Triton launches among them, and the bytes of inputs and outputs, each once."""

    steps: list[Step] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    least: int = 0

    @property
    def moved(self) -> int:
        """Bytes that the steps move."""
        return sum(step.moved for step in self.steps)


class CountingMode(FakeTensorMode):
    """Tensors without data, on a GPU that need not exist; records PyTorch's own operators, but for views."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.cache_enabled = False  # otherwise a second call would not reach its launches
        self.recording = recording
        self.inside = False  # an operator, whose parts do not count again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
                flops = flop_registry.get(func.overloadpacket)
                operations = flops(*args, **(kwargs or {}), out_val=out) if flops else 0
                moved = tensor_bytes(read) + tensor_bytes(written)
                self.recording.steps.append(Step(func.name(), False, operations, moved))
        return out


@contextlib.contextmanager
def recording(architecture: str = "sm_90") -> Iterator[Recording]:
    """Record what is launched, on tensors without data, as on a GPU of an architecture."""
    found = Recording()

    def run(kernel: JITFunction, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        mocks = {name: MockTensor(value.dtype, value.shape) for name, value in tensors.items()}
        products = PRODUCTS.get(kernel.__name__, Products())
        launch = Launch(kernel, grid, arguments | mocks, products)
        once = {id(value): value for name, value in tensors.items() if name not in products.sparse}
        updated = products.updated(arguments)
        twice = [tensors[name] for name in updated]
        square = [tensors[name] for name in (*tensors, *updated) if name in SIMILARITY]
        operations = float(launch.operations.mean()) if products.tiles else 0.0
        moved = tensor_bytes([*once.values(), *twice])
        found.steps.append(Step(kernel.__name__, True, operations, moved, tensor_bytes(square)))
        found.launches.append(launch)

    with (
        CountingMode(found),
        set_wrap_triton_enabled(False),
        patch.object(JITFunction, "run", run),
        patch.object(tiles, "architecture", lambda device: architecture),
    ):
        yield found


def record(op: Example, shape: Shape, architecture: str = "sm_90", function: Callable | None = None) -> Recording:
    """Call an operation, or another function of its inputs."""
    function = function or getattr(rfclip_kernels, op.operation)
    with recording(architecture) as found:
        inputs = op.inputs(shape.sizes)
        found.steps.clear()
        outputs = function(**inputs)
        found.least = tensor_bytes(_tensors(inputs)) + tensor_bytes(_tensors(outputs))
    return found


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all their elements, those of an expanded dimension once."""
    return sum(
        tensor.itemsize * math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        for tensor in tensors
        if tensor.numel()
    )


@dataclass(frozen=True)
class Cost:
    """A call's operations and bytes relative to others; operations are None where no matrices are multiplied."""

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
        return [f"{ratio:.4f} of {name}" for ratio, most, name in goals if ratio is not None and ratio > most]


def cost(op: Example, shape: Shape) -> Cost:
    """What a call of an operation costs at one size."""
    recording = record(op, shape)
    moved = recording.moved / recording.least
    matrix = [launch for launch in recording.launches if launch.products.tiles is not None]
    if not matrix or op.sweep is None:
        return Cost(moved)
    sizes, sweep, a = shape.sizes, op.sweep, matrix[0].arguments
    rows, heads = sweep.rows(sizes), sweep.count(sizes) * sizes.H
    flash = heads * 2 * cdiv(rows, a["BM"]) * cdiv(sizes.T, a["BN"]) * 2 * a["BM"] * a["BN"] * a["BD"]
    least = heads * 2 * rows * (sizes.T + (sweep.products(sizes) - 1) * sizes.N) * sizes.D  # the prefix starts the sum
    operations = reduce(np.add, (launch.operations for launch in matrix))
    return Cost(moved, operations.mean() / flash, operations.max() / flash, operations.mean() / least)
