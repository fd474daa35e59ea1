"""The front door of every operation: contract and check once, then the implementation of a backend.

`operations()` gives `rfclip_kernels.operations.Operations` on the best backend there is for a device and dtype, or on a
named one. The contracts live in `rfclip_kernels`, which works without this package.
"""

from __future__ import annotations

import torch

from rfclip.ops.dispatch import Backend, Choice, backend, choose

__all__ = ["Backend", "Choice", "choose", "operations"]


def operations(name: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Backend:
    """The operations on a backend.

    Args:
        name: "eager", "reference", "triton", or "auto", the best there is for `device` and `dtype`.
        device, dtype: of the tensors that the operations will get.

    Raises:
        ValueError: the backend is unknown, or cannot run there.
    """
    return backend(choose(name, torch.device(device), dtype).backend)
