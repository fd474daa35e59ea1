"""Triton kernels for the steps of `rfclip.reference`, under the same names and signatures.

A kernel is loaded on first use, so that this package imports without Triton and without a GPU.
"""

from importlib import import_module

_MODULE_OF = {
    "average_windows": "upsample",
    "defocus_mask": "cut",
    "distraction_mask": "distraction",
    "distraction_scores": "distraction",
    "fiedler_vector": "cut",
    "key_similarity": "similarity",
    "pamr": "refinement",
    "proxy_attention": "attention",
    "received_attention": "similarity",
    "redistribute_embeddings": "distraction",
    "refocused_attention": "attention",
    "self_attention": "attention",
    "upsample_argmax": "upsample",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
