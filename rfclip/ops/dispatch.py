"""Which implementation runs an operation: the reference, fast PyTorch, or the Triton kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import rfclip_kernels
from rfclip.config import BACKENDS
from rfclip.ops import eager, reference
from rfclip.ops.key_average import KernelKeyAverage, KeyAverage
from rfclip.ops.numerics import autocasting, computing_dtype
from rfclip_kernels.launch import interpreted, watched
from rfclip_kernels.operations import OPERATIONS, Operations

LAYER_NORMS = {
    "torch.nn.modules.normalization.LayerNorm",
    "open_clip.transformer.LayerNorm",
    "open_clip.transformer.LayerNormFp32",
    "open_clip.layers.LayerNorm",  # where they are from open_clip 4 on
    "open_clip.layers.LayerNormFp32",
    "clip.model.LayerNorm",
}
QUICK_GELUS = {
    "open_clip.transformer.QuickGELU",
    "open_clip.layers.QuickGELU",
    "transformers.activations.QuickGELUActivation",
    "clip.model.QuickGELU",
}
REFERENCE = {name: getattr(reference, name) for name in OPERATIONS}


class Backend(Operations):
    """The operations on a named backend.

    Attributes:
        name: "reference", "eager" or "triton".
        borrowed: the operations that it takes from the reference.
    """

    def __init__(self, name: str, own: dict[str, object], key_average: type[KeyAverage] = KeyAverage) -> None:
        super().__init__(REFERENCE | own)
        self.name, self._key_average = name, key_average
        self.borrowed = sorted(REFERENCE.keys() - own.keys())

    def key_average(self, *, layers: int, similar: int, gathers: bool, prefix: int) -> KeyAverage:
        """A new running average of key-key attention; arguments as for `KeyAverage`."""
        return self._key_average(self, layers=layers, similar=similar, gathers=gathers, prefix=prefix)

    def add_norm(self, norm: Any, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch [B, T, d] and its norm, in one pass where a kernel can; the first block has no branch."""
        if branch is None:
            return x, norm(x)
        if self.fuses(norm):
            return self.add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)
        x = x + branch
        return x, norm(x)

    def mlp(self, modules: list[nn.Module], x: Tensor) -> Tensor:
        """What the layers of an MLP make of x: OpenAI's activation as one operation, and in place where nobody sees."""
        steps = list(zip(modules, [None, *modules[:-1]], strict=True))
        if linears := self._around_quick_gelu(modules, x):
            x, steps = eager.quick_gelu_mlp(x, *linears), steps[3:]
        for module, before in steps:
            plain = type(x) is Tensor
            unseen = plain and type(before) is nn.Linear and not (x.requires_grad or hooked(before) or watched())
            if self._replaces(module, QUICK_GELUS) and (plain or self.name == "triton"):
                x = self.quick_gelu(x, inplace=unseen)
            elif self.name != "reference" and unseen and type(module) is nn.GELU and not hooked(module):
                x = torch.ops.aten.gelu_(x, approximate=module.approximate)
            else:
                x = module(x)
        return x

    def _around_quick_gelu(self, modules: list[nn.Module], x: Tensor) -> tuple[nn.Linear, nn.Linear] | None:
        """The two linear layers that an MLP begins with, if QuickGELU is between them and nobody sees what it takes."""
        if self.name != "eager" or watched() or torch.is_grad_enabled() or autocasting(x.device):
            return None
        if len(modules) < 3 or x.dtype != computing_dtype(x) or not self._replaces(modules[1], QUICK_GELUS):
            return None
        first, last = modules[0], modules[2]
        if type(first) is not nn.Linear or type(last) is not nn.Linear or hooked(first) or hooked(last):
            return None
        values = x, first.weight, first.bias, last.weight, last.bias
        plain = (type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided for value in values)
        return (first, last) if all(plain) and len({value.dtype for value in values}) == 1 else None

    def fuses(self, norm: Any) -> bool:
        """Whether kernels replace a norm: a layer norm with weight and bias, and without hooks."""
        known = self.name == "triton" and self._replaces(norm, LAYER_NORMS)
        return known and norm.weight is not None and norm.bias is not None

    def _replaces(self, module: nn.Module, classes: set[str]) -> bool:
        kind = type(module)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return self.name != "reference" and name in classes and not hooked(module)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return backend, (self.name,)


def hooked(module: nn.Module) -> bool:
    """Whether a module does more than its class's `forward`."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    backwards = module._backward_pre_hooks or module._backward_hooks
    return bool(before or after or backwards or "forward" in module.__dict__ or _has_any_global_hook())


@cache
def backend(name: str) -> Backend:
    """The backend called "reference", "eager" or "triton"."""
    if name == "triton":
        return Backend(name, rfclip_kernels.launchers(), KernelKeyAverage)
    if name == "eager":
        own = {operation: getattr(eager, operation) for operation in eager.__all__}
        return Backend(name, own, eager.KeyAverage)
    return Backend(name, REFERENCE)


@dataclass(frozen=True)
class Choice:
    """A backend, and why it is the one that runs."""

    backend: str
    reason: str


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend that runs a model whose weights have this device and dtype. A named one is never replaced.

    Raises:
        ValueError: the backend is unknown, or is "triton" where the kernels cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: expected one of {', '.join(BACKENDS)}")
    if name in ("eager", "reference"):
        return Choice(name, "requested")
    obstacle = _obstacle(device, dtype)
    if name == "triton":
        if obstacle is not None and not (device.type == "cpu" and _interpreting()):
            raise ValueError(f'backend="triton": {obstacle}; use backend="eager", or "auto"')
        return Choice("triton", "requested")
    if obstacle is None:
        return Choice("triton", f"Triton has compiled kernels for {torch.cuda.get_device_name(device)}")
    return Choice("eager", obstacle)


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the Triton kernels from running there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":  # also PyTorch's name for ROCm devices
        return f"the model is on {device}, and Triton's kernels run on CUDA and ROCm devices"
    if dtype == torch.float64:
        return "the weights are float64, and the kernels take float32, float16 or bfloat16"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0, the lowest compiled for"
    return None


def _interpreting() -> bool:
    return importlib.util.find_spec("triton") is not None and interpreted()
