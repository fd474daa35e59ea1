"""From a picture and class names to a segmentation."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from rfclip.config import TINY, RefocusConfig
from rfclip.files import write_whole
from rfclip.images import ImageLike, to_rgb
from rfclip.methods import RFCLIP, Method, Protocol, find_method
from rfclip.models import check_model, load_model, load_tokenizer, open_clip_name
from rfclip.plugin import refocus
from rfclip.tower import read_tower

TEXT_BATCH = 256
Classes = str | os.PathLike | Sequence[str | Sequence[str]]


def parse_classes(classes: Classes) -> list[tuple[str, ...]]:
    """The names of each class: one tuple a class, its first name standing for it.

    Args:
        classes: a list whose items are a name, names separated by commas ("cat, kitten"), or a list of names; or a file
            of one class a line; or one string of classes separated by commas, or, to give synonyms, by semicolons:
            "cat, kitten; dog".

    Raises:
        ValueError: there is no class, an empty name, or a name twice.
    """
    if isinstance(classes, os.PathLike) or (isinstance(classes, str) and os.path.isfile(classes)):
        try:
            items: Iterable = [line for line in Path(classes).read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"classes file {classes}: {error}") from error
    elif isinstance(classes, str) and (classes.endswith(".txt") or os.sep in classes):
        raise ValueError(f"classes: there is no file {classes}")
    elif isinstance(classes, str):
        items = split_classes(classes)
    else:
        items = classes
    parsed = []
    for item in items:
        names = item.split(",") if isinstance(item, str) else item
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"classes: got {item!r}, expected a name or a list of names")
        parsed.append(tuple(" ".join(name.split()) for name in names))
    every = [name for names in parsed for name in names]
    if not every or not all(every) or not all(parsed):
        raise ValueError(f"classes: got {classes!r}, expected at least one class, and no empty names")
    twice = [name for name, count in Counter(every).items() if count > 1]
    if twice:
        raise ValueError(f"classes: {', '.join(map(repr, twice))} given more than once; every name must be distinct")
    if len(parsed) >= np.iinfo(np.uint16).max:
        raise ValueError(f"classes: got {len(parsed)}, at most {np.iinfo(np.uint16).max - 1} are possible")
    return parsed


def split_classes(text: str) -> list[list[str]]:
    """The names of each class in "cat, dog", or, with synonyms, in "cat, kitten; dog"; a text is never a file here."""
    if ";" in text:
        return [names.split(",") for names in text.split(";")]
    return [[name] for name in text.split(",")]


@dataclass(frozen=True)
class Segmentation:
    """The outcome for one picture.

    Attributes:
        image: the picture, RGB, turned upright.
        labels: [H, W], uint8 (uint16 from 256 classes on): the index in `classes`, or `nothing`.
        classes: the first name of each class.
        probabilities: [C, H, W] float32, the largest of each class's names, on demand, else None.
    """

    image: Image.Image
    labels: np.ndarray
    classes: tuple[str, ...]
    probabilities: np.ndarray | None = None

    @property
    def nothing(self) -> int:
        """The label of pixels under the threshold: 255 (65535 where labels are uint16)."""
        return int(np.iinfo(self.labels.dtype).max)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the picture that each class covers; pixels under the threshold belong to none."""
        return {name: float(n / self.labels.size) for name, n in zip(self.classes, self._areas(), strict=True)}

    def _areas(self) -> np.ndarray:
        """The pixels of each class, int [C]."""
        return np.bincount(self.labels.ravel(), minlength=len(self.classes))[: len(self.classes)]

    def mask(self) -> Image.Image:
        """An indexed picture: pixel values are labels, colours those of the overlay.

        Raises:
            ValueError: there are more classes than an indexed picture holds, 255.
        """
        if self.labels.dtype != np.uint8:
            raise ValueError(f"{len(self.classes)} classes: an indexed picture holds at most 255; use .labels")
        mask = Image.fromarray(self.labels)
        mask.putpalette([channel for colour in palette(255) for channel in colour] + [0, 0, 0])
        return mask

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """The picture under its labels' colours, and, if wanted, a legend below: the classes seen, largest first."""
        colours = palette(len(self.classes))
        table = np.zeros((self.nothing + 1, 3), np.uint8)
        table[: len(colours)] = colours
        blend = Image.blend(self.image, Image.fromarray(table[self.labels]), alpha)
        picture = Image.composite(blend, self.image, Image.fromarray(self.labels != self.nothing))
        if not legend:
            return picture
        areas = self._areas()
        seen = [int(index) for index in np.argsort(-areas, kind="stable") if areas[index]]
        entries = [(f"{self.classes[i]} {100 * areas[i] / self.labels.size:.0f} %", colours[i]) for i in seen]
        return _with_legend(picture, entries)


def palette(count: int) -> list[tuple[int, int, int]]:
    """`count` colours, each as unlike those before it as can be (Glasbey's method); after 256 they come again."""
    import colorcet  # only now, for it takes as long as the rest of this package

    return [tuple(round(255 * c) for c in colorcet.glasbey_bw_minc_20_minl_30[index % 256]) for index in range(count)]


def _with_legend(picture: Image.Image, entries: list[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """The picture (at least 240 pixels wide on the canvas) above rows of colour swatches with their names."""
    size = max(12, min(picture.size) // 28)
    font = ImageFont.load_default(size)
    width, line = max(picture.width, 240), round(size * 1.7)
    rows, x, y = [], size // 2, size // 2
    for text, colour in entries:
        wide = round(font.getlength(text)) + 2 * size + size // 2
        if x + wide > width and x > size:
            x, y = size // 2, y + line
        rows.append((x, y, text, colour))
        x += wide
    canvas = Image.new("RGB", (width, picture.height + (y + line if entries else 0)), "white")
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, text, colour in rows:
        top = picture.height + y
        draw.rectangle((x, top, x + size, top + size), fill=colour, outline="black")
        draw.text((x + round(1.4 * size), top + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas


class Segmenter:
    """Segments pictures by class names with RF-CLIP, or with another method.

    A picture is resized to a short side of one and a half windows, seen through overlapping windows of the model's own
    size, whose logits are averaged, resized to the picture and turned into labels (steps 8 and 9 of the method).

    Args:
        model: a name, as for `rfclip.load_model`, or a model, as for `rfclip.refocus`; if it is not refocused yet, it
            is until `close()`.
        pretrained: open_clip's tag or a path to safetensors, where model is a name.
        config: a `RefocusConfig`; None takes the model's own where it is known. Not for a model refocused already.
        method: one of `rfclip.methods.METHODS`; None takes RF-CLIP, or that of a model refocused already.
        protocol: the defaults of the sides and the scale below; None takes the method's own.
        backend: as for `rfclip.refocus`.
        device, precision: where model is a name.
        tokenizer: where model is a ready model with another tokenizer than CLIP's.
        templates: functions from a name to a prompt; open_clip's 80 for ImageNet.
        short_side, window, stride: in pixels, the window a multiple of the patch; None: the protocol's, RF-CLIP's being
            3/2, 1 and 1/2 of the size that the model was trained at (336, 224 and 112 for ViT-B/16).
        long_side: the most that the resized picture may have, its short side being no less than a window all the same;
            None: any.
        batch: windows that go through the tower at a time; None: as many as `memory_limit` lets.
        logit_scale: factor of the cosines before the softmax; None: the protocol's, 40 for RF-CLIP.
        memory_limit: about how many bytes a batch of windows, or a band of the probabilities asked for, may take. On
            top come the convolved patches and the patch logits of all windows, the averaged logits of the resized
            picture, and the model.
        cache: folder for text embeddings; None: the user's cache folder; False: no cache on disk.

    Raises:
        ValueError: an argument is not as above, or as `rfclip.load_model` and `rfclip.refocus`.
    """

    def __init__(
        self,
        model: str | nn.Module = TINY,
        pretrained: str | None = None,
        *,
        config: RefocusConfig | None = None,
        method: str | None = None,
        protocol: Protocol | None = None,
        backend: str = "auto",
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        templates: Sequence[Callable[[str], str]] = open_clip.OPENAI_IMAGENET_TEMPLATES,
        short_side: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        long_side: int | None = None,
        batch: int | None = None,
        logit_scale: float | None = None,
        memory_limit: int = 1 << 30,
        cache: str | os.PathLike | bool | None = None,
    ):
        if isinstance(model, str):
            model = open_clip_name(model)
            self.name, self.pretrained = model, pretrained
            if config is None and model != TINY and find_method(method or RFCLIP.name).configured:
                check_model(model, pretrained)
                config = RefocusConfig.preset(model, pretrained)  # before a download, which would be in vain
            self.model = load_model(model, pretrained, device=device, precision=precision)
            tokenizer = tokenizer or load_tokenizer(model)
        elif pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r} goes with a model's name; this model has its weights")
        else:
            self.name, self.pretrained, self.model = type(model).__name__, None, model
        self.tower = read_tower(self.model)
        self.tokenizer, self.templates = tokenizer or self._clip_tokenizer(), tuple(templates)
        if not self.templates:
            raise ValueError("templates: expected at least one function from a name to a prompt")
        present = vars(self.tower.module).get("forward")
        if isinstance(present, Method) and (config is not None or method is not None):
            raise ValueError("config, method: this model is refocused already, with those it was given then")
        kind = type(present) if isinstance(present, Method) else find_method(method or RFCLIP.name)
        protocol, patch = protocol or kind.protocol, max(self.tower.patch_size)
        self.window = window or round(max(self.tower.image_size) * protocol.window / 224 / patch) * patch
        self.stride = stride or self.window * protocol.stride // protocol.window
        self.short_side = short_side or self.window * protocol.short_side // protocol.window
        if self.window < patch or self.window % patch or not 1 <= self.stride <= self.window <= self.short_side:
            raise ValueError(
                f"window {self.window}, stride {self.stride}, short side {self.short_side}: expected a window that is "
                f"a multiple of the patch, {patch}, a stride of at most the window, and a short side of no less"
            )
        for name, value in (("long_side", long_side), ("batch", batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1, or None")
        self.long_side, self.batch = long_side, batch
        self.logit_scale = protocol.logit_scale if logit_scale is None else logit_scale
        self.memory_limit = memory_limit
        self._cache = user_cache_path("rfclip") / "text" if cache in (None, True) else cache
        self._embeddings: dict[str, Tensor] = {}
        self._text_weights: str | None = None
        self._handle = None
        if not isinstance(present, Method):
            self._handle = refocus(self.model, config, method=kind.name, backend=backend)
        self._forward = vars(self.tower.module)["forward"]

    def _clip_tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The tokenizer of a model with CLIP's vocabulary."""
        size, length = self.tower.vocabulary(self.model)
        if size != 49408:
            raise ValueError(
                f"{self.name} knows {size or 'no'} tokens, and CLIP's tokenizer has 49408: pass one that fits, such as "
                "tokenizer=open_clip.get_tokenizer(name)"
            )
        return open_clip.SimpleTokenizer(context_length=length)

    @property
    def backend(self) -> str:
        """The backend asked for."""
        return self._forward.backend

    @property
    def method(self) -> str:
        """The name of the method."""
        return self._forward.name

    @property
    def config(self) -> RefocusConfig | None:
        """The refocusing config in use; None where the method has none."""
        return self._forward.config

    def close(self) -> None:
        """Give a model that this segmenter refocused back as it was."""
        if self._handle is not None:
            self._handle.remove()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(
        self,
        image: ImageLike,
        classes: Classes,
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        pamr: bool = False,
    ) -> Segmentation:
        """Segment one picture.

        Args:
            image: as `rfclip.images.to_rgb` takes it.
            classes: as `parse_classes` takes them.
            threshold: pixels whose largest class probability is below it get the class called "background", or where
                there is none the label `Segmentation.nothing`.
            probabilities: also return every class's probability.
            pamr: refine the cosines along the picture's edges before they are resized to the picture, step 10 of the
                method.

        Raises:
            ValueError: the image, the classes or the threshold is not as described.
            RuntimeError: the segmenter is closed.
        """
        named = parse_classes(classes)
        return self.segment(to_rgb(image), named, threshold=threshold, probabilities=probabilities, pamr=pamr)

    @torch.inference_mode()
    def segment(
        self,
        rgb: Image.Image,
        named: list[tuple[str, ...]],
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        pamr: bool = False,
    ) -> Segmentation:
        """As a call of the segmenter, for an upright RGB picture and the names of each class, taken as they are.

        A name may stand in several classes: those have the same score for it, and the first of them wins.
        """
        if vars(self.tower.module).get("forward") is not self._forward:
            raise RuntimeError("this segmenter is closed, or its model was given back: make another Segmenter")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: expected a probability, from 0 to 1")
        text = self.text_embeddings(tuple(name for names in named for name in names))
        logits = self.window_logits(rgb, text, pamr=pamr)
        labels, dense = self._labels(logits, rgb.size[::-1], named, threshold, probabilities)
        return Segmentation(rgb, labels, tuple(names[0] for names in named), dense)

    @torch.inference_mode()
    def text_embeddings(self, names: tuple[str, ...]) -> Tensor:
        """One normalized embedding a name, [K, C] float32: the mean of its prompts' normalized embeddings, normalized.

        Each name is encoded by itself, so that its embedding does not depend on the others, and kept in memory, and on
        disk under a key of the text tower, its weights and the prompts' tokens. The weights are read once: make another
        segmenter after changing them.
        """
        known = getattr(self.model, "trained_on", None)
        strange = [name for name in names if known and name.lower() not in known]
        if strange:
            warnings.warn(
                f"{TINY} was never trained on {', '.join(map(repr, strange))}; it knows: {', '.join(known)}",
                stacklevel=3,
            )
        for name in names:
            if name not in self._embeddings:
                tokens = self.tokenizer([template(name) for template in self.templates])
                self._embeddings[name] = self._cached(name, tokens)
        return torch.stack([self._embeddings[name] for name in names])

    def _cached(self, name: str, tokens: Tensor) -> Tensor:
        """The embedding of the prompts of a name: from the disk, or else encoded and put there."""
        if self._cache is False:
            return self._encode(tokens)
        if self._text_weights is None:
            self._text_weights = self._digest(lambda name: name not in self.tower.image_parts)
        key = hashlib.blake2b(repr((self._text_weights, name, tokens.tolist())).encode(), digest_size=20).hexdigest()
        path = Path(self._cache) / f"{key}.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            return load_file(path)["embedding"]
        embedding = self._encode(tokens)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole({path: lambda part: save_file({"embedding": embedding}, part)})
        return embedding

    def _encode(self, tokens: Tensor) -> Tensor:
        parts = (part.to(self.tower.weight.device) for part in tokens.split(TEXT_BATCH))
        encoded = torch.cat([self.tower.encode_text(self.model, part).float() for part in parts])
        return F.normalize(F.normalize(encoded, dim=-1).mean(dim=0), dim=-1).cpu()

    def digest(self) -> str:
        """A hash of the model's weights and structure."""
        return self._digest(lambda name: True)

    def _digest(self, wanted: Callable[[str], bool]) -> str:
        """A hash of the model's parts of the wanted names."""
        # The modules' description tells apart what weights do not, such as GELU and QuickGELU.
        digest = hashlib.blake2b(repr([m for name, m in self.model.named_children() if wanted(name)]).encode())
        for name, value in sorted(self.model.state_dict().items()):
            if wanted(name.partition(".")[0]):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def window_logits(self, rgb: Image.Image, text: Tensor, *, pamr: bool = False) -> Tensor:
        """Cosines of every pixel of the resized picture with every name, averaged over windows: [K, h, w] float32.

        With `pamr` they are refined along the edges of the resized picture.
        """
        tower, weight = self.tower, self.tower.weight
        x = TF.to_dtype(TF.pil_to_tensor(rgb).to(weight.device), torch.float32, scale=True)
        height, width = self._resized(rgb.height, rgb.width)
        x = TF.resize(x, [height, width], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        x = TF.normalize(x, list(tower.image_mean), list(tower.image_std))
        corners = [(top, left) for top in self._starts(height) for left in self._starts(width)]
        text = text.to(weight.device)
        patches, logits = self._window_patches(x, corners), []
        batch = self.batch or max(1, self.memory_limit // self._bytes_per_window(len(text)))
        for start in range(0, len(corners), batch):
            part = slice(start, start + batch)
            windows = torch.stack(patches[part])
            images = None
            if self._forward.sees_images:
                cut = [x[:, top : top + self.window, left : left + self.window] for top, left in corners[part]]
                images = torch.stack(cut)
            features = F.normalize(self._forward.dense(windows, images).float(), dim=1)
            logits.append((text @ features.flatten(2)).unflatten(-1, features.shape[2:]))
        averaged = self._forward.ops.average_windows(torch.cat(logits), corners, self.window, (height, width))
        return self._forward.ops.pamr(x[None], averaged[None])[0] if pamr else averaged

    def _window_patches(self, x: Tensor, corners: list[tuple[int, int]]) -> list[Tensor]:
        """Views [d, gh, gw] of each window's convolved patches, from the picture [3, h, w].

        Windows that are whole patches apart share one convolution, of the smallest rectangle around them, unless that
        is larger than they are together. The last window of a row or a column, flush with the border, often lies
        between the others' patches.
        """
        side, (patch_height, patch_width) = self.window, self.tower.patch_size
        apart: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for top, left in corners:
            apart.setdefault((top % patch_height, left % patch_width), []).append((top, left))
        found = {}
        for group in apart.values():
            tops, lefts = zip(*group, strict=True)
            area = (max(tops) - min(tops) + side) * (max(lefts) - min(lefts) + side)
            for part in [group] if area <= len(group) * side**2 else [[corner] for corner in group]:
                tops, lefts = zip(*part, strict=True)
                y, x0 = min(tops), min(lefts)
                patches = self.tower.patches(x[None, :, y : max(tops) + side, x0 : max(lefts) + side])[0]
                for top, left in part:
                    row, column = (top - y) // patch_height, (left - x0) // patch_width
                    window = patches[:, row : row + side // patch_height, column : column + side // patch_width]
                    found[top, left] = window
        return [found[corner] for corner in corners]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width with the short side as given, or less where the long one would be too long, aspect kept."""
        scale = self.short_side / min(height, width)
        if self.long_side is not None:
            scale = max(min(scale, self.long_side / max(height, width)), self.window / min(height, width))
        return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)

    def _starts(self, length: int) -> list[int]:
        """Where windows begin along one axis: every stride, the last one flush with the border."""
        last = length - self.window
        return [*range(0, last, self.stride), last]

    def _bytes_per_window(self, names: int) -> int:
        """About what a window takes in a batch: a block's matrices over heads, all keys, and logits of its patches."""
        tower = self.tower
        tokens = (self.window // max(tower.patch_size)) ** 2 + 1
        attention = 7 * tower.blocks[0].heads * tokens**2
        stream = (2 * len(tower.blocks) + 16) * tokens * tower.width
        return 4 * (attention + stream + names * (tokens - 1))

    def _labels(
        self,
        logits: Tensor,
        size: tuple[int, int],
        named: list[tuple[str, ...]],
        threshold: float | None,
        keep: bool,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels [H, W] from logits [K, h, w], and on demand probabilities [C, H, W], band of rows by band of rows."""
        ops, (height, width) = self._forward.ops, size
        first_names = [names[0] for names in named]
        dtype = np.dtype(np.uint8 if len(named) < 256 else np.uint16)
        below = first_names.index("background") if "background" in first_names else np.iinfo(dtype).max
        class_of_name = torch.tensor([c for c, names in enumerate(named) for _ in names], device=logits.device)
        labels = ops.upsample_argmax(logits, size, self.logit_scale, class_of_name, threshold).cpu().numpy()
        labels = np.where(labels < 0, below, labels).astype(dtype)
        if not keep:
            return labels, None
        dense = np.empty((len(named), *size), np.float32)
        band = max(1, self.memory_limit // (4 * 4 * len(logits) * width))
        for top in range(0, height, band):
            rows = range(top, min(top + band, height))
            found = ops.class_probabilities(logits, size, self.logit_scale, class_of_name, len(named), rows)
            dense[:, top : rows.stop] = found.cpu().numpy()
        return labels, dense
