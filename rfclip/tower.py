"""A uniform view of CLIP's vision transformers, open_clip's and Hugging Face's: the parts that RF-CLIP takes apart.

Nothing here changes or copies a weight. Tokens are always [B, T, d], also where a library has them sequence first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

SUPPORTED = (
    "rfclip works with open_clip's own vision transformers (ViT-B-16, ViT-L-14 and the like, with a class token, "
    "standard attention and no attentional pooling) and with transformers' CLIPModel and CLIPVisionModelWithProjection"
)


class Block:
    """One residual attention block: x + out(attention), then x + mlp(ln_2(x)).

    Attributes:
        heads: H.
        ln_1, ln_2: the norms before attention and MLP.
        out, mlp: the modules, one after the other, that end the two branches.
    """

    def __init__(self, heads: int, ln_1: nn.Module, out: list[nn.Module], ln_2: nn.Module, mlp: list[nn.Module]):
        self.heads, self.ln_1, self.out, self.ln_2, self.mlp = heads, ln_1, out, ln_2, mlp

    def query_key_value(self, x: Tensor, *, query: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """q (None if not wanted), k, v of x [B, T, d], each a [B, H, T, D] view of a projection."""
        q, k, v = (
            None if u is None else u.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for u in self._projections(self.ln_1(x), query)
        )
        return q, k, v

    def _projections(self, y: Tensor, query: bool) -> Iterable[Tensor | None]:
        """q (None if not wanted), k, v of the normed stream, each [B, T, d]."""
        raise NotImplementedError

    def project(self, heads: Tensor) -> Tensor:
        """The attention branch's output [B, T, d] for what its heads gathered [B, H, T, D]."""
        return _through(self.out, heads.transpose(1, 2).flatten(2))

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """The block's output [B, T, d] from its input x and what its heads gathered [B, H, T, D]."""
        x = x + self.project(heads)
        return x + _through(self.mlp, self.ln_2(x))


class OpenCLIPBlock(Block):
    """Blocks with `nn.MultiheadAttention`, batch first or not, and with open_clip's own `Attention`."""

    def __init__(self, block: nn.Module):
        self.attention = block.attn
        # LayerScale and the norm of open_clip's custom blocks belong to the branch; both are identities in CLIP.
        norms = [block.ln_attn] if hasattr(block, "ln_attn") else []
        out, mlp = [block.attn.out_proj, *norms, block.ls_1], [block.mlp, block.ls_2]
        super().__init__(block.attn.num_heads, block.ln_1, out, block.ln_2, mlp)

    def _projections(self, y: Tensor, query: bool) -> Iterable[Tensor | None]:
        attention, unwanted = self.attention, 0 if query else y.shape[-1]
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias[unwanted:]
        *q, k, v = F.linear(y, attention.in_proj_weight[unwanted:], bias).split(y.shape[-1], dim=-1)
        return q[0] if query else None, k, v


class HuggingFaceBlock(Block):
    """A `CLIPEncoderLayer`, whose query, key and value are projected apart."""

    def __init__(self, layer: nn.Module):
        self.attention = layer.self_attn
        out, mlp = [layer.self_attn.out_proj], [layer.mlp]
        super().__init__(layer.self_attn.num_heads, layer.layer_norm1, out, layer.layer_norm2, mlp)

    def _projections(self, y: Tensor, query: bool) -> Iterable[Tensor | None]:
        attention = self.attention
        return attention.q_proj(y) if query else None, attention.k_proj(y), attention.v_proj(y)


class Tower:
    """The image tower of a CLIP.

    Attributes:
        module: what turns images into the tower's output; its `forward` is what `rfclip.refocus` replaces.
        conv: the patch convolution.
        blocks, ln_pre, ln_post: as in the paper.
        image_size, patch_size, grid_size: (height, width) in pixels, pixels and patches, as trained.
        image_mean, image_std: by which its images are normalized, for each colour.
        image_parts: names of the model's children that its text embeddings do not depend on.
    """

    image_parts: ClassVar[tuple[str, ...]]
    module: nn.Module
    conv: nn.Module
    ln_pre: nn.Module
    ln_post: nn.Module
    blocks: list[Block]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def _normalize_as(self, owner: nn.Module) -> None:
        """Take mean and standard deviation from a module that may have them; else OpenAI's."""
        self.image_mean = tuple(getattr(owner, "image_mean", OPENAI_DATASET_MEAN))
        self.image_std = tuple(getattr(owner, "image_std", OPENAI_DATASET_STD))

    @property
    def width(self) -> int:
        """d, the dimensions of the residual stream."""
        return self.conv.out_channels

    @property
    def weight(self) -> Tensor:
        """A weight, for its device and dtype."""
        return self.conv.weight

    def check_eval(self) -> None:
        """Raise RuntimeError in training mode."""
        if self.module.training:
            raise RuntimeError("the model is in training mode; RF-CLIP is for inference: call model.eval() first")

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The patch grid (gh, gw) of images [B, 3, gh * patch, gw * patch]; ValueError for any other shape."""
        patch_height, patch_width = self.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected float [B, 3, height, width]")
        height, width = images.shape[2:]
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"images of {height} x {width}: height and width must be multiples of the patch, "
                f"{patch_height} x {patch_width}; resize or pad them"
            )
        return height // patch_height, width // patch_width

    def patches(self, images: Tensor) -> Tensor:
        """The patch convolution [B, d, gh, gw] of images [B, 3, height, width]; ValueError as `grid`."""
        self.grid(images)
        return self.conv(images.to(self.weight.dtype))

    def embed(self, patches: Tensor) -> Tensor:
        """The residual stream that enters the first block, [B, 1 + gh * gw, d], of convolved patches [B, d, gh, gw].

        Another grid than the trained one gets its position embeddings by bicubic resizing (this project's choice).
        """
        height, width = patches.shape[2:]
        x = patches.flatten(2).transpose(1, 2)
        cls, position = self._embeddings()
        if (height, width) != self.grid_size:
            trained = position[1:].unflatten(0, self.grid_size).permute(2, 0, 1)[None]
            trained = trained.to(torch.promote_types(position.dtype, torch.float32))
            resized = F.interpolate(trained, size=(height, width), mode="bicubic", align_corners=False)
            position = torch.cat([position[:1], resized[0].flatten(1).T.to(position.dtype)])
        cls = cls.to(x.dtype).expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat([cls, x], dim=1) + position.to(x.dtype))

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        """The class embedding [d] and the position embeddings [1 + N, d] of the trained grid."""
        raise NotImplementedError

    def readout(self, tokens: Tensor) -> Tensor:
        """Text-aligned embeddings [..., C] of tokens [..., d] that left the last block: proj(ln_post(tokens))."""
        raise NotImplementedError

    def images(self, *args: object, **kwargs: object) -> Tensor:
        """The images [B, 3, height, width] among the arguments of the module's `forward`."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> object:
        """What the module's own forward returns for the last block's output x [B, T, d]."""
        raise NotImplementedError

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        """Image embeddings [B, C] by the tower's model, not normalized."""
        raise NotImplementedError

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Text embeddings [K, C] of tokens [K, n] by the tower's model, not normalized."""
        raise NotImplementedError

    def vocabulary(self, model: nn.Module) -> tuple[int | None, int | None]:
        """Size of the text tower's vocabulary and length of its context; None where the model does not say."""
        raise NotImplementedError


class OpenCLIPTower(Tower):
    """The `.visual` of an open_clip model."""

    image_parts = ("visual",)

    def __init__(self, visual: nn.Module):
        if not isinstance(visual, VisionTransformer):
            raise ValueError(f"got an image tower of class {type(visual).__name__}; {SUPPORTED}")
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise ValueError(f"this image tower pools its tokens by attention or not at all; {SUPPORTED}")
        for block in visual.transformer.resblocks:
            _check_block(block)
        self.module, self.conv = visual, visual.conv1
        self.ln_pre, self.ln_post = visual.ln_pre, visual.ln_post
        self.blocks = [OpenCLIPBlock(block) for block in visual.transformer.resblocks]
        self.image_size, self.patch_size = tuple(visual.image_size), tuple(visual.patch_size)
        self.grid_size = tuple(visual.grid_size)
        self._normalize_as(visual)

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        return self.module.class_embedding, self.module.positional_embedding

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

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        return model.encode_image(images)

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model.encode_text(tokens)

    def vocabulary(self, model: nn.Module) -> tuple[int | None, int | None]:
        return getattr(model, "vocab_size", None), getattr(model, "context_length", None)


class HuggingFaceTower(Tower):
    """The `vision_model` and `visual_projection` of a transformers CLIPModel or CLIPVisionModelWithProjection.

    Its images are normalized as OpenAI's models want it unless the model has `image_mean` and `image_std`, which
    `rfclip.load_model` sets.
    """

    image_parts = ("vision_model", "visual_projection")

    def __init__(self, model: nn.Module):
        vision, config = model.vision_model, model.vision_model.config
        self.module, self.proj = vision, model.visual_projection
        self.conv = vision.embeddings.patch_embedding
        self.ln_pre, self.ln_post = vision.pre_layrnorm, vision.post_layernorm
        self.blocks = [HuggingFaceBlock(layer) for layer in vision.encoder.layers]
        self.image_size, self.patch_size = (config.image_size,) * 2, (config.patch_size,) * 2
        self.grid_size = (config.image_size // config.patch_size,) * 2
        self._normalize_as(model)

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        embeddings = self.module.embeddings
        return embeddings.class_embedding, embeddings.position_embedding.weight

    def readout(self, tokens: Tensor) -> Tensor:
        return self.proj(self.ln_post(tokens))

    def images(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True, **kwargs: object) -> Tensor:
        """Whether positions are interpolated is not asked: other grids than the trained one always get theirs resized.

        Raises:
            ValueError: for an argument that asks for more than the pooled output and the last hidden state.
        """
        asked = [name for name, value in kwargs.items() if value and name != "return_dict"]
        if asked or kwargs.get("return_dict") is False:
            raise ValueError(
                f"{', '.join(asked) or 'return_dict=False'}: a refocused tower returns its pooled output and its last "
                "hidden state; undo the refocusing (handle.remove()) for more"
            )
        return pixel_values

    def pool(self, x: Tensor) -> object:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.ln_post(x[:, 0]))

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        return self.proj(model.vision_model(images, interpolate_pos_encoding=True).pooler_output)

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model.get_text_features(tokens).pooler_output

    def vocabulary(self, model: nn.Module) -> tuple[int | None, int | None]:
        text = getattr(model.config, "text_config", None)
        return getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)


def read_tower(model: nn.Module) -> Tower:
    """The image tower of an open_clip or Hugging Face CLIP.

    Raises:
        ValueError: for a model without a tower of standard blocks.
    """
    library = sys.modules.get("transformers.models.clip.modeling_clip")  # loaded where there is a model of it
    if library is not None and isinstance(model, library.CLIPModel | library.CLIPVisionModelWithProjection):
        return HuggingFaceTower(model)
    if getattr(model, "visual", None) is None:
        raise ValueError(f"got a {type(model).__name__}; {SUPPORTED}")
    return OpenCLIPTower(model.visual)


def _through(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _check_block(block: nn.Module) -> None:
    attn = getattr(block, "attn", None)
    if getattr(attn, "in_proj_weight", None) is None or not hasattr(block, "ls_1"):
        raise ValueError(
            f"this tower has blocks of class {type(block).__name__}, without a packed projection; {SUPPORTED}"
        )
    special = [name for name in ("logit_scale", "head_scale", "bias_k") if getattr(attn, name, None) is not None]
    special += [n for n in ("ln_q", "ln_k", "ln_inner") if not isinstance(getattr(attn, n, nn.Identity()), nn.Identity)]
    if special:
        raise ValueError(f"this tower's attention has {', '.join(special)}, which RF-CLIP does not define; {SUPPORTED}")
