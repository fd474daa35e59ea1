"""open_clip's CoCa, for readout: its transformer is CLIP's, and its image embedding comes from a pool over all tokens.

A token is read out as the pool would see it alone, by its values and output projection, before ln_post and proj [D].
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from rfclip.towers.base import SUPPORTED
from rfclip.towers.open_clip import OpenCLIPTower
from rfclip.towers.uses import POOLED


class CoCaTower(OpenCLIPTower):
    """The `.visual` of an open_clip model whose vision transformer has one attentional pool."""

    reason = POOLED
    title = "a transformer with an attentional pool"

    @classmethod
    def find(cls, model: nn.Module) -> nn.Module | None:
        visual: Any = getattr(model, "visual", None)
        pooled = isinstance(visual, VisionTransformer) and visual.attn_pool is not None
        return visual if pooled and visual.attn_pool_contrastive is None else None

    @classmethod
    def takes(cls, name: str) -> bool:
        return False  # loaded as open_clip's others are

    def _check_pool(self, visual: Any) -> None:
        attention = visual.attn_pool.attn
        if not isinstance(attention, nn.MultiheadAttention) or attention.bias_k is not None:
            raise ValueError(f"this image tower's pool attends by a {type(attention).__name__}; {SUPPORTED}")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        pool = model.visual.attn_pool
        parts = [("the pool", pool), ("the pool's attention", pool.attn)]
        self._bypass(*self._parts.items(), *parts, ("the pool's output projection", pool.attn.out_proj))

    def readout(self, tokens: Tensor) -> Tensor:
        """Text-aligned embeddings [..., C] of tokens [..., d], each as the pool would see it alone."""
        pool = self.module.attn_pool
        attention, width = pool.attn, pool.attn.embed_dim
        weight = attention.v_proj_weight  # None if values are as wide as the pool
        weight = attention.in_proj_weight[2 * width :] if weight is None else weight
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
        return super().readout(attention.out_proj(F.linear(pool.ln_k(tokens), weight, bias)))

    def embedding(self, x: Tensor) -> Tensor:
        found = self.pool(x)
        return found[0] if isinstance(found, tuple) else found

    def encode_image(self, model: Any, images: Tensor) -> Tensor:
        return model.encode_image(images, normalize=False)

    def encode_text(self, model: Any, tokens: Tensor) -> Tensor:
        return model.encode_text(tokens, normalize=False)
