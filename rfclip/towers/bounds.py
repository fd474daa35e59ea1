"""A bound on what a stranger's config may make a library allocate."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

EACH = 8  # elements created for a byte of weights: initialization makes several of each, and a weight may be one byte
SPARE = 1 << 26  # elements that are no weights: masks, position ids


class Bounded(TorchDispatchMode):
    """While it is entered, new tensors together hold no more elements than a model of these weights can need.

    Args:
        weights: their size in bytes.

    Raises:
        ValueError: they would; nothing has been allocated for the tensor that is one too many.
    """

    def __init__(self, weights: int) -> None:
        super().__init__()
        self._left, self._weights = EACH * weights + SPARE, weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.arguments and func._schema.arguments[0].name == "size":
            self._left -= torch.Size(args[0]).numel()
            if self._left < 0:
                raise ValueError(f"its config describes a model far larger than the {self._weights} bytes of weights")
        return func(*args, **(kwargs or {}))
