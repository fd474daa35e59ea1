"""Text embeddings of class names, kept in memory and on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from rfclip.config import TINY
from rfclip.files import write_whole
from rfclip.ops.numerics import autocasting
from rfclip.towers import Tower, read_tower
from rfclip.towers.loading import find_tokenizer

BATCH = 256  # prompts at a time in the text tower
_IMAGENET = tuple(open_clip.OPENAI_IMAGENET_TEMPLATES)
TEMPLATES: dict[str, tuple[Callable[[str], str], ...]] = {  # functions from a name to a prompt, by `Protocol.templates`
    "imagenet": _IMAGENET,
    "photo": ("a photo of a {}.".format,),
    "scene": (
        *_IMAGENET,
        "there is a {} in the scene.".format,
        "there is the {} in the scene.".format,
        "this is a {} in the scene.".format,
        "this is the {} in the scene.".format,
        "this is one {} in the scene.".format,
    ),
}


class TextEmbeddings:
    """One embedding per class name, made once: in memory, and on disk under a key of everything it depends on.

    Args:
        model: the CLIP.
        tower: its image tower, whose parts the text embeddings do not depend on.
        tokenizer: from prompts to tokens [K, n].
        templates: functions from a name to a prompt.
        cache: folder on disk; None or True takes the user's cache folder, False keeps nothing on disk.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        tokenizer: Callable[[list[str]], Tensor],
        templates: Sequence[Callable[[str], str]],
        cache: str | os.PathLike | bool | None,
    ) -> None:
        self._model, self._tower, self._tokenizer, self._templates = model, tower, tokenizer, tuple(templates)
        self._cache = user_cache_path("rfclip") / "text" if cache is None or cache is True else cache
        self._known: dict[str, Tensor] = {}
        self._weights: str | None = None
        self._distrusted = False
        if not self._templates:
            raise ValueError("templates: expected at least one function from a name to a prompt")

    def check_distinct(self, names: Sequence[str]) -> None:
        """Raise ValueError if two names are the same to the model, and warn of one whose end it does not see."""
        seen: dict[tuple[int, ...], str] = {}
        for name in names:
            tokens, shorter = self._tokenizer([self._templates[0](name), self._templates[0](name[:-1])]).tolist()
            if tokens == shorter:
                warnings.warn(f"classes: {name!r} is cut, as the model reads {len(tokens)} tokens", stacklevel=4)
            same = seen.setdefault(tuple(tokens), name)
            if same != name:
                raise ValueError(
                    f"classes: {same!r} and {name!r} are the same {len(tokens)} tokens to the model, so that the later "
                    "would never be found: it ignores case and how characters are written, and cuts long names"
                )

    @torch.inference_mode()
    def __call__(self, names: tuple[str, ...]) -> Tensor:
        """As `Segmenter.text_embeddings`."""
        trained: tuple[str, ...] = getattr(self._model, "trained_on", None) or ()
        strange = [name for name in names if trained and name and name.lower() not in trained]
        if strange:
            warnings.warn(
                f"{TINY} was never trained on {', '.join(map(repr, strange))}; it knows: {', '.join(trained)}",
                stacklevel=4,
            )
        for name in names:
            if name not in self._known:
                tokens = self._tokenizer([template(name) for template in self._templates])
                self._known[name] = self._cached(name, tokens)
        return torch.stack([self._known[name] for name in names])

    def _cached(self, name: str, tokens: Tensor) -> Tensor:
        """The embedding of a name's prompts: from disk, or else encoded and saved there."""
        if self._cache is False:
            return self._encoded(tokens)
        if self._weights is None:
            self._weights = digest(self._model, lambda part: part not in self._tower.image_parts)
        lowered = _autocast(self._tower.weight.device)
        key = hashlib.blake2b(repr((self._weights, lowered, name, tokens.tolist())).encode(), digest_size=20).digest()
        path = Path(self._cache) / f"{key.hex()}.safetensors"
        try:
            # Not load_file, which would hold the file, so that Windows could not remove it.
            entry = load(path.read_bytes())
            if _check(key, entry["embedding"]) == entry["check"].numpy().tobytes():
                return entry["embedding"]
        except OSError:  # there is none, or it cannot be read
            pass
        except (SafetensorError, KeyError, TypeError) as error:
            self._distrust(path, str(error))
        else:
            self._distrust(path, "its content was changed")
        embedding = self._encoded(tokens)
        check = torch.frombuffer(bytearray(_check(key, embedding)), dtype=torch.uint8)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole({path: lambda part: save_file({"embedding": embedding, "check": check}, part)})
        return embedding

    def _distrust(self, path: Path, reason: str) -> None:
        """Say once that an entry is not used."""
        if not self._distrusted:
            warnings.warn(f"{path}: not a cached text embedding ({reason}): it is encoded anew", stacklevel=5)
        self._distrusted = True

    def _encoded(self, tokens: Tensor) -> Tensor:
        parts = (part.to(self._tower.weight.device) for part in tokens.split(BATCH))
        encoded = torch.cat([self._tower.encode_text(self._model, part).float() for part in parts])
        return F.normalize(F.normalize(encoded, dim=-1).mean(dim=0), dim=-1).cpu()


def text_embeddings(
    model: nn.Module,
    names: Sequence[str],
    *,
    templates: Sequence[Callable[[str], str]] | None = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    cache: str | os.PathLike | bool | None = None,
) -> Tensor:
    """One normalized embedding per name, to compare dense features with: [K, C] float32 on the CPU.

    Each is the normalized mean of the normalized embeddings of the name's prompts.

    Args:
        model: a CLIP, refocused or not.
        names: of things to find.
        templates: functions from a name to a prompt; None takes open_clip's 80 for ImageNet.
        tokenizer, cache: as for `Segmenter`.

    Raises:
        ValueError: `names` is a single string, or the model is no CLIP that can be refocused, or needs a tokenizer.
    """
    if isinstance(names, str):
        raise ValueError(f"names: got {names!r}, expected a list of names")
    tower = read_tower(model)
    given = TEMPLATES["imagenet"] if templates is None else templates
    return TextEmbeddings(model, tower, tokenizer or find_tokenizer(model, tower), given, cache)(tuple(names))


def _check(key: bytes, embedding: Tensor) -> bytes:
    """What tells an entry of the cache from one that was changed, damaged, or belongs to another key."""
    values = embedding.numpy()
    return hashlib.blake2b(key + f"{values.dtype} {values.shape}".encode() + values.tobytes(), digest_size=20).digest()


def _autocast(device: torch.device) -> str:
    """The dtype that autocast lowers to on a device, or nothing."""
    return str(torch.get_autocast_dtype(device.type)) if autocasting(device) else ""


def digest(model: nn.Module, wanted: Callable[[str], bool] = lambda part: True) -> str:
    """A hash of those of a model's children whose names are wanted, and of the model's own parameters and buffers.

    It covers everything that the result depends on: values, buffers that are not saved with the weights (such as the
    causal mask), classes, settings (such as the number of heads, the pooling or an adapter's state), and hooks.
    """
    found = hashlib.blake2b()
    for name, module in model.named_modules():
        if name and not wanted(name.partition(".")[0]):
            continue
        own = sorted((key, text) for key, value in vars(module).items() if (text := _setting(key, value)) is not None)
        found.update(f"{name} {type(module).__qualname__} {own}".encode())
        # What is saved, which for a quantized module is neither parameter nor buffer, and buffers that are not.
        values: dict[str, object] = {**module._buffers}
        module._save_to_state_dict(values, "", keep_vars=True)
        for key, value in sorted(values.items()):
            found.update(key.encode())
            for part in _content(value):
                found.update(part)
    return found.hexdigest()


def _content(value: object) -> Iterator[bytes]:
    """What makes up a value of a module's state."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _content(each)
    elif not isinstance(value, Tensor):
        yield repr(value).encode()
    elif hasattr(value, "__tensor_flatten__"):  # a tensor of several tensors, such as torchao's
        names, rest = value.__tensor_flatten__()
        yield f"{type(value).__qualname__} {rest}".encode()
        yield from _content([getattr(value, name) for name in names])
    else:
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        values = (value.dequantize() if value.is_quantized else value).detach().cpu().contiguous()
        yield values.view(-1).view(torch.uint8).numpy().tobytes()


def _setting(key: str, value: object) -> str | None:
    """An attribute of a module as text if results may depend on it, and None otherwise."""
    if key.endswith("_hooks"):
        hooks = value.values() if isinstance(value, Mapping) else ()
        return ", ".join(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks) or None
    if key == "training" or key.startswith("_") and not isinstance(value, bool):
        return None
    if isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, Mapping):
        return str(sorted((str(name), _setting("", part)) for name, part in value.items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [str(_setting("", part)) for part in value]
        return str(sorted(parts) if isinstance(value, (set, frozenset)) else parts)
    if hasattr(value, "to_json_string"):  # a config of transformers
        return str(value.to_json_string())
    return getattr(value, "__qualname__", None)  # of a function or a class; an instance has none
