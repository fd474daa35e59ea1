"""Triton kernels for RF-CLIP, usable on their own with PyTorch and Triton.

Every function here is a method of `rfclip_kernels.operations.Operations`, whose docstring is its contract, run by a
kernel: `rfclip_kernels.refocused_attention(q, k, v, distraction, target, beta)`. Kernels are imported on first use, so
that this package also imports where Triton is missing. `use_tiles` is the one name here that is no operation.

The package runs under any name, as Hugging Face's `kernels` gives it one (see tools/hf_kernels.py): its imports are
relative, and its operators are in the namespace of its name.
"""

from functools import cache
from importlib import import_module
from typing import Any

from .operations import Operations
from .registry import KERNELS
from .tiles import use_tiles as use_tiles

__all__ = list(KERNELS)


@cache
def launchers() -> dict[str, object]:
    """The `launch_*` function of every operation that has a kernel, by the operation's name."""
    modules = {kernel.module: import_module(f"{__name__}.{kernel.module}") for kernel in KERNELS.values()}
    return {name: getattr(modules[kernel.module], f"launch_{name}") for name, kernel in KERNELS.items()}


@cache
def _operations() -> Operations:
    return Operations(launchers())


def __getattr__(name: str) -> Any:
    if name not in KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_operations(), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "use_tiles"])
