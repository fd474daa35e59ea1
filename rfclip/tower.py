"""A uniform view of open_clip's vision transformers: the parts of a block that RF-CLIP takes apart.

Nothing here changes or copies a weight. Blocks with `nn.MultiheadAttention`, batch first or not, and blocks with
open_clip's own `Attention` hold the same parameters, so both are read the same way: tokens are always [B, T, d].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

SUPPORTED = (
    "rfclip works with open_clip's own vision transformers (ViT-B-16, ViT-L-14 and the like, with a class token, "
    "standard attention and no attentional pooling)"
)


class Block:
    """One residual attention block: x + ls_1(out_proj(attention)), then x + ls_2(mlp(ln_2(x)))."""

    def __init__(self, block: nn.Module):
        self.block = block
        self.heads = block.attn.num_heads

    def query_key_value(self, x: Tensor, *, query: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """q (None if not wanted), k, v of x [B, T, d], each a [B, H, T, D] view of one packed projection."""
        attn = self.block.attn
        unwanted = 0 if query else x.shape[-1]
        bias = None if attn.in_proj_bias is None else attn.in_proj_bias[unwanted:]
        packed = F.linear(self.block.ln_1(x), attn.in_proj_weight[unwanted:], bias)
        *q, k, v = packed.unflatten(-1, (-1, self.heads, x.shape[-1] // self.heads)).permute(2, 0, 3, 1, 4)
        return q[0] if query else None, k, v

    def project(self, heads: Tensor) -> Tensor:
        """The attention branch's output [B, T, d] for what its heads gathered [B, H, T, D]."""
        out = self.block.attn.out_proj(heads.transpose(1, 2).flatten(2))
        # LayerScale and the norm of open_clip's custom blocks belong to the branch; both are identities in CLIP.
        out = self.block.ln_attn(out) if hasattr(self.block, "ln_attn") else out
        return self.block.ls_1(out)

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """The block's output [B, T, d] from its input x and what its heads gathered [B, H, T, D]."""
        x = x + self.project(heads)
        return x + self.block.ls_2(self.block.mlp(self.block.ln_2(x)))


class Tower:
    """The image tower of an open_clip model.

    Raises:
        ValueError: for a tower that is not a standard open_clip vision transformer.
    """

    def __init__(self, visual: nn.Module):
        self.visual = visual
        if not isinstance(visual, VisionTransformer):
            raise ValueError(f"got an image tower of class {type(visual).__name__}; {SUPPORTED}")
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise ValueError(f"this image tower pools its tokens by attention or not at all; {SUPPORTED}")
        for block in visual.transformer.resblocks:
            _check_block(block)
        self.blocks = [Block(block) for block in visual.transformer.resblocks]
        self.width = visual.conv1.out_channels

    def check_eval(self) -> None:
        """Raise RuntimeError in training mode."""
        if self.visual.training:
            raise RuntimeError("the model is in training mode; RF-CLIP is for inference: call model.eval() first")

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The patch grid (gh, gw) of images [B, 3, gh * patch, gw * patch]; ValueError for any other shape."""
        patch_height, patch_width = self.visual.patch_size
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
        return self.visual.conv1(images.to(self.visual.conv1.weight.dtype))

    def embed(self, patches: Tensor) -> Tensor:
        """The residual stream that enters the first block, [B, 1 + gh * gw, d], of convolved patches [B, d, gh, gw].

        Another grid than the trained one gets its position embeddings by bicubic resizing (this project's choice).
        """
        visual, (height, width) = self.visual, patches.shape[2:]
        x = patches.flatten(2).transpose(1, 2)
        position = visual.positional_embedding
        if (height, width) != tuple(visual.grid_size):
            trained = position[1:].unflatten(0, tuple(visual.grid_size)).permute(2, 0, 1)[None]
            trained = trained.to(torch.promote_types(position.dtype, torch.float32))
            resized = F.interpolate(trained, size=(height, width), mode="bicubic", align_corners=False)
            position = torch.cat([position[:1], resized[0].flatten(1).T.to(position.dtype)])
        cls = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        return visual.ln_pre(torch.cat([cls, x], dim=1) + position.to(x.dtype))

    def readout(self, tokens: Tensor) -> Tensor:
        """Text-aligned embeddings [..., C] of tokens [..., d] that left the last block: proj(ln_post(tokens))."""
        tokens = self.visual.ln_post(tokens)
        return tokens if self.visual.proj is None else tokens @ self.visual.proj

    def pool(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What the tower's own forward returns for the last block's output x [B, T, d]."""
        pooled, tokens = self.visual._pool(x)
        if self.visual.proj is not None:
            pooled = pooled @ self.visual.proj
        return (pooled, tokens) if self.visual.output_tokens else pooled


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
