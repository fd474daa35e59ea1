"""What every method has in common.

Notation: x[l] is the residual stream that enters block l of L, F[l] = x[l+1] what leaves it; q, k, v are the heads of
ln_1(x[L]), SS(u) = softmax(u u^T / sqrt(D)) over all T tokens, O the output projection. A method defines z; its patch
embeddings are proj(ln_post(z)) without the prefix. [P n] is equation n of RF-CLIP's paper (arXiv 2511.16170) and [D] a
decision of this project. Where an original has a statistic over a batch, here each image has its own [D]; position
embeddings are resized by `rfclip.towers` in the same way for all methods but `released` [D].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.config import RefocusConfig
from rfclip.graphs import Graphs
from rfclip.ops import Backend, operations
from rfclip.towers import Block, Tower

if TYPE_CHECKING:
    from rfclip.methods.registry import MethodCard

QKV = tuple[Tensor, Tensor, Tensor]


class Sweep(NamedTuple):
    """factor * softmax(q k^T * scale + bias), an attention of a sum; as `self_attention` takes them."""

    q: Tensor
    k: Tensor
    factor: float = 1.0
    bias: Tensor | None = None
    scale: float | Tensor | None = None


def own(u: Tensor, factor: float = 1.0, bias: Tensor | None = None, scale: Tensor | None = None) -> Sweep:
    """SS(u), the attention of a vector with itself."""
    return Sweep(u, u, factor, bias, scale)


class Method:
    """A method on an image tower, which threads can share: it keeps no tensor between calls but those of its graphs.

    Attributes:
        graphs: those that `dense` runs by; None, for a method that `rfclip.refocus` did not make, for none.

    Args:
        card: what is known of the method.
        tower: the tower it runs on.
        config: for RF-CLIP and what derives from it.
        backend: as for `rfclip.refocus`.

    Raises:
        ValueError: the tower has too few blocks, or the backend is unknown or cannot run there.
    """

    graphs: Graphs | None = None

    def __init__(self, card: MethodCard, tower: Tower, config: RefocusConfig | None, backend: str) -> None:
        if len(tower.blocks) < card.blocks:
            raise ValueError(f"method {card.name!r} needs {card.blocks} blocks, and this tower has {len(tower.blocks)}")
        self.card, self.tower, self.config, self.backend = card, tower, config, backend
        tower.position_offset = card.protocol.position_offset
        self._chosen: tuple[torch.device, torch.dtype, Backend] | None = None
        self.ops  # noqa: B018  refuse a backend that cannot run here right away

    @property
    def name(self) -> str:
        """As `rfclip.refocus` takes it."""
        return self.card.name

    @property
    def ops(self) -> Backend:
        """The operations on the backend that suits where the weights are now."""
        weight = self.tower.weight
        if self._chosen is None or self._chosen[:2] != (weight.device, weight.dtype):
            self._chosen = weight.device, weight.dtype, operations(self.backend, weight.device, weight.dtype)
        return self._chosen[2]

    def __call__(self, *args: object, **kwargs: object) -> object:
        """What the tower's own forward returns, for the same arguments."""
        self.tower.check_ready()
        return self.tower.pool(self.stream(self.tower.patches(self.tower.images(*args, **kwargs))))

    def stream(self, patches: Tensor) -> Tensor:
        """What leaves the last block [B, T, d] on the way to the image embedding; most methods do not change it."""
        x, qkv = self.last(patches)
        return self.finished(x, F.scaled_dot_product_attention(*qkv))

    def gather(self, sweeps: Iterable[Sweep], v: Tensor, *, prefix: int | None = None) -> Tensor:
        """The sum of what sweeps gather of the values, [B, H, T, D]; the prefix is the tower's by default."""
        heads, prefix = None, self.tower.prefix if prefix is None else prefix
        for q, k, factor, bias, scale in sweeps:
            options: dict[str, Any] = {"scale": scale, "prefix": prefix, "factor": factor, "out": heads}
            options["inplace"] = heads is not None and not heads.requires_grad
            heads = self.ops.self_attention(q, k, v, bias, **options)
        assert heads is not None
        return heads

    def finished(self, x: Tensor, heads: Tensor) -> Tensor:
        """The last block's output [B, T, d] from its input x and what its heads gathered [B, H, T, D]."""
        return torch.add(*self.tower.blocks[-1].finish(x, heads, self.ops))

    def dense(self, patches: Tensor, images: Tensor | None = None) -> Tensor:
        """Patch embeddings [B, C, gh, gw], before normalization.

        Args:
            patches: the tower's [B, d, gh, gw], of images, or of windows that were cut out after the convolution.
            images: those windows [B, 3, height, width], normalized as the model expects, if the card's `sees_images`.
        """
        if self.graphs is None or torch.compiler.is_compiling() or not self.capturable:
            return self._dense(patches)
        return self.graphs(self._dense, patches, self.tower)

    def image(self, patches: Tensor) -> Tensor:
        """The image embedding [B, C] of images whose patches are given, before normalization: CLS of the last block."""
        self.tower.check_ready()
        return self.tower.readout(self.stream(patches)[:, 0])

    def dense_and_image(self, patches: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `dense` returns, and the image embedding for the rule of a protocol, which is that of `image` for most.

        A method may have both from one pass.
        """
        return self.dense(patches, images), self.image(patches)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can capture `dense`: the other backends, and a draw on the host, wait for the device."""
        return self.ops.name == "triton" and (self.config is None or self.config.tokens != "random")

    def _dense(self, patches: Tensor) -> Tensor:
        self.tower.check_ready()  # a graph is checked for more than that
        return self.tower.readout(self.tokens(patches)).mT.unflatten(-1, patches.shape[2:])

    def tokens(self, patches: Tensor) -> Tensor:
        """z without the prefix, [B, N, d]."""
        raise NotImplementedError

    def inputs(self, patches: Tensor) -> Iterator[tuple[Block, Tensor, QKV]]:
        """Each block with its input in the plain tower, and its q, k and v."""
        ops, branch = self.ops, None
        x = self.tower.embed(patches, ops)
        for number, block in enumerate(self.tower.blocks, 1):
            x, y = ops.add_norm(block.ln_1, x, branch)
            qkv = block.heads_of(y)
            yield block, x, qkv
            if number < len(self.tower.blocks):
                x, branch = block.finish(x, F.scaled_dot_product_attention(*qkv), ops)

    def last(self, patches: Tensor) -> tuple[Tensor, QKV]:
        """x[L], in most methods that of the plain tower, and its q, k and v."""
        return self.last_and(patches, ())[:2]

    def last_and(self, patches: Tensor, numbers: Collection[int]) -> tuple[Tensor, QKV, list[tuple[Tensor, Tensor]]]:
        """The same, and q and k of earlier blocks, numbered from 1."""
        earlier = []
        for number, (_, x, qkv) in enumerate(self.inputs(patches), 1):  # noqa: B007  only the last ones count
            if number in numbers:
                earlier.append(qkv[:2])
        return x, qkv, earlier
