"""Hugging Face's CLIP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rfclip.extras import require
from rfclip.ops.dispatch import hooked
from rfclip.towers.base import SUPPORTED, Block, Tower, first_line, is_plain, steps
from rfclip.towers.bounds import Bounded

LARGEST = 20_000_000_000  # bytes of weights, where they are on the hub
HUGGING_FACE = "transformers:"  # prefix of the names of its models
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HuggingFaceBlock(Block):
    """A `CLIPEncoderLayer`, which projects query, key and value separately."""

    def __init__(self, layer: Any) -> None:
        self.attention = layer.self_attn
        out, mlp = [layer.self_attn.out_proj], steps(layer.mlp)
        super().__init__(layer.self_attn.num_heads, layer.layer_norm1, out, layer.layer_norm2, mlp)

    def _projections(self, y: Tensor, query: bool) -> Sequence[Tensor]:
        attention = self.attention
        q = [attention.q_proj(y)] if query else []
        return [*q, attention.k_proj(y), attention.v_proj(y)]

    def linears(self) -> list[tuple[Tensor, Tensor | None]] | None:
        layers = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]
        plain = all(type(layer) is nn.Linear and not hooked(layer) and is_plain(layer.weight) for layer in layers)
        return [(layer.weight, layer.bias) for layer in layers] if plain else None


class HuggingFaceTower(Tower):
    """The `vision_model` and `visual_projection` of a transformers CLIPModel or CLIPVisionModelWithProjection.

    Images are normalized as for OpenAI's models unless the model has `image_mean` and `image_std`, which
    `rfclip.load_model` sets.
    """

    image_parts = ("vision_model", "visual_projection")
    library = "transformers"
    prefix = 1
    module: Any  # a CLIPVisionTransformer

    @classmethod
    def find(cls, model: Any) -> nn.Module | None:
        library = sys.modules.get("transformers.models.clip.modeling_clip")  # imported if there is a model of it
        if library is None or not isinstance(model, (library.CLIPModel, library.CLIPVisionModelWithProjection)):
            return None
        return model.vision_model

    @classmethod
    def takes(cls, name: str) -> bool:
        return name.startswith(HUGGING_FACE)

    @classmethod
    def check_name(cls, name: str, pretrained: str | None) -> None:
        require(name, "transformers", "transformers")
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}: {name} comes with its own weights")

    @classmethod
    def load(cls, name: str, pretrained: str | None, device: str | torch.device, precision: str) -> nn.Module:
        import transformers

        source = name.removeprefix(HUGGING_FACE)
        try:
            kind = transformers.CLIPConfig.get_config_dict(source)[0].get("model_type")
            if kind != "clip":
                raise ValueError(f"{name} is a model of type {kind!r}; {SUPPORTED}")
            processor = transformers.CLIPImageProcessor.from_pretrained(source)
            size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) or LARGEST
            with Bounded(size):
                model, loading = transformers.CLIPModel.from_pretrained(
                    source, dtype=DTYPES[precision], use_safetensors=True, output_loading_info=True
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            if Path(source).is_dir():
                raise ValueError(f"{source} does not hold a CLIPModel: {first_line(error)}") from error
            raise ConnectionError(
                f"{source!r} could not be downloaded from the Hugging Face hub: {first_line(error)}\n"
                "This needs a network once; later runs use the copy on disk."
            ) from error
        if loading["missing_keys"]:
            raise ValueError(f"{source} lacks weights of a CLIPModel: {', '.join(sorted(loading['missing_keys']))}")
        model.image_mean, model.image_std = _statistics(source, processor)
        return model.to(device)

    @classmethod
    def tokenizer(cls, name: str) -> None:
        return None

    def __init__(self, model: Any) -> None:
        vision, config = model.vision_model, model.vision_model.config
        self.module, self._model = vision, model
        self.conv = vision.embeddings.patch_embedding
        self.ln_pre, self.ln_post = vision.pre_layrnorm, vision.post_layernorm
        self.blocks = [HuggingFaceBlock(layer) for layer in vision.encoder.layers]
        self.image_size, self.patch_size = (config.image_size,) * 2, (config.patch_size,) * 2
        self.grid_size = (config.image_size // config.patch_size,) * 2
        self._normalize_as(model)
        parts = [("embeddings", vision.embeddings), ("position_embedding", vision.embeddings.position_embedding)]
        parts += [("encoder", vision.encoder), ("layers", vision.encoder.layers)]
        for number, layer in enumerate(vision.encoder.layers, 1):
            parts += [(f"layer {number}", layer), (f"the attention of layer {number}", layer.self_attn)]
            parts += [(f"the MLP of layer {number}", layer.mlp)] if len(steps(layer.mlp)) > 1 else []
        self._bypass(*parts)

    @property
    def roots(self) -> list[nn.Module]:
        return [self.module, self._model.visual_projection]

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        embeddings = self.module.embeddings
        return embeddings.class_embedding[None], embeddings.position_embedding.weight

    def readout(self, tokens: Tensor) -> Tensor:
        return self._model.visual_projection(self.ln_post(tokens))

    def images(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True, **kwargs: object) -> Tensor:
        """Position embeddings are always resized to the grid, whatever `interpolate_pos_encoding` says.

        Raises:
            ValueError: an argument, or the model's config, asks for more than the pooled output and the last hidden
                state, or for a tuple of them.
        """
        config = self.module.config
        named = {name: getattr(config, name, None) for name in ("output_attentions", "output_hidden_states")}
        named |= {"return_dict": getattr(config, "return_dict", True)}
        named |= {name: value for name, value in kwargs.items() if value is not None}
        asked = [f"{name}={value}" for name, value in named.items() if bool(value) != (name == "return_dict")]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}, as an argument or in the model's config: a refocused tower returns its pooled "
                "output and its last hidden state by name; undo the refocusing (handle.remove()) for anything else"
            )
        return pixel_values

    def pool(self, x: Tensor) -> object:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.ln_post(x[:, 0]))

    def encode_image(self, model: Any, images: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(images, interpolate_pos_encoding=True)[1])

    def encode_text(self, model: Any, tokens: Tensor) -> Tensor:
        found = model.get_text_features(tokens)
        return found if isinstance(found, Tensor) else found[1]  # transformers 4, and the pooled output of 5

    def vocabulary(self, model: Any) -> tuple[int | None, int | None]:
        text = getattr(model.config, "text_config", None)
        return getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)


def _statistics(source: str, processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, per colour, for pixels from 0 to 1, of a processor that may take other ranges.

    A processor makes (factor * pixel - mean) / std of a pixel from 0 to 1.

    Raises:
        ValueError: its settings are no numbers to normalize by.
    """
    factor = 255 * (processor.rescale_factor or 0) if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    try:
        mean, std = (np.broadcast_to(np.asarray(each, np.float64), 3) / factor for each in (mean, std))
    except (TypeError, ValueError):
        mean = std = np.zeros(3)
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(
            f"{source}: its preprocessor_config.json says image_mean={processor.image_mean}, image_std="
            f"{processor.image_std}, rescale_factor={processor.rescale_factor}: expected numbers, and no std of 0"
        )
    return tuple(mean.tolist()), tuple(std.tolist())
