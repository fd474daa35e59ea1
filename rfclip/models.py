"""Load CLIPs by name: open_clip's, Hugging Face's, and the small one that ships with the package."""

from __future__ import annotations

import importlib.util
import warnings
from importlib import resources
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from torch import nn

from rfclip.config import TINY, RefocusConfig
from rfclip.scenes import CLASSES
from rfclip.tower import SUPPORTED

HUGGING_FACE = "transformers:"
SOURCES = ("hf-hub:", "local-dir:", HUGGING_FACE)  # names that are not open_clip's own begin with one of them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tiny_folder() -> Path:
    """The folder of the small CLIP: an open_clip config and weights, and its refocusing config."""
    return Path(str(resources.files("rfclip.tiny")))


def load_model(
    name: str = TINY,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> nn.Module:
    """A CLIP in eval mode, which knows its refocusing config where one is known.

    Args:
        name: "rfclip-tiny", the small CLIP in the package; any name that open_clip takes, "hf-hub:" and "local-dir:"
            included; or "transformers:" and a CLIPModel on the Hugging Face hub, or the folder of one.
        pretrained: open_clip's tag for the weights (downloaded once), or a path to safetensors; none for rfclip-tiny
            and transformers.
        device: where to put the model.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        The model, with `refocus_config` (a `RefocusConfig`, or None where the dimensions are not known) and
        `trained_on` (the class names that rfclip-tiny knows; None for others).

    Raises:
        ValueError: there is no such model or tag, or the weights are missing or not safetensors.
        ConnectionError: the weights could not be downloaded.
    """
    name = open_clip_name(name)
    if name == TINY:
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}: {TINY} comes with its weights and takes no others")
        model = open_clip.create_model(f"local-dir:{tiny_folder()}", device=device, precision=precision)
        model.refocus_config = RefocusConfig.from_json((tiny_folder() / "refocus.json").read_text())
        model.trained_on = CLASSES
        return model.eval()
    check_model(name, pretrained)
    load = _load_hugging_face if name.startswith(HUGGING_FACE) else _load_open_clip
    model = load(name, pretrained, device, precision)
    try:
        model.refocus_config = RefocusConfig.preset(name, pretrained)
    except ValueError:
        model.refocus_config = None
    model.trained_on = None
    return model.eval()


def _load_open_clip(name: str, pretrained: str | None, device: str | torch.device, precision: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # open_clip warns where a checkpoint wants QuickGELU and the name does not say so: force it instead.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            return open_clip.create_model(
                name,
                pretrained,
                device=device,
                precision=precision,
                force_quick_gelu=bool((open_clip.get_pretrained_cfg(name, pretrained or "") or {}).get("quick_gelu")),
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        downloaded = name.startswith("hf-hub:") or open_clip.is_pretrained_cfg(name, pretrained or "")
        if not downloaded:
            source = name if name.startswith("local-dir:") else pretrained
            raise ValueError(f"{source} does not hold the weights of {name}: {_first_line(error)}") from error
        raise ConnectionError(
            f"the weights of {name!r} ({pretrained!r}) could not be downloaded: {_first_line(error)}\n"
            "This needs a network once; later runs use the copy on disk. Without one, give --pretrained the path of "
            f"weights saved as safetensors, or use the model in the package, {TINY} (the default)."
        ) from error


def _load_hugging_face(name: str, pretrained: None, device: str | torch.device, precision: str) -> nn.Module:
    import transformers

    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(DTYPES)}")
    source = name.removeprefix(HUGGING_FACE)
    try:
        kind = transformers.CLIPConfig.get_config_dict(source)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"{name} is a model of type {kind!r}; {SUPPORTED}")
        processor = transformers.CLIPImageProcessor.from_pretrained(source)
        model, loading = transformers.CLIPModel.from_pretrained(
            source, dtype=DTYPES[precision], use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        if Path(source).is_dir():
            raise ValueError(f"{source} does not hold a CLIPModel: {_first_line(error)}") from error
        raise ConnectionError(
            f"{source!r} could not be downloaded from the Hugging Face hub: {_first_line(error)}\n"
            "This needs a network once; later runs use the copy on disk."
        ) from error
    if loading["missing_keys"]:
        raise ValueError(f"{source} lacks weights of a CLIPModel: {', '.join(sorted(loading['missing_keys']))}")
    model.image_mean, model.image_std = tuple(processor.image_mean), tuple(processor.image_std)
    return model.to(device)


def can_refocus(name: str) -> bool:
    """Whether open_clip's config of that name describes an image tower that `rfclip.refocus` accepts."""
    vision = open_clip.get_model_config(name)["vision_cfg"]
    standard = isinstance(vision.get("layers", 12), int) and not vision.get("timm_model_name")
    return standard and not vision.get("attentional_pool") and vision.get("pool_type", "tok") in ("tok", "avg")


def load_tokenizer(name: str = TINY):
    """The tokenizer of a model that `load_model` loads; None for one of transformers, which has CLIP's vocabulary."""
    if name.startswith(HUGGING_FACE):
        return None
    return open_clip.get_tokenizer(f"local-dir:{tiny_folder()}" if name == TINY else open_clip_name(name))


def open_clip_name(name: str) -> str:
    """A model's name as open_clip lists it: ViT-B/16 is ViT-B-16."""
    return name if name.startswith(SOURCES) else name.replace("/", "-")


def absolute_names(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """A model's name and its weights, with absolute paths where these are paths."""
    source, _, path = name.partition(":")
    if source == "local-dir" or (name.startswith(HUGGING_FACE) and Path(path).is_dir()):
        name = f"{source}:{Path(path).absolute()}"
    return name, str(Path(pretrained).absolute()) if pretrained and Path(pretrained).is_file() else pretrained


def check_model(name: str, pretrained: str | None) -> None:
    """Raise ValueError where a model or its weights cannot be used, before anything is built or downloaded."""
    if name.startswith(HUGGING_FACE):
        if importlib.util.find_spec("transformers") is None:
            raise ValueError(f'{name} needs transformers: pip install "rfclip[transformers]"')
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}: {name} comes with its weights and takes no others")
        return
    if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        raise ValueError(f"{name}: there is no such folder")
    if name.startswith(SOURCES):
        return
    if name not in open_clip.list_models():
        raise ValueError(f"unknown model {name!r}; `rfclip models` lists those there are")
    if not can_refocus(name):
        raise ValueError(f"{name} cannot be refocused; {SUPPORTED}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(f"{name} needs pretrained weights: one of {', '.join(tags) or 'none is known'}, or a path")
    if pretrained.lower() in tags:
        return
    path = Path(pretrained)
    if not path.is_file():
        raise ValueError(f"pretrained={pretrained!r} is neither a file nor weights of {name}: {', '.join(tags)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights must be safetensors, since a pickle can run code; convert them first")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
