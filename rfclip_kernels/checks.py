"""Argument checks: each raises ValueError with what was expected and what was given.

`rfclip_kernels.operations` calls them; `rfclip_kernels.launch` checks what only the kernels demand.
"""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def tensor_sizes(
    name: str, value: Tensor, layouts: str, known: dict[str, int] | None = None, dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Check a tensor against a layout such as "B N d", or against alternatives as in "B N | B T".

    An axis in `known` must have the size given there; any other axis is bound to the size found. Only B may be 0, and
    T must exceed the number of prefix tokens, `known["prefix"]`. The dtype must be the one given, or any
    floating-point dtype if none is. Returns every size known so far, including N = T - prefix.
    """
    known = known or {}
    prefix = known.get("prefix", 0)
    least = {"B": 0, "T": prefix + 1}
    if isinstance(value, Tensor) and (value.is_floating_point() if dtype is None else value.dtype == dtype):
        for axes in map(str.split, layouts.split("|")):
            sizes = dict(known)
            if len(axes) == value.dim() and all(
                size == sizes.setdefault(axis, size) >= least.get(axis, 1)
                for axis, size in zip(axes, value.shape, strict=True)
            ):
                return sizes | ({"N": sizes["T"] - prefix} if "T" in sizes else {})
    kind = "floating-point" if dtype is None else _dtype_name(dtype)
    named = layouts.replace("|", " ").split()
    sides = {axis: f"{axis}={known[axis]}" if axis in known else f"{axis}>={least.get(axis, 1)}" for axis in named}
    expected = " or ".join(f"[{', '.join(sides[axis] for axis in axes.split())}]" for axes in layouts.split("|"))
    article = "an" if kind.startswith("int") else "a"
    raise ValueError(f"{name} must be {article} {kind} tensor {expected}, got {given(value)}")


def given(value: object) -> str:
    """A value as error messages describe it."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{_dtype_name(value.dtype)} of shape {list(value.shape)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dimension_list(dims: Sequence[int], d: int) -> list[int]:
    """Distinct dimensions in 0 .. d - 1, as a list."""
    if not isinstance(dims, Sequence) or not all(isinstance(j, Integral) and 0 <= j < d for j in dims):
        raise ValueError(f"dims must be a sequence of integers in 0 .. {d - 1}, the dimensions of x, got {dims!r}")
    if len(set(dims)) < len(dims):
        raise ValueError(f"dims must be distinct, got {dims!r}")
    return [int(j) for j in dims]


def grid_sides(grid: tuple[int, int], N: int) -> tuple[int, int]:
    """A patch grid (gh, gw) of N patches."""
    two_sides = isinstance(grid, Sequence) and len(grid) == 2
    integers = (Integral, torch.SymInt)  # the sides of a picture whose size an exporter leaves open are SymInts
    if not two_sides or not all(isinstance(side, integers) and side >= 1 for side in grid) or grid[0] * grid[1] != N:
        raise ValueError(f"grid must be (gh, gw), two integers of at least 1 with gh * gw = N = {N}, got {grid!r}")
    return grid[0], grid[1]


def picture_size(size: tuple[int, int], name: str = "size") -> tuple[int, int]:
    """A size (height, width) in pixels."""
    two_sides = isinstance(size, Sequence) and len(size) == 2
    if not two_sides or not all(isinstance(side, Integral) and side >= 1 for side in size):
        raise ValueError(f"{name} must be (height, width), two integers of at least 1, got {size!r}")
    return size[0], size[1]


def window_side(size: int) -> None:
    """The side of a neighbourhood: odd, at least 3."""
    if not isinstance(size, Integral) or size < 3 or size % 2 == 0:
        raise ValueError(f"size must be an odd integer of at least 3, got {size!r}")


def number(name: str, value: float, low: float = float("-inf"), high: float = float("inf")) -> float:
    """A finite number within bounds, as a float."""
    finite = isinstance(value, Real) and float("-inf") < value < float("inf")  # compilers cannot trace math.isfinite
    if not finite or not low <= value <= high:
        within = f" of at least {low}" if low > float("-inf") else ""
        within = f" in [{low}, {high}]" if high < float("inf") else within
        raise ValueError(f"{name} must be a number{within}, got {value!r}")
    return float(value)


def integer(name: str, value: int, least: int) -> int:
    """An integer of at least `least`."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def cut_threshold(threshold: str) -> None:
    """How a cut is thresholded."""
    if threshold not in ("mean", "otsu"):
        raise ValueError(f'threshold must be "mean" or "otsu", got {threshold!r}')


def heads(scale: float | None, prefix: int, **tensors: Tensor) -> tuple[dict[str, int], float]:
    """Queries, keys or values [B, H, T, D] of one shape and dtype. Returns the sizes and the scale, filled in."""
    sizes, dtype = {"prefix": integer("prefix", prefix, 0)}, None
    for name, tensor in tensors.items():
        sizes = tensor_sizes(name, tensor, "B H T D", sizes, dtype)
        dtype = tensor.dtype
    return sizes, attention_scale(scale, sizes["D"])


def attention_scale(scale: float | None, D: int) -> float:
    """The factor of the logits, D ** -0.5 by default."""
    return number("scale", D**-0.5 if scale is None else scale, 0)


def offset_table(bias: Tensor, N: int) -> None:
    """A bias [2 gh - 1, 2 gw - 1] for every offset on a grid of N patches."""
    sides = list(bias.shape) if isinstance(bias, Tensor) else []
    odd = len(sides) == 2 and all(side % 2 for side in sides)
    if not odd or (sides[0] + 1) * (sides[1] + 1) != 4 * N or not bias.is_floating_point():
        raise ValueError(
            f"bias must be a floating-point tensor [2 gh - 1, 2 gw - 1] for the offsets on a grid with gh * gw = N = "
            f"{N}, or [B, N, N] for each image, got {given(bias)}"
        )


def covering_windows(
    corners: Sequence[tuple[int, int]], windows: int, height: int, width: int, h: int, w: int
) -> list[tuple[int, int]]:
    """The (top, left) corners of windows, height x width, that lie in an h x w picture and cover all of it."""
    pairs = isinstance(corners, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in corners)
    if not pairs or len(corners) != windows or not all(isinstance(x, Integral) for pair in corners for x in pair):
        raise ValueError(
            f"corners must be (top, left), two integers, for each of the W={windows} windows, got {corners!r}"
        )
    corners = [(int(top), int(left)) for top, left in corners]
    for top, left in corners:
        if not 0 <= top <= h - height or not 0 <= left <= w - width:
            raise ValueError(
                f"corners: a window of {height} x {width} at {(top, left)} is not inside a picture {h} x {w}"
            )
    for row in sorted({0, *(top for top, _ in corners), *(top + height for top, _ in corners if top + height < h)}):
        # From here to the next of these rows, the same windows cover every row.
        right = 0
        for left in sorted(left for top, left in corners if top <= row < top + height):
            right = left + width if left <= right else right
        if right < w:
            raise ValueError(f"corners: no window covers pixel {(row, right)} of a picture {h} x {w}")
    return corners
