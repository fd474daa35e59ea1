"""RF-CLIP inside an open_clip model: refocus it, read dense features from it, calibrate it.

[P n] is equation n of the paper (arXiv 2511.16170) and [D] a decision of this project where it is silent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfclip import reference
from rfclip.backends import choose, functions
from rfclip.config import RefocusConfig
from rfclip.tower import Block, Tower

PLAIN = RefocusConfig(distraction_dims=(), proxy="none")  # the tower as it was
MAX_DIMS = 8  # a calibration keeps at most this many dimensions [D]

_patching = threading.Lock()


class RefocusedForward:
    """The forward of a refocused image tower. It keeps no tensor between calls, so threads can share it."""

    def __init__(self, tower: Tower, config: RefocusConfig, backend: str):
        self.tower, self.config, self.backend = tower, config, backend
        self._chosen: tuple[torch.device, torch.dtype, SimpleNamespace] | None = None
        self.ops  # noqa: B018  a backend that cannot run here is refused now

    @property
    def ops(self) -> SimpleNamespace:
        """The functions of the method, from the backend that is right for where the weights are now."""
        weight = self.tower.visual.conv1.weight
        if self._chosen is None or self._chosen[:2] != (weight.device, weight.dtype):
            chosen = choose(self.backend, weight.device, weight.dtype)
            self._chosen = weight.device, weight.dtype, functions(chosen.backend)
        return self._chosen[2]

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What the tower's own forward returns, with every block refocused and the last one run as it was."""
        x, query_key_value, *_ = self._run(self.tower.patches(images))
        return self.tower.pool(self.tower.blocks[-1].finish(x, F.scaled_dot_product_attention(*query_key_value)))

    def dense(self, patches: Tensor) -> Tensor:
        """Patch embeddings [B, N, C]: the last block's values gathered by the proxy attention [P 14].

        `patches` [B, d, gh, gw] are the tower's, of images, or of windows that were cut out after the convolution.
        """
        proxy, last = self.config.proxy, self.tower.blocks[-1]
        query = proxy not in ("kk", "kk-mean", "vv")
        x, (q, k, v), keys, heads, count = self._run(patches, keep_keys=proxy == "kk-mean", last_query=query)
        if proxy == "none":
            return self.tower.readout(last.finish(x, F.scaled_dot_product_attention(q, k, v))[:, 1:])
        if proxy == "qk":  # like the others without the row and the column of CLS, not renormalized [D]
            without_cls = torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, 1:]], dim=2)
            gathered = F.scaled_dot_product_attention(q, k, without_cls)[:, :, 1:]
        elif proxy == "kk-mean":
            gathered = self.ops.proxy_attention(keys, v, heads=heads, count=count)
        else:
            gathered = self.ops.proxy_attention({"kk": k, "qq": q, "vv": v}[proxy][None], v)
        return self.tower.readout(last.project(gathered))

    def _run(
        self, patches: Tensor, keep_keys: bool = False, last_query: bool = True
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor], Tensor | None, Tensor | None, int]:
        """All blocks but the last one's attention.

        Returns the input of the last block after its redistribution [B, T, d] and that block's q, if wanted, k and v.
        On demand also what the proxy attention reads: the keys of the blocks [., B, H, T, D], and in place of the
        first `count` of them, where the backend asks for it, the sum of their attention [B, H, N, N].
        """
        self.tower.check_eval()
        config, ops, blocks = self.config, self.ops, self.tower.blocks
        grid = patches.shape[2], patches.shape[3]
        x = self.tower.embed(patches)
        refocused = range(1, len(blocks) + 1) if config.layers is None else config.layers
        refocused = refocused if config.distraction_dims else ()
        cut = config.beta > 0 and config.target == "defocused"
        # The similarity is averaged over the blocks up to this one.
        averaged = min(max(refocused, default=0), len(blocks) - 1) if cut and config.similarity == "kk-mean" else 0
        N, count = grid[0] * grid[1], 0
        keys = heads = similarity = fiedler = None
        if keep_keys and 4 * len(x) * blocks[0].heads * N * N <= ops.heads_budget:
            count = averaged
        for number, block in enumerate(blocks, 1):
            distraction = None
            if number in refocused:
                distraction = self._locate(block, x, number)
                if _seen_empty(distraction):
                    distraction = None
                else:
                    x = self._repair(x, distraction, grid)
            q, k, v = block.query_key_value(x, query=last_query or number < len(blocks))
            if keep_keys and number > count:
                keys = k.new_empty((len(blocks) - count, *k.shape)) if keys is None else keys
                keys[number - 1 - count] = k
            if number == len(blocks):
                break
            if number <= averaged:
                if count and heads is None:
                    heads = k.new_zeros((*k.shape[:2], N, N), dtype=reference.computing_dtype(k))
                similarity = ops.key_similarity(k, similarity, number - 1, inplace=not k.requires_grad, heads=heads)
            elif cut and distraction is not None:
                similarity = ops.key_similarity({"kk": k, "qq": q, "vv": v}[config.similarity])
            if distraction is None or config.beta == 0:
                attended = F.scaled_dot_product_attention(q, k, v)
            else:
                if cut:
                    fiedler = ops.fiedler_vector(similarity, fiedler)
                target = self._target(distraction, fiedler)
                attended = ops.refocused_attention(q, k, v, distraction, target, config.beta)
            x = block.finish(x, attended)
        return x, (q, k, v), keys, heads, count

    def _locate(self, block: Block, x: Tensor, number: int) -> Tensor:
        """T_dis, bool [B, N], from the input of a block [B, T, d]: steps 1 and 2."""
        config, patches = self.config, x[:, 1:]
        tau = config.tau / patches.shape[2]
        mask = self.ops.distraction_mask(patches, config.distraction_dims, tau, shifted=config.shifted)
        if config.tau_attn is not None:
            q, k, _ = block.query_key_value(x)
            mask = mask & (self.ops.received_attention(q, k) > config.tau_attn / patches.shape[1])
        if config.tokens == "random":
            # As many tokens of each image, the same order in each, so that an image's result depends on no other [D].
            generator = torch.Generator().manual_seed(number)
            rank = torch.randperm(patches.shape[1], generator=generator).to(x.device)
            mask = rank < mask.sum(dim=1, keepdim=True)
        return mask

    def _repair(self, x: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Step 3, or its variant of table 1, on the input of a block [B, T, d], which may be overwritten."""
        config, ops, patches = self.config, self.ops, x[:, 1:]
        if config.embedding == "none":
            return x
        if config.embedding == "redistribute":
            size, inplace = config.neighbourhood, not x.requires_grad
            repaired = ops.redistribute_embeddings(
                patches, mask, config.distraction_dims, grid, size=size, inplace=inplace
            )
            return x if inplace else torch.cat([x[:, :1], repaired], dim=1)
        if config.embedding == "clamp":
            tau = config.tau / patches.shape[2]
            repaired = ops.clamp_embeddings(patches, mask, config.distraction_dims, tau, shifted=config.shifted)
        else:
            repaired = ops.filter_embeddings(patches, mask, grid, size=config.neighbourhood, statistic=config.embedding)
        return torch.cat([x[:, :1], repaired], dim=1)

    def _target(self, distraction: Tensor, fiedler: Tensor | None) -> Tensor:
        """The tokens that receive the budget, bool [B, N] over patches or [B, T] over all tokens."""
        target = self.config.target
        if target == "defocused":
            return self.ops.defocus_mask(fiedler, threshold=self.config.cut_threshold) & ~distraction
        if target == "non-distraction":
            return ~distraction
        patches = torch.zeros_like(distraction) if target == "cls" else ~distraction
        return F.pad(patches, (1, 0), value=True)


def _seen_empty(mask: Tensor) -> bool:
    """Whether no token is in the mask, so that a block stays plain; on a CPU only, where to look means no wait."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any()


class Handle:
    """A refocused model's way back. Use it in a `with` statement, or call `remove()`, once or often."""

    def __init__(self, visual: nn.Module, forward: RefocusedForward):
        self._visual, self._forward = visual, forward

    def remove(self) -> None:
        """Give the model back as it was.

        Raises:
            RuntimeError: something else has replaced the tower's forward since; undo that first.
        """
        with _patching:
            present = vars(self._visual).get("forward")
            if present is self._forward:
                del self._visual.forward
            elif present is not None and not isinstance(present, RefocusedForward):
                raise RuntimeError(f"the image tower's forward is now {present!r}: undo that before the refocusing")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def refocus(model: nn.Module, config: RefocusConfig | None = None, *, backend: str = "auto") -> Handle:
    """Run RF-CLIP in an open_clip model's image tower, in place and on the model's own weights.

    Nothing but the tower's `forward`, on this one instance, is replaced: no weight or module is touched, `state_dict`
    stays the same, and other models stay as they are. From then on `model.encode_image` gives the CLS embedding
    through the refocused blocks, and `dense_features` the refocused patch embeddings. The blocks' parts are called, not
    the blocks: hooks on a whole block do not run, and `forward_intermediates` stays plain.

    Args:
        model: an open_clip CLIP model, in eval mode.
        config: what to do; None takes the one that belongs to a model loaded by `rfclip.load_model`.
        backend: "eager", "reference", "triton" or "auto", the best there is for where the model's weights are, or are
            moved to. A named backend is never replaced by another.

    Returns:
        A handle; `handle.remove()`, or leaving `with rfclip.refocus(model):`, undoes it, also after an exception.

    Raises:
        ValueError: the tower is of another kind, config does not fit it or is needed, or backend is unknown or cannot
            run there.
        RuntimeError: the model is refocused already, or in training mode.
    """
    tower = _tower(model)
    visual = tower.visual
    if config is None:
        config = getattr(model, "refocus_config", None)
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
    tower.check_eval()
    forward = RefocusedForward(tower, config, backend)
    with _patching:
        if "forward" in vars(visual):
            raise RuntimeError(
                "this model's image tower is refocused already, or patched by another library: undo that first "
                "(handle.remove() of the earlier rfclip.refocus)"
            )
        visual.forward = forward
    return Handle(visual, forward)


def dense_features(model: nn.Module, images: Tensor) -> Tensor:
    """Text-aligned patch embeddings, before normalization.

    Args:
        model: an open_clip CLIP model, refocused, or plain: then these are plain CLIP's patch tokens, put through
            ln_post and proj.
        images: float [B, 3, height, width], normalized as the model expects; height and width any multiples of the
            patch, position embeddings being resized bicubically [D].

    Returns:
        [B, C, gh, gw] in the dtype that the tower computes in.

    Raises:
        ValueError: the tower is of another kind, or images are of another shape.
    """
    tower = _tower(model)
    forward = vars(tower.visual).get("forward")
    if not isinstance(forward, RefocusedForward):
        forward = RefocusedForward(tower, PLAIN, "reference")
    patches = forward.tower.patches(images)
    return forward.dense(patches).transpose(1, 2).unflatten(-1, patches.shape[2:])


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
        model: an open_clip CLIP model; if it is refocused, its plain blocks are what is looked at.
        images: a batch [B, 3, height, width] normalized as the model expects, or several of them, in any sizes.

    Raises:
        ValueError: there is no image, the images are of a wrong shape, or the tower is of another kind.
    """
    tower = _tower(model)
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


def _tower(model: nn.Module) -> Tower:
    visual = getattr(model, "visual", None)
    if visual is None:
        raise ValueError(f"got a {type(model).__name__} without an image tower (.visual); expected an open_clip model")
    return Tower(visual)
