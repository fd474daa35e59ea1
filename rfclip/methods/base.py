"""What every method has in common.

Notation: x[l] is the residual stream that enters block l of L, F[l] = x[l+1] what leaves it; q, k, v are the heads of
ln_1(x[L]), SS(u) = softmax(u u^T / sqrt(D)) over all T tokens, O the output projection. A method defines z; its patch
embeddings are proj(ln_post(z)) without the prefix. [P n] is equation n of RF-CLIP's paper (arXiv 2511.16170) and [D] a
decision of this project. Where an original has a statistic over a batch, here each image has its own [D]; position
embeddings are resized by `rfclip.towers` in the same way for all methods but `released` [D].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.config import RefocusConfig
from rfclip.graphs import Graphs
from rfclip.ops import Backend, operations
from rfclip.towers import Block, Tower

if TYPE_CHECKING:
    from rfclip.methods.registry import MethodCard, Protocol

QKV = tuple[Tensor, Tensor, Tensor]


class Sweep(NamedTuple):
    """factor * softmax(q k^T * scale + bias), an attention of a sum; as `self_attention` takes them.

    Attributes:
        last: whether q and k are those of the last block, whose attention later steps may change.
    """

    q: Tensor
    k: Tensor
    factor: float = 1.0
    bias: Tensor | None = None
    scale: float | Tensor | None = None
    last: bool = True


class LastBlock(NamedTuple):
    """A last block before its heads gather: their attention, a sum, the values, and z [B, T, d] from what they gather.

    What is gathered is [B, H, T, D], and z's rows of the prefix may mean nothing.
    """

    sweeps: Sequence[Sweep]
    v: Tensor
    finish: Callable[[Tensor], Tensor]


def own(u: Tensor, factor: float = 1.0, **more: Any) -> Sweep:
    """SS(u), the attention of a vector with itself."""
    return Sweep(u, u, factor, **more)


class Method:
    """A method on an image tower, which threads can share: it keeps no tensor between calls but those of its graphs.

    Attributes:
        graphs: those that `dense` runs by; None, for a method that `rfclip.refocus` did not make, for none.
        defaults: constants of its formula that protocols tune for data sets.
        constants: those in use.
        crosses: whether the last block attends by vectors with themselves alone: `rfclip.methods.across` then applies.

    Args:
        card: what is known of the method.
        tower: the tower it runs on.
        config: for RF-CLIP and what derives from it.
        backend: as for `rfclip.refocus`.

    Raises:
        ValueError: the tower does not give what the method needs, or the backend is unknown or cannot run there.
    """

    graphs: Graphs | None = None
    defaults: ClassVar[Mapping[str, float]] = {}
    crosses: bool = False

    def __init__(self, card: MethodCard, tower: Tower, config: RefocusConfig | None, backend: str) -> None:
        card.check_tower(tower)
        self.card, self.tower, self.config, self.backend = card, tower, config, backend
        self.follow(card.protocol)
        self._chosen: tuple[torch.device, torch.dtype, Backend] | None = None
        self.ops  # noqa: B018  refuse a backend that cannot run here right away

    @property
    def name(self) -> str:
        """As `rfclip.refocus` takes it."""
        return self.card.name

    def follow(self, protocol: Protocol) -> None:
        """Take a protocol's position embeddings and its constants for this method."""
        self.tower.position_offset = protocol.position_offset
        self.constants = protocol.tuned(self.name, self.defaults)

    def follows(self, protocol: Protocol) -> bool:
        """Whether `follow` would change nothing."""
        wanted = protocol.position_offset, protocol.tuned(self.name, self.defaults)
        return (self.tower.position_offset, self.constants) == wanted

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
        for q, k, factor, bias, scale, _ in sweeps:
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
        """The image embedding [B, C] of images whose patches are given, before normalization: `Tower.embedding`."""
        self.tower.check_ready()
        return self.tower.embedding(self.stream(patches))

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
        return self.embeddings(self.tokens(patches), patches.shape[2:])

    def tokens(self, patches: Tensor) -> Tensor:
        """z without the prefix, [B, N, d]. A method has this or `last_block`, or both."""
        return self.after(self.last_block(patches))

    def last_block(self, patches: Tensor) -> LastBlock:
        """The last block, of methods in which patches attend to patches there by a single sum of attention."""
        raise NotImplementedError

    @classmethod
    def attends(cls) -> bool:
        """Whether the method has `last_block`."""
        return cls.last_block is not Method.last_block

    def after(self, block: LastBlock) -> Tensor:
        """z without the prefix, [B, N, d], of what the heads of a last block gather."""
        return block.finish(self.gather(block.sweeps, block.v))[:, self.tower.prefix :]

    def embeddings(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Patch embeddings [B, C, gh, gw] of z without the prefix."""
        return self.tower.readout(tokens).mT.unflatten(-1, tuple(grid))

    def inputs(self, patches: Tensor) -> Iterator[tuple[Block, Tensor, QKV]]:
        """Each block with its input in the plain tower, and its q, k and v."""
        ops, branch = self.ops, None
        x = self.tower.embed(patches, ops)
        for number, block in enumerate(self.tower.blocks_on(patches.shape[2:]), 1):
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
