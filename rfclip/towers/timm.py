"""timm's vision transformers in open_clip, for readout: SigLIP, PE-Core, EVA02, ViTamin, MobileCLIP-B and others.

Where a pool attends to all tokens, with one learned query for the whole picture, a token is read out as the pool would
see it alone: its values, the output projection, and the pool's MLP, as MaskCLIP does it with the pool of a ResNet [D].
Rotary embeddings are those of timm for the grid at hand, so that queries and keys depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from rfclip.towers.base import SUPPORTED, Block
from rfclip.towers.open_clip import OpenCLIPTower
from rfclip.towers.uses import TIMM

TRUNKS = ("VisionTransformer", "Eva")
BLOCKS = ("Block", "EvaBlock")
POST_NORM = ("ResPostBlock", "EvaBlockPostNorm")  # blocks whose norms end the branches
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
POOLS = ("token", "avg", "map")
# What decides on rotary embeddings beside the grid, in any release of timm; others are for training.
ROTARY = (
    *("dim", "max_res", "temperature", "linear_bands", "in_pixels", "ref_feat_shape"),
    *("grid_offset", "grid_indexing", "rotate_half", "grid_type", "normalize_coords"),
)


class TimmBlock(Block):
    """A block whose projections are packed or separate, with norms of queries and keys and rotary embeddings, if any.

    Attributes:
        rotates: whether it has rotary embeddings.
        rotary: those of the grid at hand, [N, 2 D]; None before `TimmTower.blocks_on`.
    """

    def __init__(
        self,
        attention: Any,
        norms: tuple[nn.Module, nn.Module],
        parts: tuple[nn.Module, list[nn.Module], nn.Module, list[nn.Module]],
        rotates: bool,
        rotary: Tensor | None = None,
    ) -> None:
        """Norms are those of queries and keys; parts are ln_1, the output, ln_2 and the MLP, as `Block` takes them."""
        self.attention, (self.q_norm, self.k_norm), self.parts = attention, norms, parts
        self.rotates, self.rotary = rotates, rotary
        super().__init__(attention.num_heads, *parts)

    @classmethod
    def read(cls, block: Any, rotates: bool) -> TimmBlock:
        """Of a block of timm's."""
        attention = block.attn
        q_norm, k_norm = (getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        out = [getattr(attention, "norm", nn.Identity()), attention.proj]
        if type(block).__name__ in POST_NORM:
            ln_1, ln_2 = nn.Identity(), nn.Identity()
            out, mlp = [*out, block.norm1], [block.mlp, block.norm2]
        else:
            ln_1, ln_2 = block.norm1, block.norm2
            out.append(getattr(block, "ls1", nn.Identity()))
            mlp = [block.mlp, getattr(block, "ls2", nn.Identity())]
        return cls(attention, (q_norm, k_norm), (ln_1, out, ln_2, mlp), rotates)

    def on(self, rotary: Tensor) -> TimmBlock:
        """The same with the rotary embeddings of a grid."""
        return TimmBlock(self.attention, (self.q_norm, self.k_norm), self.parts, self.rotates, rotary)

    def heads_of(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(y)
        return self._placed(self.q_norm(q)), self._placed(self.k_norm(k)), v

    def key_value(self, y: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(y)
        return self._placed(self.k_norm(k)), v

    def linears(self) -> None:
        return None

    def _projections(self, y: Tensor, query: bool) -> Sequence[Tensor]:
        attention = self.attention
        if attention.qkv is None:
            q = [attention.q_proj(y)] if query else []
            return [*q, attention.k_proj(y), attention.v_proj(y)]
        if getattr(attention, "q_bias", None) is None:
            packed = attention.qkv(y)
        else:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            packed = F.linear(y, attention.qkv.weight, bias)
        return packed.chunk(3, dim=-1)[0 if query else 1 :]

    def _placed(self, u: Tensor) -> Tensor:
        """Queries or keys [B, H, T, D] rotated by their places; tokens in front of the patches have none."""
        if not self.rotates:
            return u
        if self.rotary is None:
            raise RuntimeError("queries and keys of this tower depend on the grid: take its blocks_on(grid)")
        prefix = u.shape[2] - self.rotary.shape[0]  # len() would fix a size that an exporter leaves open
        half = {"half": True} if getattr(self.attention, "rotate_half", False) else {}
        rotated = apply_rot_embed_cat(u[:, :, prefix:], self.rotary, **half)
        return torch.cat([u[:, :, :prefix], rotated.to(u.dtype)], dim=2)


class TimmTower(OpenCLIPTower):
    """The `.visual` of an open_clip model whose image tower is timm's."""

    library = "timm"
    host = "open_clip"
    reason = TIMM
    module: Any  # a TimmModel
    blocks: list[TimmBlock]  # type: ignore[assignment]

    @classmethod
    def find(cls, model: nn.Module) -> nn.Module | None:
        visual = getattr(model, "visual", None)
        return visual if isinstance(visual, TimmModel) else None

    @classmethod
    def takes(cls, name: str) -> bool:
        return False  # loaded as open_clip's others are

    def __init__(self, model: Any) -> None:
        self.module, self.trunk = model.visual, model.visual.trunk
        trunk = self.trunk
        self.title = f"timm's {type(trunk).__name__}"
        obstacle = _obstacle(trunk)
        if obstacle:
            raise ValueError(f"got a TimmModel around {self.title}, which cannot be read: {obstacle}; {SUPPORTED}")
        embed = trunk.patch_embed
        self.local = type(embed).__name__ == "PatchEmbed"
        if self.local:
            self.conv = embed.proj
        self.ln_pre, self.ln_post = getattr(trunk, "norm_pre", nn.Identity()), trunk.norm
        self.rope = getattr(trunk, "rope", None)
        self.blocks = [TimmBlock.read(block, self.rope is not None) for block in trunk.blocks]
        self.prefix, self.has_cls = trunk.num_prefix_tokens, trunk.cls_token is not None
        ratio = (1, 1) if self.local else embed.feature_ratio
        self.image_size, self.grid_size = tuple(embed.img_size), tuple(embed.grid_size)
        self.patch_size = (embed.patch_size[0] * ratio[0], embed.patch_size[1] * ratio[1])
        self._rotary: dict[tuple[object, ...], Tensor] = {}
        self._normalize_as(self.module)
        parts = [("trunk", trunk), ("patch_embed", embed), ("blocks", trunk.blocks)]
        for number, block in enumerate(trunk.blocks, 1):
            parts += [(f"block {number}", block), (f"the attention of block {number}", block.attn)]
            if getattr(block.attn, "q_bias", None) is not None:
                parts.append((f"the projection of block {number}", block.attn.qkv))
        if trunk.attn_pool is not None:
            parts.append(("the attention pool", trunk.attn_pool))
        self._bypass(*parts)

    @property
    def width(self) -> int:
        return self.trunk.embed_dim

    @property
    def weight(self) -> Tensor:
        return self.trunk.blocks[0].attn.proj.weight

    def patches(self, images: Tensor) -> Tensor:
        """What the convolutions make of images: of the patch alone, or of a stem that looks beyond it (not `local`)."""
        if self.local:
            return super().patches(images)
        self.grid(images)
        embed = self.trunk.patch_embed
        return embed.proj(embed.backbone(images.to(self.weight.dtype)))

    def blocks_on(self, grid: Sequence[int]) -> list[Block]:
        if self.rope is None:
            return list(self.blocks)
        rotary = self._rotary_on((grid[0], grid[1]))
        return [block.on(rotary) for block in self.blocks]

    def _rotary_on(self, grid: tuple[int, int]) -> Tensor:
        """timm's rotary embeddings, [N, 2 D], by its own rule for other grids than the trained one."""
        rope: Any = self.rope
        weight = self.weight
        # A size that an exporter leaves open may be the trained one, whose embeddings the same rule gives.
        if any(isinstance(side, torch.SymInt) for side in grid):
            return self._rotary_of(list(grid))
        if grid == self.grid_size:
            return rope.get_embed()
        if torch.compiler.is_compiling() or detect_fake_mode(weight) is not None:
            return self._rotary_of(list(grid))
        key = grid, weight.device, weight.dtype
        if key not in self._rotary:  # for good, since CUDA graphs read it
            with torch.inference_mode(False):  # for use in every mode
                self._rotary[key] = self._rotary_of(list(grid))
        return self._rotary[key]

    def _rotary_of(self, grid: list[int]) -> Tensor:
        settings = {name: getattr(self.rope, name) for name in ROTARY if hasattr(self.rope, name)}
        return torch.cat(build_rotary_pos_embed(grid, **settings), dim=-1).to(self.weight)

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        trunk = self.trunk
        tokens = [each[0] for each in (trunk.cls_token, getattr(trunk, "reg_token", None)) if each is not None]
        patches = self.grid_size[0] * self.grid_size[1]
        prefix = torch.cat([self.weight.new_zeros(0, self.width), *tokens])
        if trunk.pos_embed is None:
            return prefix, self.weight.new_zeros(self.prefix + patches, self.width)
        position = trunk.pos_embed[0]
        return prefix, F.pad(position, (0, 0, self.prefix + patches - len(position), 0))

    def readout(self, tokens: Tensor) -> Tensor:
        """What the pool, and what follows it, make of each token [..., d] as if it were the only one, [..., C]."""
        trunk, pool = self.trunk, self.trunk.attn_pool
        x = self.ln_post(tokens)
        if pool is not None:
            x = pool.proj(pool.kv(x).chunk(2, dim=-1)[1])
            x = x if pool.mlp is None else x + pool.mlp(pool.norm(x))
        return self.module.head(trunk.head(trunk.fc_norm(x)))

    def images(self, x: Tensor) -> Tensor:
        """A picture of the trained size may have more than whole patches, 384 pixels for 14: the rest is not seen."""
        if tuple(getattr(x, "shape", ())[-2:]) == self.image_size:
            height, width = (side * patch for side, patch in zip(self.grid_size, self.patch_size, strict=True))
            return x[..., :height, :width]
        return x

    def pool(self, x: Tensor) -> Tensor:
        return self.module.head(self.trunk.forward_head(self.ln_post(x)))

    def embedding(self, x: Tensor) -> Tensor:
        return self.pool(x)


def _obstacle(trunk: Any) -> str:
    """Why a trunk cannot be read; nothing if it can."""
    if type(trunk).__name__ not in TRUNKS:
        return "it is none of timm's plain transformers"
    if trunk.global_pool not in POOLS:
        return f"it pools by {trunk.global_pool or 'nothing'!r}, not by one of {', '.join(POOLS)}"
    pool, embed, rope = trunk.attn_pool, trunk.patch_embed, getattr(trunk, "rope", None)
    if pool is not None and (type(pool).__name__ != "AttentionPoolLatent" or pool.pos_embed is not None):
        return f"its pool is a {type(pool).__name__}, or adds positions"
    if not isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity):
        return "its patches have a norm of their own"
    if rope is not None and type(rope).__name__ != "RotaryEmbeddingCat":
        return f"its positions are a {type(rope).__name__}"
    for block in trunk.blocks:
        attention = getattr(block, "attn", None)
        if type(block).__name__ not in BLOCKS + POST_NORM or type(attention).__name__ not in ATTENTIONS:
            return f"it has blocks of class {type(block).__name__} with attention of class {type(attention).__name__}"
        if getattr(attention, "gate", None) is not None or getattr(attention, "num_kv_groups", 1) != 1:
            return "its attention has gates, or shares keys among heads"
        if getattr(block, "gamma_1", None) is not None:
            return "its blocks scale their branches by parameters of their own"
    return ""
