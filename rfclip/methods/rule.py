"""What a protocol does between the cosines of patches and names and the labels of pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rfclip.methods.base import Method
    from rfclip.ops import Backend


class Rule:
    """The rule that changes nothing: logits are cosines, and a pixel belongs to its most probable class.

    Rules of papers replace a step or two; an object holds their constants and no tensor, so that threads can share it.

    Attributes:
        image: the image embedding that `window` gets: of the "picture" as a whole or of each "window"; None: none.
        at_once: whether the logits of a picture that is seen as a whole are resized from patches to the pixels of the
            picture as given, and not to those of the resized picture first; `picture` then gets those of the patches.
        regional: whether `regions` is to be called.
        sees_images: whether `look` needs the pictures as well as their patches.
    """

    image: ClassVar[Literal["picture", "window"] | None] = None
    at_once: ClassVar[bool] = False
    regional: ClassVar[bool] = False
    sees_images: ClassVar[bool] = False

    def check(self, method: Method) -> None:
        """Raise ValueError if the rule does not go with a method or its tower; called before any picture is seen."""

    def knows(self, text: Tensor, embed: Callable[[tuple[str, ...]], Tensor], background: Tensor) -> Tensor | None:
        """What `window` needs to know of a list of names, worked out once.

        Args:
            text: their normalized embeddings [K, C], on a CPU.
            embed: from other names to theirs.
            background: which of the names are those of a class "background", bool [K].
        """
        return None

    def look(self, method: Method, patches: Tensor, images: Tensor | None) -> Any:
        """What `window` gets of a batch of windows: their normalized patch embeddings [B, C, gh, gw] float32.

        A rule may return anything that its own `window` takes. A rule with an `image` is not asked where that is the
        windows' own: both embeddings then come from one pass.

        Args:
            method: which can run its tower.
            patches: of the windows, convolved, [B, d, gh, gw].
            images: the windows [B, 3, height, width], as the model expects them, if the rule or the card of the method
                `sees_images`; sides need not be whole patches, and what is beyond those has none.
        """
        return F.normalize(method.dense(patches, images).float(), dim=1)

    def window(self, patches: Any, image: Tensor | None, text: Tensor, known: Tensor | None) -> Tensor:
        """The logits of a batch of windows, [B, K, gh, gw] float32.

        Args:
            patches: what `look` made of them.
            image: the normalized image embedding of each, [B, C], if the rule has an `image`.
            text: the normalized text embeddings [K, C].
            known: what `knows` found.
        """
        return (text @ patches.flatten(2)).unflatten(-1, patches.shape[2:])

    def picture(self, logits: Tensor) -> Tensor:
        """The logits of a picture [K, h, w], averaged over its windows."""
        return logits

    def labels(
        self,
        ops: Backend,
        logits: Tensor,
        size: tuple[int, int],
        scale: float,
        class_of_name: Tensor,
        threshold: float | None,
    ) -> Tensor:
        """The class of each pixel of a picture, int32 [H, W], -1 for none; arguments as for `upsample_argmax`."""
        return ops.upsample_argmax(logits, size, scale, class_of_name, threshold)

    def regions(self, method: Method, patches: Tensor, labels: Tensor) -> Tensor:
        """The labels [H, W] once the picture's own regions have been looked at.

        Args:
            method: which can run its tower.
            patches: the convolved patches [1, d, gh, gw] of the picture as a whole.
            labels: as `labels` returns them.
        """
        return labels
