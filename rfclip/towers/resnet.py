"""OpenAI's ResNets in open_clip, for readout: the attention pool is the only block, and its first token their mean.

The pool's output at a place is an embedding as the picture's is. MaskCLIP reads c_proj(v_proj(x)) there; unlike in its
own code, position embeddings stay, resized to the grid, as the pool was trained with them [D].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from rfclip.towers.base import Block
from rfclip.towers.open_clip import OpenCLIPTower
from rfclip.towers.uses import CONVOLUTIONAL

if TYPE_CHECKING:
    from rfclip.ops import Backend


class PoolBlock(Block):
    """The attention of an `AttentionPool2d`, without norms, residual and MLP."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        super().__init__(pool.num_heads, nn.Identity(), [pool.c_proj], nn.Identity(), [])

    def _projections(self, y: Tensor, query: bool) -> Sequence[Tensor]:
        q = [self.pool.q_proj(y)] if query else []
        return [*q, self.pool.k_proj(y), self.pool.v_proj(y)]

    def linears(self) -> None:
        return None

    def finish(self, x: Tensor, heads: Tensor, ops: Backend) -> tuple[Tensor, Tensor]:
        y = self.project(heads)
        return y, y.new_zeros(())


class ResNetTower(OpenCLIPTower):
    """The `.visual` of an open_clip model whose image tower is a ResNet with an attention pool."""

    reason = CONVOLUTIONAL
    title = "a ResNet"
    local = False
    module: Any  # a ModifiedResNet

    @classmethod
    def find(cls, model: nn.Module) -> nn.Module | None:
        visual = getattr(model, "visual", None)
        return visual if isinstance(visual, ModifiedResNet) else None

    @classmethod
    def takes(cls, name: str) -> bool:
        return False  # loaded as open_clip's others are

    def __init__(self, model: Any) -> None:
        self.module = visual = model.visual
        self.conv, self.pooling = visual.conv1, visual.attnpool
        self.ln_pre = self.ln_post = nn.Identity()
        self.blocks = [PoolBlock(self.pooling)]
        side = round((len(self.pooling.positional_embedding) - 1) ** 0.5)
        self.grid_size, self.patch_size = (side, side), (32, 32)
        self.image_size = (32 * side, 32 * side)
        self._normalize_as(visual)
        layers = [(f"the pool's {name}", getattr(self.pooling, f"{name}_proj")) for name in "qkvc"]
        self._bypass(("attnpool", self.pooling), *layers)

    @property
    def width(self) -> int:
        return self.pooling.positional_embedding.shape[1]

    def patches(self, images: Tensor) -> Tensor:
        """The last convolutional map [B, d, gh, gw] of images; a place of it depends on more than its own pixels."""
        self.grid(images)
        visual = self.module
        x = visual.stem(images.to(self.weight.dtype))
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        return x

    def embed(self, patches: Tensor, ops: Backend) -> Tensor:
        """Their mean and the places of a map [B, d, gh, gw], with positions, [B, 1 + N, d]."""
        position = self._positions((patches.shape[2], patches.shape[3])).to(patches.dtype)
        x = patches.flatten(2).transpose(1, 2)
        return torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + position

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        return self.pooling.positional_embedding[:1], self.pooling.positional_embedding

    def readout(self, tokens: Tensor) -> Tensor:
        """The tokens, which are embeddings already once they have left the pool."""
        return tokens

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0]
