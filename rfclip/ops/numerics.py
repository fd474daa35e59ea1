"""Precision rules that every PyTorch implementation follows."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from rfclip_kernels.operations import computing_dtype

__all__ = ["autocasting", "computing_dtype", "matmul", "no_autocast"]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product in the computing dtype of `a`, even where autocast would lower it."""
    dtype = computing_dtype(a)
    with no_autocast(a.device):
        return a.to(dtype) @ b.to(dtype)


@torch.compiler.assume_constant_result  # torch 2.8 cannot trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def autocasting(device: torch.device) -> bool:
    """Whether autocast lowers products on a device; some devices do not know it."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Products in the dtype of their factors. Does nothing where autocast is off."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()
