"""Load a model by name: one of a library's, or the small CLIP bundled with the package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from rfclip.config import TINY, RefocusConfig, canonical_name, check_precision
from rfclip.tiny.scenes import CLASSES
from rfclip.towers import FAMILIES, Tower


def tiny_folder() -> Path:
    """The folder of the bundled CLIP: an open_clip config and weights, and its refocusing config."""
    return Path(str(resources.files("rfclip.tiny")))


def load_model(
    name: str = TINY,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Any:
    """A CLIP in eval mode that knows its refocusing config, if one is known.

    Args:
        name: "rfclip-tiny", the bundled CLIP; any name that open_clip takes, including "hf-hub:" and "local-dir:"; or
            "transformers:" followed by a CLIPModel on the Hugging Face hub, or by a folder of one.
        pretrained: open_clip's tag for the weights (downloaded once) or a path to safetensors; None for rfclip-tiny
            and transformers.
        device: where to put the model.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        The model, of its library's own class, with `refocus_config` (a `RefocusConfig`, or None if the dimensions are
        not known) and `trained_on` (the class names that rfclip-tiny knows; None for others).

    Raises:
        ValueError: there is no such model, tag or precision, or the weights are missing, not safetensors or not finite.
        ConnectionError: the weights could not be downloaded.
    """
    model: Any
    name = canonical_name(name)
    check_precision(precision)
    if name == TINY:
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}: {TINY} comes with its own weights")
        model = open_clip.create_model(f"local-dir:{tiny_folder()}", device=device, precision=precision)
        model.refocus_config = RefocusConfig.from_json((tiny_folder() / "refocus.json").read_text("utf-8"))
        model.trained_on = CLASSES
        return model.eval()
    check_model(name, pretrained)
    model = _family(name).load(name, pretrained, device, precision)
    bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{name}: the weights hold NaN or infinity, in {', '.join(bad[:3])}: they are damaged")
    try:
        model.refocus_config = RefocusConfig.preset(name, pretrained)
    except ValueError:
        model.refocus_config = None
    model.trained_on = None
    return model.eval()


def load_tokenizer(name: str = TINY) -> Callable[[list[str]], Tensor] | None:
    """The tokenizer of a model that `load_model` loads; None if it has CLIP's vocabulary and needs no other."""
    name = f"local-dir:{tiny_folder()}" if name == TINY else canonical_name(name)
    return _family(name).tokenizer(name)


def check_model(name: str, pretrained: str | None) -> None:
    """Raise ValueError if a model or its weights cannot be used, before anything is built or downloaded."""
    _family(name).check_name(name, pretrained)


def absolute_names(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """A model's name and its weights, with paths made absolute."""
    source, _, path = name.partition(":")
    if source in ("local-dir", "transformers") and Path(path).is_dir():
        name = f"{source}:{Path(path).absolute()}"
    return name, str(Path(pretrained).absolute()) if pretrained and Path(pretrained).is_file() else pretrained


def _family(name: str) -> type[Tower]:
    return next(family for family in FAMILIES if family.takes(name))
