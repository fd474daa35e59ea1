"""What every implementation asks of its arguments, said once: ValueError tells what was expected and what was given."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def tensor_sizes(
    name: str, value: Tensor, layouts: str, known: dict[str, int] | None = None, dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Check a tensor against a layout such as "B N d", or one of several as in "B N | B T".

    An axis in `known` must have its size from there; any other is bound here, and only B may be empty. The dtype must
    be the given one, or without one any floating-point dtype. Returns all sizes known now, N following from T.
    """
    known = known or {}
    least = {"B": 0, "T": 2}  # T counts CLS and at least one patch
    if isinstance(value, Tensor) and (value.is_floating_point() if dtype is None else value.dtype == dtype):
        for axes in map(str.split, layouts.split("|")):
            sizes = dict(known)
            if len(axes) == value.dim() and all(
                size == sizes.setdefault(axis, size) >= least.get(axis, 1)
                for axis, size in zip(axes, value.shape, strict=True)
            ):
                return sizes | ({"N": sizes["T"] - 1} if "T" in sizes else {})
    kind = "floating-point" if dtype is None else _dtype_name(dtype)
    named = layouts.replace("|", " ").split()
    sides = {axis: f"{axis}={known[axis]}" if axis in known else f"{axis}>={least.get(axis, 1)}" for axis in named}
    expected = " or ".join(f"[{', '.join(sides[axis] for axis in axes.split())}]" for axes in layouts.split("|"))
    article = "an" if kind.startswith("int") else "a"
    raise ValueError(f"{name} must be {article} {kind} tensor {expected}, got {_given(value)}")


def _given(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{_dtype_name(value.dtype)} of shape {list(value.shape)}"


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


def check_number(name: str, value: float, low: float = float("-inf"), high: float = float("inf")) -> None:
    if not isinstance(value, Real) or not low <= value <= high:  # the comparison is also False for NaN
        within = f" in [{low}, {high}]" if high < float("inf") else ""
        raise ValueError(f"{name} must be a number{within}, got {value!r}")


def check_head_dimension(D: int) -> None:
    if D > 128:
        raise ValueError(f"the Triton kernels take heads of at most 128 dimensions, got {D}; use another backend")


def query_key(scale: float | None, **tensors: Tensor) -> tuple[dict[str, int], float]:
    """Queries, keys or values [B, H, T, D] of one shape and dtype. Returns the sizes, and the scale, filled in."""
    sizes, dtype = None, None
    for name, tensor in tensors.items():
        sizes = tensor_sizes(name, tensor, "B H T D", sizes, dtype)
        dtype = tensor.dtype
    return sizes, attention_scale(scale, sizes["D"])


def attention_scale(scale: float | None, D: int) -> float:
    scale = D**-0.5 if scale is None else scale
    check_number("scale", scale)
    return float(scale)


def similarity_inputs(
    k: Tensor,
    running: Tensor | None,
    count: int,
    scale: float | None,
    dtype: torch.dtype,
    heads: Tensor | None = None,
) -> tuple[dict[str, int], float]:
    """The arguments of `key_similarity`, whose sums have the given dtype. Returns the sizes and the scale."""
    sizes, scale = query_key(scale, k=k)
    if not isinstance(count, Integral) or count < 0:
        raise ValueError(f"count must be an integer of at least 0, got {count!r}")
    if (running is None) != (count == 0):
        given = "None" if running is None else "a tensor"
        raise ValueError(
            f"running must come with count >= 1, and None with count 0, got running {given}, count {count}"
        )
    if running is not None:
        tensor_sizes("running", running, "B N N", sizes, dtype)
    if heads is not None:
        tensor_sizes("heads", heads, "B H N N", sizes, dtype)
    return sizes, scale


def refocused_inputs(
    q: Tensor, k: Tensor, v: Tensor, distraction: Tensor, target: Tensor, beta: float, scale: float | None
) -> float:
    """The arguments of `refocused_attention`. Returns the scale."""
    sizes, scale = query_key(scale, q=q, k=k, v=v)
    tensor_sizes("distraction", distraction, "B N", sizes, torch.bool)
    tensor_sizes("target", target, "B N | B T", sizes, torch.bool)
    check_number("beta", beta, 0, 1)
    return scale


def self_inputs(u: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> float:
    """The arguments of `self_attention`. Returns the scale."""
    sizes, scale = query_key(scale, u=u, v=v)
    if bias is not None:
        sides = [] if not isinstance(bias, Tensor) else list(bias.shape)
        odd = len(sides) == 2 and all(side % 2 for side in sides)
        if not odd or (sides[0] + 1) * (sides[1] + 1) != 4 * sizes["N"] or not bias.is_floating_point():
            raise ValueError(
                "bias must be a floating-point tensor [2 gh - 1, 2 gw - 1] of the offsets on a grid with gh * gw = N = "
                f"{sizes['N']}, got {_given(bias)}"
            )
    return scale


def proxy_inputs(keys: Tensor, v: Tensor, scale: float | None, heads: Tensor | None = None, count: int = 0) -> float:
    """The arguments of `proxy_attention`. Returns the scale."""
    sizes = tensor_sizes("keys", keys, "L B H T D")
    tensor_sizes("v", v, "B H T D", sizes, keys.dtype)
    if (heads is None) != (count == 0) or not isinstance(count, Integral) or count < 0:
        raise ValueError(f"heads must come with count >= 1, and None with count 0, got count {count!r}")
    if heads is not None:
        tensor_sizes("heads", heads, "B H N N", sizes)
    return attention_scale(scale, sizes["D"])


def scores_inputs(x: Tensor, dims: Sequence[int], threshold: float | None) -> tuple[list[int], float]:
    """The arguments of `distraction_mask`. Returns the dimensions and the threshold, 5 / d for None."""
    d = tensor_sizes("x", x, "B N d")["d"]
    dims = dimension_list(dims, d)
    threshold = 5 / d if threshold is None else threshold
    check_number("threshold", threshold)
    return dims, float(threshold)


def masked_tokens(
    x: Tensor, mask: Tensor, dims: Sequence[int] | None, grid: tuple[int, int] | None, size: int = 3
) -> tuple[list[int], tuple[int, int]]:
    """Tokens [B, N, d] with a mask [B, N], and where given their dimensions and their grid; returns both of these."""
    sizes = tensor_sizes("x", x, "B N d")
    tensor_sizes("mask", mask, "B N", sizes, torch.bool)
    if not isinstance(size, Integral) or size < 3 or size % 2 == 0:
        raise ValueError(f"size must be an odd integer of at least 3, got {size!r}")
    return (
        [] if dims is None else dimension_list(dims, sizes["d"]),
        (1, sizes["N"]) if grid is None else grid_sides(grid, sizes["N"]),
    )


def cut_inputs(similarity: Tensor, start: Tensor | None) -> dict[str, int]:
    """The arguments of `fiedler_vector`. Returns the sizes."""
    sizes = tensor_sizes("similarity", similarity, "B N N")
    if start is not None:
        tensor_sizes("start", start, "B N", sizes)
    return sizes


def defocus_inputs(fiedler: Tensor, threshold: str) -> int:
    """The arguments of `defocus_mask`. Returns N."""
    N = tensor_sizes("fiedler", fiedler, "B N")["N"]
    if threshold not in ("mean", "otsu"):
        raise ValueError(f'threshold must be "mean" or "otsu", got {threshold!r}')
    return N


def averaging_inputs(
    logits: Tensor, corners: Sequence[tuple[int, int]], side: int, size: tuple[int, int]
) -> list[tuple[int, int]]:
    """The arguments of `average_windows`. Returns the corners, once every window is inside and every pixel covered."""
    W = tensor_sizes("logits", logits, "W K gh gw")["W"]
    h, w = picture_size(size)
    if not isinstance(side, Integral) or side < 1:
        raise ValueError(f"side must be an integer of at least 1, got {side!r}")
    pairs = isinstance(corners, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in corners)
    if not pairs or len(corners) != W or not all(isinstance(place, Integral) for pair in corners for place in pair):
        raise ValueError(f"corners must be (top, left), two integers, for each of the W={W} windows, got {corners!r}")
    corners = [(int(top), int(left)) for top, left in corners]
    for top, left in corners:
        if not 0 <= top <= h - side or not 0 <= left <= w - side:
            raise ValueError(f"corners: a window of {side} x {side} at {(top, left)} is not inside a picture {h} x {w}")
    for row in sorted({0, *(top for top, _ in corners), *(top + side for top, _ in corners if top + side < h)}):
        # Between these rows the windows that cover a row are the same.
        right = 0
        for left in sorted(left for top, left in corners if top <= row < top + side):
            right = left + side if left <= right else right
        if right < w:
            raise ValueError(f"corners: no window covers pixel {(row, right)} of a picture {h} x {w}")
    return corners


def upsampling_inputs(
    logits: Tensor, size: tuple[int, int], logit_scale: float, class_of_name: Tensor, threshold: float | None
) -> None:
    """The arguments of `upsample_argmax`."""
    sizes = tensor_sizes("logits", logits, "K h w")
    tensor_sizes("class_of_name", class_of_name, "K", sizes, torch.int64)
    picture_size(size)
    check_number("logit_scale", logit_scale)
    if threshold is not None:
        check_number("threshold", threshold, 0, 1)


def probability_inputs(
    logits: Tensor,
    size: tuple[int, int],
    logit_scale: float,
    class_of_name: Tensor,
    classes: int,
    rows: range | None,
) -> range:
    """The arguments of `class_probabilities`. Returns the rows."""
    upsampling_inputs(logits, size, logit_scale, class_of_name, None)
    if not isinstance(classes, Integral) or classes < 1:
        raise ValueError(f"classes must be an integer of at least 1, got {classes!r}")
    every = range(size[0])
    rows = every if rows is None else rows
    if not isinstance(rows, range) or not len(rows) or rows[0] not in every or rows[-1] not in every:
        raise ValueError(f"rows must be a range, not empty, of rows in 0 .. {size[0] - 1}, got {rows!r}")
    return rows


def picture_size(size: tuple[int, int]) -> tuple[int, int]:
    two_sides = isinstance(size, Sequence) and len(size) == 2
    if not two_sides or not all(isinstance(side, Integral) and side >= 1 for side in size):
        raise ValueError(f"size must be (height, width), two integers of at least 1, got {size!r}")
    return size[0], size[1]


def pamr_inputs(image: Tensor, mask: Tensor, iterations: int, dilations: Sequence[int]) -> list[int]:
    """The arguments of `pamr`. Returns the dilations."""
    sizes = tensor_sizes("image", image, "B CI H W")
    tensor_sizes("mask", mask, "B C H W", sizes)
    if not isinstance(iterations, Integral) or iterations < 0:
        raise ValueError(f"iterations must be an integer of at least 0, got {iterations!r}")
    whole = isinstance(dilations, Sequence) and all(isinstance(d, Integral) and d >= 1 for d in dilations)
    if not whole or not dilations:
        raise ValueError(f"dilations must be a sequence of integers of at least 1, and not empty, got {dilations!r}")
    return [int(d) for d in dilations]


def check_launch(**tensors: Tensor | None) -> None:
    """Raise ValueError for what the kernels do not do: float64, gradients, two devices, and running on a CPU.

    Triton's interpreter is the exception to the last, and so are tensors without data, which a tracer hands over.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (leader, first), *_ = given.items()
    for name, tensor in given.items():
        if tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} is float64: the Triton kernels take float32, float16 or bfloat16; use the reference"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and the Triton kernels have none: use rfclip.reference, or run under "
                "torch.inference_mode()"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} and {leader} on {first.device}: expected one device")
        if tensor.device.type != "cuda" and not isinstance(tensor, FakeTensor) and not interpreted():
            raise ValueError(
                f"{name} is on {tensor.device}: the Triton kernels run on CUDA and ROCm devices, and in Triton's "
                "interpreter (TRITON_INTERPRET=1 before the first import); use the reference"
            )


def refuse_heads(heads: Tensor | None) -> None:
    if heads is not None:
        raise ValueError("heads must be None: the Triton kernels keep no sum of each head, and sweep the keys instead")


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, on which Triton launches, where there are several."""
    several = tensor.is_cuda and torch.cuda.device_count() > 1
    return torch.cuda.device(tensor.device) if several else nullcontext()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    import triton

    return triton.knobs.runtime.interpret
