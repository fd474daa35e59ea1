"""Text embeddings of class names, kept in memory and on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from rfclip.config import TINY
from rfclip.files import write_whole
from rfclip.towers import Tower

BATCH = 256  # prompts at a time in the text tower


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
        if not self._templates:
            raise ValueError("templates: expected at least one function from a name to a prompt")

    def __call__(self, names: tuple[str, ...]) -> Tensor:
        """As `Segmenter.text_embeddings`."""
        trained: tuple[str, ...] = getattr(self._model, "trained_on", None) or ()
        strange = [name for name in names if trained and name.lower() not in trained]
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
        key = hashlib.blake2b(repr((self._weights, name, tokens.tolist())).encode(), digest_size=20).hexdigest()
        path = Path(self._cache) / f"{key}.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            # Not load_file, which would hold the file, so that Windows could not remove it.
            return load(path.read_bytes())["embedding"]
        embedding = self._encoded(tokens)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole({path: lambda part: save_file({"embedding": embedding}, part)})
        return embedding

    def _encoded(self, tokens: Tensor) -> Tensor:
        parts = (part.to(self._tower.weight.device) for part in tokens.split(BATCH))
        encoded = torch.cat([self._tower.encode_text(self._model, part).float() for part in parts])
        return F.normalize(F.normalize(encoded, dim=-1).mean(dim=0), dim=-1).cpu()


def digest(model: nn.Module, wanted: Callable[[str], bool] = lambda part: True) -> str:
    """A hash of the weights and structure of those of a model's children whose names are wanted."""
    # The modules' description tells apart what weights do not, such as GELU and QuickGELU.
    found = hashlib.blake2b(repr([m for name, m in model.named_children() if wanted(name)]).encode())
    for name, value in sorted(model.state_dict().items()):
        if wanted(name.partition(".")[0]):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
