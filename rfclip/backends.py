"""Which implementation of the method's functions runs: the reference, fast PyTorch, or the Triton kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import rfclip_kernels
from rfclip import eager, reference
from rfclip_kernels.checks import interpreted

BACKENDS = ("auto", "eager", "reference", "triton")
_MODULES = {"reference": reference, "eager": eager, "triton": rfclip_kernels}
HEADS_BUDGET = 128 << 20  # bytes that "eager" may take for sums over layers of each head's attention


@dataclass(frozen=True)
class Choice:
    """A backend, and why it is the one that runs."""

    backend: str
    reason: str


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend that runs a model with weights of this device and dtype. A named one is never replaced by another.

    Raises:
        ValueError: backend is unknown, or is "triton" where the kernels cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend in ("eager", "reference"):
        return Choice(backend, "it was asked for")
    obstacle = _obstacle(device, dtype)
    if backend == "triton":
        if obstacle is not None and not (device.type == "cpu" and _interpreting()):
            raise ValueError(f'backend="triton": {obstacle}; use backend="eager", or "auto"')
        return Choice("triton", "it was asked for")
    if obstacle is None:
        return Choice("triton", f"Triton has compiled kernels for {torch.cuda.get_device_name(device)}")
    return Choice("eager", obstacle)


def functions(backend: str) -> SimpleNamespace:
    """The functions of `rfclip.reference` by name, each from the backend where that has it and else the reference's.

    `heads_budget` says how many bytes `key_similarity` and `proxy_attention` may share in `heads`.
    """
    found = {name: getattr(reference, name) for name in reference.__all__}
    found |= {name: getattr(_MODULES[backend], name) for name in _MODULES[backend].__all__}
    return SimpleNamespace(**found, heads_budget=HEADS_BUDGET if backend == "eager" else 0)


def borrowed(backend: str) -> list[str]:
    """The names of the functions that a backend takes from the reference."""
    return sorted(set(reference.__all__) - set(_MODULES[backend].__all__)) if backend != "reference" else []


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the Triton kernels from running there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":  # PyTorch calls ROCm devices so, too
        return f"the model is on {device}, and Triton's kernels run on CUDA and ROCm devices"
    if dtype == torch.float64:
        return "the weights are float64, and the kernels take float32, float16 or bfloat16"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability under 8.0, where no kernel was compiled"
    return None


def _interpreting() -> bool:
    return importlib.util.find_spec("triton") is not None and interpreted()
