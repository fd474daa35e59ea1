"""Every operation of a backend on small inputs, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rfclip.ops.dispatch import backend
from rfclip_kernels.registry import EXAMPLES, Sizes

# Relative RMS errors that are rounding, and how much of masks and labels must be equal, since one may tip over by it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SAME = 0.99


@dataclass(frozen=True)
class Outcome:
    """What an operation did.

    Attributes:
        name: of the operation and the example.
        error: relative RMS, or the share of labels that differ.
        fault: what is wrong; "" if nothing is.
    """

    name: str
    error: float
    fault: str


def check_operations(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[Outcome]:
    """Run all operations of a backend on a device, of odd sizes: rows that no block divides, two images, a prefix."""
    sizes = Sizes(B=2, H=2, D=32, L=2, grid=(3, 7), dtype=dtype, device=str(device), names=7, patch=3, iterations=2)
    for example in EXAMPLES:
        inputs = example.inputs(sizes)
        exact = {key: _exact(value) for key, value in inputs.items()}
        want = getattr(backend("reference"), example.operation)(**exact)
        try:
            got = getattr(backend(name), example.operation)(**inputs)
        except Exception as raised:  # of any kind: a compiler's, a driver's
            first, _, _ = str(raised).partition("\n")
            yield Outcome(example.name, float("nan"), f"{type(raised).__name__}: {first}")
            continue
        pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
        found = [_compare(one.cpu(), other) for one, other in pairs]
        error = max(error for error, _ in found)
        yield Outcome(example.name, error, next((fault for _, fault in found if fault), ""))


def _exact(value: object) -> object:
    """The same on the CPU, in float64 if it is a tensor of floats."""
    if not isinstance(value, Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


def _compare(got: Tensor, want: Tensor) -> tuple[float, str]:
    got = got[:, : want.shape[1]] if got.ndim > 1 else got  # vectors that only help the next layer are left out
    if got.shape != want.shape:
        return float("nan"), f"got {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.is_floating_point():
        differing = float((got != want).double().mean())
        return differing, f"{100 * differing:.1f} % differ" if differing > 1 - SAME else ""
    error = float((got.double() - want).norm() / want.norm())
    return error, "" if error <= TOLERANCE[got.dtype] else f"relative error {error:.1e}"
