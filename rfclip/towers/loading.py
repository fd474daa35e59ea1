"""Load a model by name: one of a library's, or the small CLIP bundled with the package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from rfclip.config import TINY, RefocusConfig, RegisterConfig, check_precision
from rfclip.tiny.scenes import CLASSES
from rfclip.towers import FAMILIES, Tower, read_tower, use_of
from rfclip.towers.hugging_face import HUGGING_FACE
from rfclip.towers.preprocess import Preprocess

OPENAI = ("ViT-B-16-quickgelu", "openai")  # what to take for photographs


def find_model(name: str, pretrained: str | None = None) -> tuple[str, str | None]:
    """A model and its weights as open_clip or transformers call them, however people write them.

    OpenAI's own names ("ViT-B/16", "ViT-L/14@336px") mean OpenAI's weights, as "openai/ViT-B-16" does; any other tag of
    open_clip's may stand before a slash as well, and a repository of the Hugging Face hub is taken to be open_clip's
    where that downloads weights from it, and else to hold a CLIPModel. What is none of these is returned as it is.
    """
    if ":" in name or name == TINY:
        return name, pretrained
    listed = {model.casefold(): model for model in open_clip.list_models()}

    def known(written: str) -> str | None:
        return listed.get(written.casefold().replace("/", "-").replace("@336px", "-336"))

    model = known(name)
    if model is not None:
        openai = "/" in name and pretrained is None and OPENAI[1] in open_clip.list_pretrained_tags_by_model(model)
        return model, OPENAI[1] if openai else pretrained
    head, slash, rest = name.partition("/")
    if not slash or pretrained not in (None, head):
        return name, pretrained
    model = known(rest)
    if model is not None and head.lower() in open_clip.list_pretrained_tags_by_model(model):
        return model, head.lower()
    for model, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").strip("/").casefold() == name.casefold():
            return model, tag
    return f"{HUGGING_FACE}{name}" if rest.startswith("clip-vit-") else name, None


def tiny_folder() -> Path:
    """The folder of the bundled CLIP: an open_clip config and weights, and what is known of its distraction."""
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
            "transformers:" followed by a CLIPModel on the Hugging Face hub, or by a folder of one; see `find_model` for
            other ways to write one.
        pretrained: open_clip's tag for the weights (downloaded once) or a path to safetensors; None where the name
            tells.
        device: where to put the model.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        The model, of its library's own class, with further attributes: `preprocess` (a `Preprocess`, from a picture to
        the tower's input), `tokenizer` (from texts to tokens), `refocus_config` (a `RefocusConfig`, or None if the
        dimensions are not known), `register_config` (a `RegisterConfig`, likewise) and `trained_on` (the class names
        that rfclip-tiny knows; None for others).

    Raises:
        ValueError: there is no such model, tag or precision, or the weights are missing, not safetensors or not finite.
        ConnectionError: the weights could not be downloaded.
    """
    model: Any
    name, pretrained = find_model(name, pretrained)
    check_precision(precision)
    if name == TINY:
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}: {TINY} comes with its own weights")
        model = open_clip.create_model(f"local-dir:{tiny_folder()}", device=device, precision=precision)
        model.refocus_config = RefocusConfig.from_json((tiny_folder() / "refocus.json").read_text("utf-8"))
        model.register_config = RegisterConfig.from_json((tiny_folder() / "registers.json").read_text("utf-8"))
        model.trained_on, name = CLASSES, f"local-dir:{tiny_folder()}"
    else:
        check_model(name, pretrained)
        model = _family(name).load(name, pretrained, device, precision)
        bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
        if bad:
            raise ValueError(f"{name}: the weights hold NaN or infinity, in {', '.join(bad[:3])}: they are damaged")
        try:
            model.refocus_config = RefocusConfig.preset(name, pretrained)
        except ValueError:
            model.refocus_config = None
        model.register_config = model.trained_on = None
    tower = read_tower(model)
    model.preprocess = Preprocess.of(tower)
    model.tokenizer = _family(name).tokenizer(name) or find_tokenizer(model, tower)
    return model.eval()


def find_tokenizer(model: nn.Module, tower: Tower) -> Callable[[list[str]], Tensor]:
    """A model's tokenizer: what `load_model` gave it, or CLIP's.

    Raises:
        ValueError: it has none, and another vocabulary than CLIP's.
    """
    given = getattr(model, "tokenizer", None)
    if given is not None:
        return given
    size, length = tower.vocabulary(model)
    if size != 49408:
        raise ValueError(
            f"{type(model).__name__} knows {size or 'no'} tokens, and CLIP's tokenizer has 49408: pass one that fits, "
            "such as tokenizer=open_clip.get_tokenizer(name)"
        )
    return open_clip.SimpleTokenizer(context_length=length)


def check_model(name: str, pretrained: str | None, refocused: bool = False) -> None:
    """Raise ValueError if a model or its weights cannot be used, before anything is built or downloaded.

    Args:
        name, pretrained: as `find_model` finds them.
        refocused: whether it must be possible to refocus it, as far as its name tells.
    """
    _family(name).check_name(name, pretrained)
    use, reason = use_of(name) if name in open_clip.list_models() else ("refocus", "")
    if refocused and use != "refocus":
        raise ValueError(f"{name} is only read, not refocused: {reason}; method='maskclip' reads it")


def absolute_names(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """A model's name and its weights, with paths made absolute."""
    source, _, path = name.partition(":")
    if source in ("local-dir", "transformers") and Path(path).is_dir():
        name = f"{source}:{Path(path).absolute()}"
    return name, str(Path(pretrained).absolute()) if pretrained and Path(pretrained).is_file() else pretrained


def _family(name: str) -> type[Tower]:
    return next(family for family in FAMILIES if family.takes(name))
