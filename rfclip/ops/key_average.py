"""The running average of key-key attention that equations 7 and 14 share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from rfclip.ops.dispatch import Backend


class KeyAverage:
    """softmax(k k^T / sqrt(D)), averaged over layers as their keys are added.

    Args:
        ops: the backend.
        layers: how many layers will be added.
        similar: of how many of them, the first ones, `similarity` is the mean.
        gathers: whether `gather` will be called; if not, no keys are kept.
        prefix: tokens in front of the patches.

    Attributes:
        similarity: S of equation 7 over the layers added so far, at most `similar` of them: [B, N, N], float32 or
            float64; None before the first.
        count: the number of layers added.
        keys: those kept for `gather`, each [B, H, T, D].
    """

    def __init__(self, ops: Backend, *, layers: int, similar: int, gathers: bool, prefix: int) -> None:
        self.ops, self.layers, self.similar, self.gathers, self.prefix = ops, layers, similar, gathers, prefix
        self.similarity: Tensor | None = None
        self.count = 0
        self._keys: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        assert self._keys is not None
        return self._keys[: len(self._keys) + self.count - self.layers]

    def add(self, k: Tensor) -> None:
        """Add the keys of the next layer, [B, H, T, D]."""
        if self.count < self.similar:
            self.similarity = self.ops.key_similarity(
                k, self.similarity, self.count, prefix=self.prefix, inplace=not k.requires_grad
            )
        if self.gathers:
            if self._keys is None:
                self._keys = k.new_empty((self.layers - self.count, *k.shape))
            self._keys[self.count - self.layers] = k  # counted from the end: the first layers need not be kept
        self.count += 1

    def gather(self, v: Tensor) -> Tensor:
        """Equation 14: the average over all layers added, times the values v [B, H, T, D] of the patches: [B, H, N, D].

        The keys of the last layer are those added last.
        """
        return self.ops.proxy_attention(self.keys, v, prefix=self.prefix)
