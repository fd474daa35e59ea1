"""A method inside a CLIP: put it there, see what is there, and read dense features from it."""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor, nn

from rfclip.config import RefocusConfig, RegisterConfig
from rfclip.graphs import Graphs
from rfclip.methods import METHODS, RF_CLIP, find_method
from rfclip.methods.base import Method
from rfclip.towers import Tower, find_module, read_tower

_patching = threading.Lock()


class Handle:
    """Handle that restores the model: use it in a `with` statement, or call `remove()`, once or several times."""

    def __init__(self, module: nn.Module, method: Method) -> None:
        self._module, self._method = module, method

    def remove(self) -> None:
        """Restore the model.

        Raises:
            RuntimeError: something else has replaced the tower's forward since; undo that first.
        """
        with _patching:
            present = vars(self._module).get("forward")
            if present is self._method:
                del self._module.forward
            elif present is not None and not isinstance(present, Method):
                raise RuntimeError(
                    f"the image tower's forward is now {present!r}: undo that before removing the refocusing"
                )
        if self._method.graphs is not None:
            self._method.graphs.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def installed(model: nn.Module | Tower) -> Method | None:
    """The method that refocuses a model, or the model of a tower; None for a plain one.

    Raises:
        ValueError: the model has no tower that can be read.
    """
    module = model.module if isinstance(model, Tower) else find_module(model)
    present = module.__dict__.get("forward")  # torch 2.8 does not compile vars()
    return present if isinstance(present, Method) else None


def refocus(
    model: nn.Module,
    config: RefocusConfig | None = None,
    *,
    method: str = RF_CLIP,
    backend: str = "auto",
    cuda_graphs: bool = True,
    registers: RegisterConfig | None = None,
) -> Handle:
    """Run RF-CLIP, or another method, in a CLIP's image tower, in place and on the model's own weights.

    Only the tower's `forward` is replaced, and only on this instance: no weight or module is touched, `state_dict`
    stays the same, and other models stay as they are. From then on `model.encode_image`, or Hugging Face's
    `get_image_features`, gives the CLS embedding through the refocused blocks, and `dense_features` the refocused patch
    embeddings. The blocks' parts are called rather than the blocks, so that blocks or attention modules with hooks,
    adapters or a forward of their own are refused, and `forward_intermediates` stays plain.

    Args:
        model: an open_clip CLIP model, transformers' CLIPModel or CLIPVisionModelWithProjection, or a model of OpenAI's
            own package, `clip`, in eval mode.
        config: RF-CLIP's settings; None takes those of a model loaded by `rfclip.load_model`, or by transformers from
            OpenAI's ViT-B/16 or ViT-L/14. Only "rf-clip" and "released" have settings.
        method: one of `rfclip.methods.METHODS`.
        backend: "eager", "reference", "triton", or "auto", the best there is for where the model's weights are, or are
            moved to. A named backend is never replaced by another.
        cuda_graphs: whether `dense_features` and `Segmenter` may replay the kernels as CUDA graphs, one for each of at
            most eight shapes of batches, captured when a shape first occurs. A GPU then waits less for the host, and
            the graphs' memory stays taken until `remove()`. They apply on the "triton" backend, without gradients and
            autocast, and see every change of the weights; settings of PyTorch's, such as TF32, are those of the
            capture. If PyTorch cannot capture one, it says why once, and the tower runs without.
        registers: the neurons and the last block of the method "registers"; None takes those of a model loaded by
            `rfclip.load_model`, if they are known. `rfclip registers` finds them.

    Returns:
        A handle; `handle.remove()`, or leaving `with rfclip.refocus(model):`, restores the model, even after an
        exception.

    Raises:
        ValueError: the tower is of another kind, or does not give what the method needs, the config is missing or does
            not fit it, or the backend is unknown or cannot run there.
        RuntimeError: the model is already refocused, or in training mode.
    """
    tower, card = read_tower(model), find_method(method)
    card.check_tower(tower)
    if not card.configured and config is not None:
        raise ValueError(f"config: method {method!r} has nothing to configure; leave it out")
    if not card.registers and registers is not None:
        raise ValueError(f"registers: method {method!r} has no registers; leave it out")
    if card.configured:
        config = checked_config(model, tower, config)
    tower.check_ready()
    options = {"registers": _checked_registers(model, registers)} if card.registers else {}
    made = card(tower, config, backend, **options)
    made.graphs = Graphs() if cuda_graphs else None
    with _patching:
        if "forward" in vars(tower.module):
            raise RuntimeError(
                "this model's image tower is already refocused, or patched by another library: undo that first "
                "(handle.remove() of the earlier rfclip.refocus)"
            )
        tower.module.forward = made
    return Handle(tower.module, made)


def checked_config(model: nn.Module, tower: Tower, config: RefocusConfig | None) -> RefocusConfig:
    """The config given, or else the model's own.

    Raises:
        ValueError: there is none, or it does not fit the tower.
    """
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


def _checked_registers(model: nn.Module, registers: RegisterConfig | None) -> RegisterConfig:
    """The registers given, or else the model's own; ValueError if there are none."""
    registers = getattr(model, "register_config", None) if registers is None else registers
    if registers is None:
        raise ValueError(
            "the register neurons of this model are not known: find them with `rfclip registers IMAGES --model ... "
            "--out registers.json`, then pass that file as --registers, or a RegisterConfig in Python"
        )
    if not isinstance(registers, RegisterConfig):
        raise ValueError(
            f"registers: got {type(registers).__name__}, expected a RegisterConfig; RegisterConfig.from_json reads JSON"
        )
    return registers


def _known(model: nn.Module) -> RefocusConfig | None:
    """The config of a model that says which checkpoint it is."""
    with contextlib.suppress(ValueError):
        return getattr(model, "refocus_config", None) or RefocusConfig.preset(
            f"transformers:{getattr(model, 'name_or_path', None)}", None
        )
    return None


def dense_features(model: nn.Module, images: Tensor, *, method: str | None = None) -> Tensor:
    """Text-aligned patch embeddings, before normalization.

    Args:
        model: a CLIP.
        images: float [B, 3, height, width], normalized as the model expects; height and width may be any multiples of
            the patch size, position embeddings being resized bicubically [D].
        method: for a model that is not refocused, one of `rfclip.methods.METHODS`, with the model's own settings: this
            once, "rf-clip", say, or "clip" for the plain patch tokens, put through ln_post and proj.

    Returns:
        [B, C, gh, gw] in the dtype that the tower computes in; ProxyCLIP's are on the grid of its DINO. Gradients are
        recorded only if the images require them.

    Raises:
        ValueError: the tower is of another kind, the images are of another shape, or a method is given for a refocused
            model, or none for one that is not.
        RuntimeError: the model is in training mode, or its modules were exchanged after it was refocused.
    """
    present = installed(model)
    if present is None:
        if method is None:
            raise ValueError(
                "this model is not refocused: call rfclip.refocus first, or pass method=, which may be "
                f"{', '.join(map(repr, METHODS))}; 'clip' is the plain tower"
            )
        with refocus(model, method=method, cuda_graphs=False):
            return dense_features(model, images)
    if method is not None:
        raise ValueError(f"method={method!r}: this model is already refocused, with {present.name!r}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and getattr(images, "requires_grad", False)):
        return present.dense(present.tower.patches(images), images)
