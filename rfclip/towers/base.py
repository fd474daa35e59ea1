"""A uniform view of CLIP's vision transformers: the parts that RF-CLIP takes apart.

Nothing here changes or copies a weight. Tokens are always [B, T, d], even where a library has them sequence first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rfclip.ops.dispatch import hooked
from rfclip.towers.embedding import embed_patches, resize_positions

if TYPE_CHECKING:
    from rfclip.ops import Backend

SUPPORTED = (
    "rfclip works with open_clip's own vision transformers (ViT-B-16, ViT-L-14 and the like, with a class token, "
    "standard attention and no attentional pooling), with those of OpenAI's package clip, and with transformers' "
    "CLIPModel and CLIPVisionModelWithProjection; it reads without refocusing open_clip's ResNets, CoCa and towers of "
    "timm (SigLIP, PE-Core, EVA02 and more)"
)


class Block:
    """One residual attention block: x + out(attention), then x + mlp(ln_2(x)).

    Between blocks the stream is x + branch, what left the last MLP being added by the next norm's `Backend.add_norm`.

    Attributes:
        heads: H.
        ln_1, ln_2: the norms before attention and MLP.
        out, mlp: the modules that end the two branches, in order.
    """

    def __init__(
        self, heads: int, ln_1: nn.Module, out: list[nn.Module], ln_2: nn.Module, mlp: list[nn.Module]
    ) -> None:
        self.heads, self.ln_1, self.out, self.ln_2, self.mlp = heads, ln_1, out, ln_2, mlp

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of x [B, T, d], each a [B, H, T, D] view of a projection."""
        return self.heads_of(self.ln_1(x))

    def heads_of(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the normalized stream y [B, T, d], as `query_key_value`."""
        q, k, v = self._split(self._projections(y, query=True))
        return q, k, v

    def key_value(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """k and v alone of the normalized stream y, where q is not needed."""
        k, v = self._split(self._projections(y, query=False))
        return k, v

    def linears(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weights [e, d] and biases [e] of the linear layers whose outputs, side by side, are q, k and v.

        None if a layer does more than multiply and add, so that its output is not known from its weights.
        """
        raise NotImplementedError

    def heads_in(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, as `query_key_value`, in the outputs [B, T, e] of the `linears`."""
        width = sum(out.shape[-1] for out in outputs) // 3
        q, k, v = self._split([part for out in outputs for part in out.split(width, dim=-1)])
        return q, k, v

    def _split(self, projections: Sequence[Tensor]) -> list[Tensor]:
        """Views by head [B, H, T, D] of projections [B, T, d]."""
        return [u.unflatten(-1, (self.heads, -1)).transpose(1, 2) for u in projections]

    def _projections(self, y: Tensor, query: bool) -> Sequence[Tensor]:
        """q (if wanted), k and v of the normalized stream, each [B, T, d]."""
        raise NotImplementedError

    def project(self, heads: Tensor) -> Tensor:
        """The attention branch's output [B, T, d] for what its heads gathered [B, H, T, D]."""
        return _through(self.out, heads.transpose(1, 2).flatten(2))

    def finish(self, x: Tensor, heads: Tensor, ops: Backend) -> tuple[Tensor, Tensor]:
        """The block's output as x + branch [B, T, d], from its input x and what its heads gathered [B, H, T, D]."""
        x, y = ops.add_norm(self.ln_2, x, self.project(heads))
        return x, ops.mlp(self.mlp, y)


class Tower:
    """The image tower of a CLIP. A subclass is a family: it reads models of one library and loads them by name.

    Attributes:
        prefix: tokens in front of the patches: CLS and, in other towers than CLIP's, registers or nothing.
        has_cls: whether the first of them is a class token.
        reason: why the tower is read but not refocused; empty where it is refocused as well.
        title: what messages call it.
        local: whether a convolved patch depends on its own pixels only, so that windows may share a convolution.
        module: turns images into the tower's output; its `forward` is what `rfclip.refocus` replaces.
        conv: the patch convolution.
        blocks, ln_pre, ln_post: as in the paper.
        position_offset: added to the sides of other grids than the trained one when position embeddings are resized.
        image_size, patch_size, grid_size: (height, width) in pixels, pixels and patches, as trained.
        image_mean, image_std: the statistics, per colour, that its images are normalized by.
        image_parts: names of the model's children that its text embeddings do not depend on.
        library: the package that defines the classes of its modules.
        host: another whose classes they may be, where it wraps the library's.
    """

    image_parts: ClassVar[tuple[str, ...]]
    library: ClassVar[str]
    host: ClassVar[str] = ""
    reason: ClassVar[str] = ""
    title: str = "a standard transformer"
    prefix: int
    has_cls: bool = True
    local: bool = True
    module: nn.Module
    conv: nn.Conv2d
    ln_pre: nn.Module
    ln_post: nn.Module
    blocks: list[Block]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]
    position_offset: float = 0.0
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def __init__(self, model: nn.Module) -> None:
        """Take a model apart.

        Raises:
            ValueError: RF-CLIP is not defined on its tower.
        """
        raise NotImplementedError

    # The family

    @classmethod
    def find(cls, model: nn.Module) -> nn.Module | None:
        """The module of a model's image tower; None if the model is not of this family."""
        raise NotImplementedError

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether a model's name belongs to this family."""
        raise NotImplementedError

    @classmethod
    def check_name(cls, name: str, pretrained: str | None) -> None:
        """Raise ValueError if a model or its weights cannot be used, before anything is built or downloaded."""
        raise NotImplementedError

    @classmethod
    def load(cls, name: str, pretrained: str | None, device: str | torch.device, precision: str) -> nn.Module:
        """Load a model by name.

        Raises:
            ValueError: its weights are missing or are not safetensors.
            ConnectionError: they could not be downloaded.
        """
        raise NotImplementedError

    @classmethod
    def tokenizer(cls, name: str) -> Callable[[list[str]], Tensor] | None:
        """The tokenizer of a model; None if it has CLIP's vocabulary. ConnectionError if it cannot be downloaded."""
        raise NotImplementedError

    # The tower

    def _normalize_as(self, owner: nn.Module) -> None:
        """Take mean and standard deviation from a module that may have them, else OpenAI's."""
        self.image_mean = tuple(getattr(owner, "image_mean", OPENAI_DATASET_MEAN))
        self.image_std = tuple(getattr(owner, "image_std", OPENAI_DATASET_STD))

    @property
    def width(self) -> int:
        """d, the dimensions of the residual stream."""
        return self.conv.out_channels

    @property
    def weight(self) -> Tensor:
        """A weight, which tells device and dtype."""
        return self.conv.weight

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that, with those in them, make the embeddings of images."""
        return [self.module]

    def check_ready(self) -> None:
        """Raise RuntimeError in training mode, and if modules were exchanged since the tower was read."""
        if self.module.training:
            raise RuntimeError("the model is in training mode; RF-CLIP is for inference: call model.eval() first")
        if torch.compiler.is_compiling():  # compiled code has guards of its own
            return
        present = self._state()
        if present != self._read:
            changed = [name for name, before in self._read.items() if present[name] != before]
            raise RuntimeError(
                f"image tower: {changed[0]} was changed after refocusing. Undo the refocusing (handle.remove(), or "
                "close the Segmenter) and do it again"
            )

    def _bypass(self, *parts: tuple[str, nn.Module]) -> None:
        """Take down the parts whose own `forward` never runs, since only their parameters and children are used.

        Raises:
            ValueError: one of them, or the tower's module, does more than the library's class, which would be ignored.
        """
        for name, part in (("its module", self.module), *parts):
            if reason := self.beyond(part):
                raise ValueError(
                    f"image tower: {name} {reason}, which would be ignored, so that only {self.library}'s own modules "
                    "are taken. Merge adapters into the weights, make pruning permanent, and remove hooks, "
                    "parametrizations, sharding and offloading"
                )
        self._parts = dict(parts)
        self._read = self._state()

    def beyond(self, part: nn.Module) -> str:
        """What a module does beyond the library's or PyTorch's class, in words; nothing if there is nothing."""
        own, kind = "" if part is self.module else _own(part), type(part)
        known = (f"{self.library}.", f"{self.host or self.library}.", "torch.nn.modules.")
        if own or kind.__module__.startswith(known):
            return own and f"has {own}"
        return f"is of class {kind.__module__}.{kind.__qualname__}"

    def _state(self) -> dict[str, tuple[object, ...]]:
        """What must stay as it was when the tower was read."""
        state: dict[str, tuple[object, ...]] = {"its module": (*self.module._modules.values(),)}
        for name, part in self._parts.items():
            state[name] = type(part), _own(part), *part._modules.values()
        return state

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The patch grid (gh, gw) of images [B, 3, gh * patch, gw * patch]; ValueError for any other shape."""
        patch_height, patch_width = self.patch_size
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images: got an object of class {type(images).__name__}, expected a float tensor [B, 3, height, "
                "width], normalized as the model expects; rfclip.Segmenter takes pictures"
            )
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected float [B, 3, height, width]")
        height, width = images.shape[2:]
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"images of {height} x {width}: height and width must be multiples of the patch, "
                f"{patch_height} x {patch_width}; resize or pad them"
            )
        return height // patch_height, width // patch_width

    def patches(self, images: Tensor) -> Tensor:
        """The patch convolution [B, d, gh, gw] of images [B, 3, height, width]; ValueError as `grid`.

        It is a matrix product unless the convolution does more than the library's.
        """
        self.grid(images)
        conv = self.conv
        usual = (conv.stride, conv.padding, conv.dilation, conv.groups) == (conv.kernel_size, (0, 0), (1, 1), 1)
        if usual and type(conv) is nn.Conv2d and not hooked(conv) and is_plain(conv.weight):
            return embed_patches(images, conv.weight, conv.bias)
        return conv(images.to(self.weight.dtype))

    def embed(self, patches: Tensor, ops: Backend) -> Tensor:
        """The residual stream that enters the first block, [B, prefix + N, d], of convolved patches [B, d, gh, gw].

        On any grid but the trained one, position embeddings are resized bicubically (this project's choice).
        """
        height, width = patches.shape[2:]
        x = patches.flatten(2).transpose(1, 2)
        prefix, position = self._embeddings()[0], self._positions((height, width))
        tokens = torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return ops.add_norm(self.ln_pre, tokens, position.to(x.dtype).expand_as(tokens))[1]

    def blocks_on(self, grid: Sequence[int]) -> list[Block]:
        """The blocks for a patch grid (gh, gw): queries and keys of a tower with rotary embeddings depend on it."""
        return self.blocks

    def check_refocusable(self, what: str) -> None:
        """Raise ValueError if the tower is only read; `what` needs more."""
        if self.reason:
            raise ValueError(
                f"{what} needs a tower that can be refocused, and {self.title} is only read: {self.reason}; "
                "method='maskclip' reads it"
            )

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        """The embeddings of the prefix [prefix, d], and the position embeddings [prefix + N, d] of the trained grid."""
        raise NotImplementedError

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings [prefix + N, d] of a grid (gh, gw)."""
        position = self._embeddings()[1]
        # A size that an exporter leaves open may be the trained one: resizing to that changes nothing.
        if any(isinstance(side, torch.SymInt) for side in grid) or grid != self.grid_size:
            trained = position[self.prefix :].unflatten(0, self.grid_size)
            resized = resize_positions(trained, grid, self.position_offset)
            position = torch.cat([position[: self.prefix], resized.flatten(0, 1).to(position.dtype)])
        return position

    def readout(self, tokens: Tensor) -> Tensor:
        """Text-aligned embeddings [..., C] of tokens [..., d] from the last block: proj(ln_post(tokens))."""
        raise NotImplementedError

    def embedding(self, x: Tensor) -> Tensor:
        """The image embedding [B, C] of the last block's output x [B, T, d], not normalized: CLS, or the pool's."""
        return self.readout(x[:, 0])

    def images(self, *args: Any, **kwargs: Any) -> Tensor:
        """The images [B, 3, height, width] among the arguments of the module's `forward`."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> object:
        """What the module's own forward returns for the last block's output x [B, T, d]."""
        raise NotImplementedError

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        """Image embeddings [B, C] from the tower's model, not normalized."""
        raise NotImplementedError

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Text embeddings [K, C] of tokens [K, n] from the tower's model, not normalized."""
        raise NotImplementedError

    def vocabulary(self, model: nn.Module) -> tuple[int | None, int | None]:
        """Size of the text tower's vocabulary and length of its context; None if the model does not say."""
        raise NotImplementedError


def _own(part: nn.Module) -> str:
    """What a module does beside its class's `forward`, in words; nothing if there is nothing."""
    own = ["a forward of its own"] if "forward" in vars(part) else []
    # Those with which transformers collects hidden states stay after a call, and do nothing in others.
    hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
    sources = [hook if hasattr(hook, "__qualname__") else type(hook) for hook in hooks]
    own += [
        f"the hook {source.__qualname__}"
        for source in sources
        if not f"{source.__module__}".startswith("transformers.")
    ]
    return ", ".join(own)


def steps(mlp: Any) -> list[nn.Module]:
    """The layers of an MLP in order, or the MLP itself if it does more than they do."""
    if _own(mlp):
        return [mlp]
    if type(mlp) is nn.Sequential:
        return list(mlp)
    return [mlp.fc1, mlp.activation_fn, mlp.fc2] if type(mlp).__name__ == "CLIPMLP" else [mlp]


def is_plain(parameter: object) -> bool:
    """Whether a parameter's values lie in memory as its dtype says: not quantized or sharded."""
    return isinstance(parameter, Tensor) and not is_traceable_wrapper_subclass(parameter)


def _through(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
