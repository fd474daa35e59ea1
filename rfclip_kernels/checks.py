"""What every implementation asks of its arguments, said once: ValueError tells what was expected and what was given."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def tensor_sizes(
    name: str, value: Tensor, layouts: str, known: dict[str, int] | None = None, dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Check a tensor against a layout such as "B N d", or one of several as in "B N | B T".

    An axis in `known` must have its size from there; any other is bound here, and only B may be empty. The dtype must
    be the given one, or without one any floating-point dtype. Returns all sizes known now, N following from T.
    """
    known = known or {}
    least = {"B": 0, "T": 2}  # T counts CLS and at least one patch
    given = type(value).__name__
    if isinstance(value, Tensor):
        given = f"{_dtype_name(value.dtype)} of shape {list(value.shape)}"
        right_dtype = value.is_floating_point() if dtype is None else value.dtype == dtype
        for axes in map(str.split, layouts.split("|") if right_dtype else []):
            sizes = dict(known)
            if len(axes) == value.dim() and all(
                size == sizes.setdefault(axis, size) >= least.get(axis, 1)
                for axis, size in zip(axes, value.shape, strict=True)
            ):
                return sizes | ({"N": sizes["T"] - 1} if "T" in sizes else {})
    kind = "floating-point" if dtype is None else _dtype_name(dtype)
    sides = {axis: f"{axis}={known[axis]}" if axis in known else f"{axis}>={least.get(axis, 1)}" for axis in "LBHTNDd"}
    expected = " or ".join(f"[{', '.join(sides[axis] for axis in axes.split())}]" for axes in layouts.split("|"))
    raise ValueError(f"{name} must be a {kind} tensor {expected}, got {given}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dimension_list(dims: Sequence[int], d: int) -> list[int]:
    if not isinstance(dims, Sequence) or not all(isinstance(j, Integral) and 0 <= j < d for j in dims):
        raise ValueError(f"dims must be a sequence of integers in 0 .. {d - 1}, the dimensions of x, got {dims!r}")
    if len(set(dims)) < len(dims):
        raise ValueError(f"dims must be distinct, got {dims!r}")
    return [int(j) for j in dims]


def grid_sides(grid: tuple[int, int], N: int) -> tuple[int, int]:
    two_sides = isinstance(grid, Sequence) and len(grid) == 2
    if not two_sides or not all(isinstance(side, Integral) and side >= 1 for side in grid) or grid[0] * grid[1] != N:
        raise ValueError(f"grid must be (gh, gw), two integers of at least 1 with gh * gw = N = {N}, got {grid!r}")
    return grid[0], grid[1]


def window_side(size: int) -> None:
    if not isinstance(size, Integral) or size < 3 or size % 2 == 0:
        raise ValueError(f"size must be an odd integer of at least 3, got {size!r}")


def layer_count(count: int, running: Tensor | None) -> None:
    if not isinstance(count, Integral) or count < 0:
        raise ValueError(f"count must be an integer of at least 0, got {count!r}")
    if (running is None) != (count == 0):
        given = "None" if running is None else "a tensor"
        raise ValueError(
            f"running must come with count >= 1, and None with count 0, got running {given}, count {count}"
        )


def check_number(name: str, value: float, low: float = float("-inf"), high: float = float("inf")) -> None:
    if not isinstance(value, Real) or not low <= value <= high:  # the comparison is also False for NaN
        within = f" in [{low}, {high}]" if high < float("inf") else ""
        raise ValueError(f"{name} must be a number{within}, got {value!r}")


def refuse_gradients(**tensors: Tensor) -> None:
    """Raise ValueError for what the kernels do not do: float64, and gradients."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} is float64: the Triton kernels take float32, float16 or bfloat16; use the reference"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and the Triton kernels have none: use rfclip.reference, or run under "
                "torch.inference_mode()"
            )
