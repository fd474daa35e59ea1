"""open_clip's own vision transformers."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from rfclip.config import TINY
from rfclip.extras import require
from rfclip.towers.base import SUPPORTED, Block, Tower, first_line, is_plain, steps
from rfclip.towers.bounds import Bounded
from rfclip.towers.uses import use_of

SOURCES = ("hf-hub:", "local-dir:")  # prefixes of names that are not in open_clip's list
# What the weights are called there, likeliest first.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


class OpenCLIPBlock(Block):
    """Blocks with `nn.MultiheadAttention`, batch first or not, and with open_clip's own `Attention`."""

    def __init__(self, block: Any) -> None:
        self.attention = block.attn
        # LayerScale and the norm in open_clip's custom blocks belong to the branch; OpenAI's blocks have neither.
        ends = [getattr(block, name) for name in ("ln_attn", "ls_1") if hasattr(block, name)]
        scale = [block.ls_2] if hasattr(block, "ls_2") else []
        out, mlp = [block.attn.out_proj, *ends], [*steps(block.mlp), *scale]
        super().__init__(block.attn.num_heads, block.ln_1, out, block.ln_2, mlp)

    def _projections(self, y: Tensor, query: bool) -> Sequence[Tensor]:
        attention, unwanted = self.attention, 0 if query else y.shape[-1]
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias[unwanted:]
        return F.linear(y, attention.in_proj_weight[unwanted:], bias).split(y.shape[-1], dim=-1)

    def linears(self) -> list[tuple[Tensor, Tensor | None]] | None:
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        return [(weight, bias)] if is_plain(weight) else None


class OpenCLIPTower(Tower):
    """The `.visual` of an open_clip model. This family takes every name that no other does."""

    image_parts = ("visual",)
    library = "open_clip"
    prefix = 1
    module: VisionTransformer

    @classmethod
    def find(cls, model: nn.Module) -> nn.Module | None:
        return getattr(model, "visual", None)

    @classmethod
    def takes(cls, name: str) -> bool:
        return True

    @classmethod
    def check_name(cls, name: str, pretrained: str | None) -> None:
        if name.startswith("local-dir:"):
            folder = Path(name.removeprefix("local-dir:"))
            if not folder.is_dir():
                raise ValueError(f"{name}: there is no such folder")
            _weights_in(folder)
        if name.startswith(SOURCES):
            return
        if name not in open_clip.list_models():
            raise ValueError(f"unknown model {name!r}{_similar(name)}; `rfclip models` lists the known ones")
        use, reason = use_of(name)
        if use == "neither":
            raise ValueError(f"{name} cannot be read: {reason}; {SUPPORTED}")
        text = open_clip.get_model_config(name).get("text_cfg", {})
        if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
            require(f"the tokenizer of {name}", "transformers", "transformers")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None:
            raise ValueError(f"{name} needs pretrained weights: one of {', '.join(tags) or 'none is known'}, or a path")
        if pretrained.lower() in tags:
            return
        path = Path(pretrained)
        if not path.is_file():
            raise ValueError(f"pretrained={pretrained!r} is neither a file nor weights of {name}: {', '.join(tags)}")
        _check_safe(path)

    @classmethod
    def load(cls, name: str, pretrained: str | None, device: str | torch.device, precision: str) -> nn.Module:
        weights = _weights_of(name, pretrained)
        given: dict[str, Any] = {"device": device, "precision": precision}
        try:
            if name.startswith(SOURCES):
                # open_clip itself would go on without weights where it finds none, and take pickles.
                root = logging.getLogger()
                root.addFilter(_no_weights_yet)
                try:
                    with Bounded(weights.stat().st_size):
                        model = open_clip.create_model(name, load_weights=False, pretrained_text=False, **given)
                finally:
                    root.removeFilter(_no_weights_yet)
                open_clip.load_checkpoint(model, str(weights))
                return model
            quick_gelu = (open_clip.get_pretrained_cfg(name, pretrained or "") or {}).get("quick_gelu")
            with warnings.catch_warnings():
                # open_clip warns if a checkpoint wants QuickGELU and the name does not say so: force it instead.
                warnings.filterwarnings("ignore", message="QuickGELU mismatch")
                return open_clip.create_model(name, pretrained, force_quick_gelu=bool(quick_gelu), **given)
        except Exception as error:  # of any kind, from whatever the files hold
            raise ValueError(f"{weights} does not hold the weights of {name}: {_reason(error)}") from error

    @classmethod
    def tokenizer(cls, name: str) -> Callable[[list[str]], Tensor] | None:
        try:
            return open_clip.get_tokenizer(name)
        except Exception as error:  # of any kind: the hub's own, a timeout, a file that is broken
            require(f"the tokenizer of {name}", "transformers", "transformers")
            local = name.startswith("local-dir:")
            message = f"the tokenizer of {name!r} could not be {'read' if local else 'downloaded'}: {first_line(error)}"
            if local:
                raise ValueError(message) from error
            raise ConnectionError(f"{message}\nThis needs a network once; later runs use the copy on disk.") from error

    def __init__(self, model: Any) -> None:
        visual = model.visual
        if not isinstance(visual, VisionTransformer):
            raise ValueError(f"got an image tower of class {type(visual).__name__}; {SUPPORTED}")
        self._check_pool(visual)
        self.image_size, self.patch_size = tuple(visual.image_size), tuple(visual.patch_size)
        self.grid_size = tuple(visual.grid_size)
        self._take(visual)

    def _take(self, visual: Any) -> None:
        """The parts of a tower, by the names that open_clip has from OpenAI; ValueError as for the constructor."""
        blocks = visual.transformer.resblocks
        parts = [("transformer", visual.transformer), ("resblocks", blocks)]
        for number, block in enumerate(blocks, 1):
            _check_block(block)
            parts += [(f"block {number}", block), (f"the attention of block {number}", block.attn)]
            parts += [(f"the MLP of block {number}", block.mlp)] if len(steps(block.mlp)) > 1 else []
            if isinstance(block.attn, nn.MultiheadAttention):  # which reads the weights of this one, as of itself
                parts.append((f"the output projection of block {number}", block.attn.out_proj))
        self.module, self.conv = visual, visual.conv1
        self.ln_pre, self.ln_post = visual.ln_pre, visual.ln_post
        self.blocks = [OpenCLIPBlock(block) for block in blocks]
        self._normalize_as(visual)
        self._bypass(*parts)

    def _check_pool(self, visual: Any) -> None:
        """Raise ValueError unless the image embedding is that of CLS, or the mean of patches."""
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise ValueError(f"this image tower has two pools, or does not pool its tokens; {SUPPORTED}")

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        return self.module.class_embedding[None], self.module.positional_embedding

    def readout(self, tokens: Tensor) -> Tensor:
        tokens, proj = self.ln_post(tokens), self.module.proj
        return tokens if proj is None else tokens @ proj

    def images(self, x: Tensor) -> Tensor:
        return x

    def pool(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pooled, tokens = self.module._pool(x)
        if self.module.proj is not None:
            pooled = pooled @ self.module.proj
        return (pooled, tokens) if self.module.output_tokens else pooled

    def encode_image(self, model: Any, images: Tensor) -> Tensor:
        return model.encode_image(images)

    def encode_text(self, model: Any, tokens: Tensor) -> Tensor:
        return model.encode_text(tokens)

    def vocabulary(self, model: Any) -> tuple[int | None, int | None]:
        text = getattr(model, "text", None)  # where CoCa keeps them
        size, length = (getattr(model, name, getattr(text, name, None)) for name in ("vocab_size", "context_length"))
        return size, length


def _similar(name: str) -> str:
    """Names that somebody who wrote an unknown one may have meant."""
    if "/" in name:
        return f": on the Hugging Face hub, hf-hub:{name} is open_clip's, and transformers:{name} a CLIPModel"
    names = {known.casefold(): known for known in [TINY, *filter(_readable, open_clip.list_models())]}
    close = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(names[each] for each in close)}?" if close else ""


def _reason(error: Exception) -> str:
    """What went wrong, where a library's error alone does not tell."""
    if isinstance(error, StopIteration):
        return "the file is empty"
    return f"its config lacks {error}" if isinstance(error, KeyError) else first_line(error)


def _no_weights_yet(record: logging.LogRecord) -> bool:
    """A filter that drops what open_clip says of a model whose weights are loaded next."""
    said = record.getMessage()  # open_clip 3.0 has other words for it
    return "No pretrained weights loaded" not in said and "initialized partially" not in said


def _weights_of(name: str, pretrained: str | None) -> Path:
    """The weights of a model: in a folder, in a file, or downloaded.

    Raises:
        ValueError: there are none, or they are not safetensors.
        ConnectionError: they could not be downloaded.
    """
    source, _, place = name.partition(":")
    if source == "local-dir":
        return _weights_in(Path(place))
    known = open_clip.get_pretrained_cfg(name, pretrained or "")
    if source != "hf-hub" and not known:
        return Path(pretrained or "")
    try:
        if source == "hf-hub":
            weights = open_clip.factory.download_pretrained_from_hf(place, filename=WEIGHTS[0])
        else:
            weights = open_clip.factory.download_pretrained(known)
    except Exception as error:  # of any kind: the hub's own, a timeout, a full disk
        raise ConnectionError(
            f"the weights of {name!r} ({pretrained!r}) could not be downloaded: {first_line(error)}\n"
            "This needs a network once; later runs use the copy on disk. Without one, pass --pretrained the path "
            f"of weights saved as safetensors, or use the bundled model, {TINY}."
        ) from error
    _check_safe(Path(weights))
    return Path(weights)


def _weights_in(folder: Path) -> Path:
    """The safetensors of a folder; ValueError if there are none, or several of unknown names."""
    found = sorted(folder.glob("*.safetensors"))
    named = [folder / name for name in WEIGHTS if folder / name in found]
    if named or len(found) == 1:
        return (named or found)[0]
    if found:
        raise ValueError(f"{folder} holds several weights, none of which is called {WEIGHTS[0]}: rename one")
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")]
    pickled = f"; {', '.join(pickles)} may be pickled, and a pickle can run code: convert it first" if pickles else ""
    raise ValueError(f"{folder} holds no weights: expected {WEIGHTS[0]}{pickled}")


def _check_safe(weights: Path) -> None:
    if weights.suffix != ".safetensors":
        raise ValueError(f"{weights}: weights must be safetensors, since a pickle can run code; convert them first")


def _readable(name: str) -> bool:
    return use_of(name)[0] != "neither"


def _check_block(block: Any) -> None:
    attn = getattr(block, "attn", None)
    if getattr(attn, "in_proj_weight", None) is None:
        raise ValueError(
            f"this tower has blocks of class {type(block).__name__}, without a packed projection; {SUPPORTED}"
        )
    special = [name for name in ("logit_scale", "head_scale", "bias_k") if getattr(attn, name, None) is not None]
    special += [n for n in ("ln_q", "ln_k", "ln_inner") if not isinstance(getattr(attn, n, nn.Identity()), nn.Identity)]
    if special:
        raise ValueError(f"this tower's attention has {', '.join(special)}, which RF-CLIP does not define; {SUPPORTED}")
