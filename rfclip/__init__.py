"""RF-CLIP: training-free open-vocabulary segmentation with CLIP.

The public names are loaded on first use, so that `import rfclip` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULE_OF = {
    "Calibration": "plugin",
    "Explanation": "explanation",
    "RefocusConfig": "config",
    "Segmentation": "segmenter",
    "Segmenter": "segmenter",
    "calibrate": "plugin",
    "dense_features": "plugin",
    "explain": "explanation",
    "load_model": "models",
    "refocus": "plugin",
}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
