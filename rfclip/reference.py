"""Every operation on the reference backend, with its arguments checked: `rfclip.reference.key_similarity(k)`.

The contracts are those of `rfclip_kernels.operations.Operations`; the code that runs is in `rfclip.ops.reference`.
"""

from rfclip.ops.dispatch import backend
from rfclip_kernels.operations import OPERATIONS

__all__ = list(OPERATIONS)
globals().update({name: getattr(backend("reference"), name) for name in OPERATIONS})
