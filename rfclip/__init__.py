"""RF-CLIP: training-free open-vocabulary segmentation with CLIP.

Public names are loaded on first use, so that `import rfclip` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rfclip.calibration import Calibration, calibrate
    from rfclip.config import RefocusConfig, RegisterConfig
    from rfclip.explanation import Explanation, explain
    from rfclip.plugin import dense_features, refocus
    from rfclip.segment.result import Segmentation
    from rfclip.segment.segmenter import Segmenter
    from rfclip.segment.text import text_embeddings
    from rfclip.towers.loading import load_model

try:
    from rfclip._version import __version__
except ImportError:  # a checkout that was never installed
    __version__ = "0.dev0"

_MODULE_OF = {
    "Calibration": "calibration",
    "Explanation": "explanation",
    "RefocusConfig": "config",
    "RegisterConfig": "config",
    "Segmentation": "segment.result",
    "Segmenter": "segment.segmenter",
    "calibrate": "calibration",
    "dense_features": "plugin",
    "explain": "explanation",
    "load_model": "towers.loading",
    "refocus": "plugin",
    "text_embeddings": "segment.text",
}
_MODULES = (
    "config",
    "methods",
    "outputs",
    "presets",
    "reference",
)  # also reached as attributes of a bare `import rfclip`
__all__ = [
    "Calibration",
    "Explanation",
    "RefocusConfig",
    "RegisterConfig",
    "Segmentation",
    "Segmenter",
    "__version__",
    "calibrate",
    "dense_features",
    "explain",
    "load_model",
    "refocus",
    "text_embeddings",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
