"""Every operation on the reference backend, with its arguments checked: `rfclip.reference.key_similarity(k)`.

The contracts are those of `rfclip_kernels.operations.Operations`; the code that runs is in `rfclip.ops.reference`.
"""

from typing import Any

from rfclip.ops.dispatch import backend
from rfclip_kernels.operations import OPERATIONS

__all__ = list(OPERATIONS)


def __getattr__(name: str) -> Any:
    if name not in OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(backend("reference"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
