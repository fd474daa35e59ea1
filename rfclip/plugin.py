"""A method inside a CLIP: put it there, read dense features from it; and calibrate a model for RF-CLIP.

[P n] is equation n of the paper (arXiv 2511.16170) and [D] a decision of this project where it is silent.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfclip import reference
from rfclip.config import RefocusConfig
from rfclip.methods import CLIP, Method, find_method
from rfclip.tower import Tower, read_tower

MAX_DIMS = 8  # a calibration keeps at most this many dimensions [D]

_patching = threading.Lock()


class Handle:
    """A refocused model's way back. Use it in a `with` statement, or call `remove()`, once or often."""

    def __init__(self, module: nn.Module, forward: Method):
        self._module, self._forward = module, forward

    def remove(self) -> None:
        """Give the model back as it was.

        Raises:
            RuntimeError: something else has replaced the tower's forward since; undo that first.
        """
        with _patching:
            present = vars(self._module).get("forward")
            if present is self._forward:
                del self._module.forward
            elif present is not None and not isinstance(present, Method):
                raise RuntimeError(f"the image tower's forward is now {present!r}: undo that before the refocusing")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def refocus(
    model: nn.Module, config: RefocusConfig | None = None, *, method: str = "rf-clip", backend: str = "auto"
) -> Handle:
    """Run RF-CLIP, or another method, in a CLIP's image tower, in place and on the model's own weights.

    Nothing but the tower's `forward`, on this one instance, is replaced: no weight or module is touched, `state_dict`
    stays the same, and other models stay as they are. From then on `model.encode_image`, or Hugging Face's
    `get_image_features`, gives the CLS embedding through the refocused blocks, and `dense_features` the refocused patch
    embeddings. The blocks' parts are called, not the blocks: hooks on a whole block do not run, and
    `forward_intermediates` stays plain.

    Args:
        model: an open_clip CLIP model, or transformers' CLIPModel or CLIPVisionModelWithProjection, in eval mode.
        config: what to do; None takes the one that belongs to a model loaded by `rfclip.load_model`, or by
            transformers from OpenAI's ViT-B/16 or ViT-L/14. Only "rf-clip" and "released" have one.
        method: one of `rfclip.methods.METHODS`.
        backend: "eager", "reference", "triton" or "auto", the best there is for where the model's weights are, or are
            moved to. A named backend is never replaced by another.

    Returns:
        A handle; `handle.remove()`, or leaving `with rfclip.refocus(model):`, undoes it, also after an exception.

    Raises:
        ValueError: the tower is of another kind, config does not fit it or is needed, or backend is unknown or cannot
            run there.
        RuntimeError: the model is refocused already, or in training mode.
    """
    tower, kind = read_tower(model), find_method(method)
    if not kind.configured and config is not None:
        raise ValueError(f"config: method {method!r} has nothing to configure; leave it out")
    if kind.configured:
        config = checked_config(model, tower, config)
    tower.check_eval()
    forward = kind(tower, config, backend)
    with _patching:
        if "forward" in vars(tower.module):
            raise RuntimeError(
                "this model's image tower is refocused already, or patched by another library: undo that first "
                "(handle.remove() of the earlier rfclip.refocus)"
            )
        tower.module.forward = forward
    return Handle(tower.module, forward)


def _known(model: nn.Module) -> RefocusConfig | None:
    """The config that belongs to a model, as far as it says which checkpoint it is."""
    with contextlib.suppress(ValueError):
        return getattr(model, "refocus_config", None) or RefocusConfig.preset(
            f"transformers:{getattr(model, 'name_or_path', None)}", None
        )
    return None


def checked_config(model: nn.Module, tower: Tower, config: RefocusConfig | None) -> RefocusConfig:
    """The config given, or else the model's own; ValueError where there is none or it does not fit the tower."""
    config = _known(model) if config is None else config
    if config is None:
        raise ValueError(
            "config=None, and this model does not say which checkpoint it is: load it with rfclip.load_model, or pass "
            'RefocusConfig.preset("ViT-B-16", "openai"); for other checkpoints find the dimensions with '
            "`rfclip calibrate`"
        )
    if not isinstance(config, RefocusConfig):
        raise ValueError(
            f"config: got {type(config).__name__}, expected a RefocusConfig; RefocusConfig.from_json reads JSON"
        )
    config.check_tower(tower.width, len(tower.blocks))
    return config


def dense_features(model: nn.Module, images: Tensor) -> Tensor:
    """Text-aligned patch embeddings, before normalization.

    Args:
        model: a CLIP, refocused, or plain: then these are plain CLIP's patch tokens, put through
            ln_post and proj.
        images: float [B, 3, height, width], normalized as the model expects; height and width any multiples of the
            patch, position embeddings being resized bicubically [D].

    Returns:
        [B, C, gh, gw] in the dtype that the tower computes in; ProxyCLIP's are on the grid of its DINO.

    Raises:
        ValueError: the tower is of another kind, or images are of another shape.
    """
    tower = read_tower(model)
    forward = vars(tower.module).get("forward")
    if not isinstance(forward, Method):
        forward = CLIP(tower, None, "reference")
    return forward.dense(forward.tower.patches(images), images)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` saw.

    Attributes:
        dims: the distraction dimensions found, largest mean weight first; maybe none.
        profile: mean weight w of every dimension, float32 [d]; the uniform share is 1 / d.
        threshold: 5 / d, what a dimension must exceed.
    """

    dims: tuple[int, ...]
    profile: Tensor
    threshold: float

    def config(self) -> RefocusConfig:
        """The paper's defaults with these dimensions."""
        return RefocusConfig(distraction_dims=self.dims)

    def report(self) -> str:
        """The outcome in a sentence or two, with the largest mean weights in units of the uniform share."""
        width = len(self.profile)
        weights, dims = self.profile.topk(min(10, width))
        peaks = ", ".join(f"{d} ({w * width:.2f})" for d, w in zip(dims.tolist(), weights.tolist(), strict=True))
        largest = f"Largest mean weights, in units of 1/{width}: {peaks}."
        if self.dims:
            return f"Distraction dimensions: {', '.join(map(str, self.dims))}. {largest}"
        return (
            "This checkpoint has no distraction dimensions: no mean weight exceeds 5 / d. RF-CLIP then refocuses "
            f"nothing and differs from plain CLIP by its layer-averaged proxy attention only. {largest}"
        )


@torch.inference_mode()
def calibrate(model: nn.Module, images: Tensor | Iterable[Tensor]) -> Calibration:
    """Find a checkpoint's distraction dimensions: the peaks of w, averaged over tokens, blocks and images [P fig. 3].

    The peaks are the dimensions whose mean weight exceeds 5 / d, at most 8, largest first [D].

    Args:
        model: a CLIP; if it is refocused, its plain blocks are what is looked at.
        images: a batch [B, 3, height, width] normalized as the model expects, or several of them, in any sizes.

    Raises:
        ValueError: there is no image, the images are of a wrong shape, or the tower is of another kind.
    """
    tower = read_tower(model)
    total, tokens = torch.zeros(tower.width, dtype=torch.float64), 0
    for batch in [images] if isinstance(images, Tensor) else images:
        x = tower.embed(tower.patches(batch))
        for block in tower.blocks:
            weights = reference.dimension_weights(x[:, 1:])
            total += weights.sum(dim=(0, 1), dtype=torch.float64).cpu()
            tokens += weights.shape[0] * weights.shape[1]
            x = block.finish(x, F.scaled_dot_product_attention(*block.query_key_value(x)))
    if not tokens:
        raise ValueError("no image to calibrate on: give at least one")
    profile = (total / tokens).float()
    threshold = 5 / tower.width
    largest = profile.argsort(descending=True)[:MAX_DIMS]
    return Calibration(tuple(d for d in largest.tolist() if profile[d] > threshold), profile, threshold)
