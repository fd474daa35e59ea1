"""The running average of key-key attention that equations 7 and 14 share, and the cut of equation 8 in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rfclip.ops.dispatch import Backend


class Cut(NamedTuple):
    """y of equation 8 [B, N], the defocused tokens, bool [B, N], and their `order` for attention, if it is known."""

    fiedler: Tensor
    target: Tensor
    order: Tensor | None


class KeyAverage:
    """softmax(k k^T / sqrt(D)), averaged over layers as their keys are added.

    Args:
        ops: the backend.
        layers: how many layers will be added.
        similar: of how many of them, the first ones, `cut` takes the mean.
        gathers: whether `gather` will be called; if not, no keys are kept.
        prefix: tokens in front of the patches.

    Attributes:
        count: the number of layers added.
        keys: those kept for `gather`, each [B, H, T, D].
    """

    def __init__(self, ops: Backend, *, layers: int, similar: int, gathers: bool, prefix: int) -> None:
        self.ops, self.layers, self.similar, self.gathers, self.prefix = ops, layers, similar, gathers, prefix
        self._similarity: Tensor | None = None
        self.count = 0
        self._keys: Tensor | None = None
        self._fiedler: Tensor | None = None

    @property
    def similarity(self) -> Tensor:
        """S of equation 7 over the layers added so far, at most `similar` of them: [B, N, N], float32 or float64."""
        assert self._similarity is not None
        return self._similarity

    @property
    def keys(self) -> Tensor:
        assert self._keys is not None
        return self._keys[: len(self._keys) + self.count - self.layers]

    def add(self, k: Tensor) -> None:
        """Add the keys of the next layer, [B, H, T, D]."""
        if self.count < self.similar:
            self._similarity = self.ops.key_similarity(
                k, self._similarity, self.count, prefix=self.prefix, inplace=not k.requires_grad
            )
        if self.gathers:
            self._place(k).copy_(k)
        self.count += 1

    def _place(self, k: Tensor) -> Tensor:
        """Where the keys of the next layer are kept. Layers are counted from the end: the first need not be kept."""
        if self._keys is None:
            self._keys = k.new_empty((self.layers - self.count, *k.shape))
        return self._keys[self.count - self.layers]

    def cut(self, distraction: Tensor, threshold: str) -> Cut:
        """The cut in the similarity, each starting from the last; arguments as for `Operations.defocus_mask`.

        What is returned for an image without distraction is not specified.
        """
        self._fiedler = self.ops.fiedler_vector(self.similarity, self._fiedler)
        target = self.ops.defocus_mask(self._fiedler, distraction, threshold=threshold)
        return Cut(self._fiedler, target, None)

    def gather(self, v: Tensor) -> Tensor:
        """Equation 14: the average over all layers added, times the values v [B, H, T, D] of the patches: [B, H, N, D].

        The keys of the last layer are those added last.
        """
        return self.ops.proxy_attention(self.keys, v, prefix=self.prefix)


class KernelKeyAverage(KeyAverage):
    """The same for the Triton kernels, which keep W in place of S, and the normalizers of each layer for `gather`."""

    def __init__(self, ops: Backend, *, layers: int, similar: int, gathers: bool, prefix: int) -> None:
        super().__init__(ops, layers=layers, similar=similar, gathers=gathers, prefix=prefix)
        self._affinity: Tensor | None = None
        self._vectors: Tensor | None = None
        self._normalizers: list[Tensor] = []

    def add(self, k: Tensor) -> None:
        place = self._place(k) if self.gathers else None
        normalizers = self.ops.key_normalizers(k, copy=place, prefix=self.prefix)
        if self.count < self.similar:
            self._affinity = self.ops.key_affinity(
                k, normalizers, self._affinity, self.count, prefix=self.prefix, inplace=True
            )
        if self.gathers:
            self._normalizers.append(normalizers)
        self.count += 1

    def cut(self, distraction: Tensor, threshold: str) -> Cut:
        assert self._affinity is not None
        self._vectors, target, order = self.ops.defocused_tokens(
            self._affinity, distraction, self._vectors, threshold=threshold
        )
        return Cut(self._vectors[:, 0], target, order)

    def gather(self, v: Tensor) -> Tensor:
        return self.ops.proxy_attention(self.keys, v, prefix=self.prefix, normalizers=torch.stack(self._normalizers))
