"""Segments pictures by class names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rfclip.config import TINY, RefocusConfig, canonical_name, check_precision, is_finite
from rfclip.datasets.names import ClassNames
from rfclip.images import ImageLike, to_rgb
from rfclip.methods import RF_CLIP, Protocol, find_method
from rfclip.plugin import installed, refocus
from rfclip.segment.classes import GENERAL, Classes, parse_classes, title, with_background
from rfclip.segment.result import Segmentation
from rfclip.segment.text import TEMPLATES, TextEmbeddings, digest
from rfclip.segment.windows import Corner, Windows
from rfclip.tiny.scenes import GROUNDS, is_scene
from rfclip.towers import Tower, read_tower
from rfclip.towers.loading import check_model, load_model, load_tokenizer

LISTS = 64  # of names that stay on the device
NO_SCENE = (
    f"{TINY} is a demonstration: it was trained on drawn scenes of emoji, and a picture here is none, so that its "
    "labels mean nothing. For photographs use OpenAI's CLIP, which is downloaded once: rfclip segment photo.jpg "
    "--classes ... --model ViT-B-16-quickgelu --pretrained openai, in Python "
    'rfclip.Segmenter("ViT-B-16-quickgelu", "openai")'
)


class Names(NamedTuple):
    """A list of class names on the tower's device: embeddings [K, C], classes [K], and what the rule knows of them."""

    text: Tensor
    class_of_name: Tensor
    known: Tensor | None


class Segmenter:
    """Segments pictures by class names with RF-CLIP, or with another method.

    A picture is resized to a short side of one and a half windows, seen through overlapping windows of the model's own
    size, whose logits are averaged, resized to the picture and turned into labels (steps 7 to 9 of the method).

    Args:
        model: a name, as for `rfclip.load_model`, or a model, as for `rfclip.refocus`; a plain model is refocused until
            `close()`.
        pretrained: open_clip's tag or a path to safetensors, if model is a name.
        config: RF-CLIP's settings; None takes the model's own if they are known. Not for a model refocused already.
        method: one of `rfclip.methods.METHODS`; None takes RF-CLIP, or that of a model refocused already.
        protocol: how pictures are seen and labels decided, with the defaults of the sides, the scale and the templates
            below; None takes the method's own.
        backend, cuda_graphs: as for `rfclip.refocus`; a model refocused already keeps its own.
        device, precision: if model is a name.
        tokenizer: if model is a ready model with another tokenizer than CLIP's.
        templates: functions from a name to a prompt; None takes the protocol's, mostly open_clip's 80 for ImageNet.
        short_side, window, stride: in pixels, the window a multiple of the patch; None takes the protocol's, for
            RF-CLIP 3/2, 1 and 1/2 of the size that the model was trained at (336, 224 and 112 for ViT-B/16).
        long_side: the longest the resized picture may be, its short side being no less than a window (unless the
            protocol resizes as mmcv does); None takes the protocol's, any for most.
        batch: windows that go through the tower at a time; None: as many as `memory_limit` allows.
        logit_scale: factor of the cosines before the softmax; None takes the protocol's, 40 for RF-CLIP.
        memory_limit: roughly how many bytes a batch of windows, or a band of the probabilities asked for, may take, in
            addition to the model, the convolved patches and patch logits of all windows, and the averaged logits of the
            resized picture.
        cache: folder for text embeddings; None: the user's cache folder; False: no cache on disk.

    Raises:
        ValueError: an argument is out of range, the protocol has other positions than a model refocused already, or as
            `rfclip.load_model` and `rfclip.refocus`.
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
        cuda_graphs: bool = True,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        templates: Sequence[Callable[[str], str]] | None = None,
        short_side: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        long_side: int | None = None,
        batch: int | None = None,
        logit_scale: float | None = None,
        memory_limit: int = 1 << 30,
        cache: str | os.PathLike | bool | None = None,
    ) -> None:
        check_precision(precision)
        if isinstance(model, str):
            model = canonical_name(model)
            self.name, self.pretrained = model, pretrained
            if config is None and model != TINY and find_method(method or RF_CLIP).configured:
                check_model(model, pretrained)
                config = RefocusConfig.preset(model, pretrained)  # before a download that would be in vain
            self.model = load_model(model, pretrained, device=device, precision=precision)
            tokenizer = tokenizer or load_tokenizer(model)
        elif pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r} goes with a model's name; this model has its weights")
        else:
            self.name, self.pretrained, self.model = type(model).__name__, None, model
        self.tower = read_tower(self.model)
        present = installed(self.tower)
        if present is not None and (config is not None or method is not None):
            raise ValueError("config, method: this model is already refocused, with its own")
        card = present.card if present else find_method(method or RF_CLIP)
        protocol = protocol or card.protocol
        if present is not None and protocol.position_offset != present.tower.position_offset:
            raise ValueError(
                f"protocol: it resizes position embeddings with an offset of {protocol.position_offset:g}, and this "
                f"model is refocused with {present.tower.position_offset:g}: give the plain model, and method="
            )
        self.protocol, self._rule = protocol, protocol.load_rule()
        self._text = TextEmbeddings(
            self.model,
            self.tower,
            tokenizer or _clip_tokenizer(self.name, self.model, self.tower),
            TEMPLATES[protocol.templates] if templates is None else templates,
            cache,
        )
        self.windows = Windows.by_protocol(protocol, self.tower, window, stride, short_side, long_side)
        if batch is not None and batch < 1:
            raise ValueError(f"batch={batch}: expected at least 1, or None")
        if logit_scale is not None and not is_finite(logit_scale):
            raise ValueError(f"logit_scale={logit_scale!r}: expected a finite number")
        self.batch, self.memory_limit = batch, memory_limit
        self._distinct: tuple[str, ...] = ()  # names that were checked last
        self._uploaded: dict[object, Names] = {}  # what the last lists of names need on the device
        self.logit_scale = protocol.logit_scale if logit_scale is None else logit_scale
        self._handle = None
        if present is None:
            self._handle = refocus(self.model, config, method=card.name, backend=backend, cuda_graphs=cuda_graphs)
        running = installed(self.tower)
        assert running is not None
        if self._handle is not None:
            running.tower.position_offset = protocol.position_offset
        self._method = running

    @property
    def backend(self) -> str:
        """The backend asked for."""
        return self._method.backend

    @property
    def method(self) -> str:
        """The name of the method."""
        return self._method.name

    @property
    def config(self) -> RefocusConfig | None:
        """The settings in use; None if the method has none."""
        return self._method.config

    def close(self) -> None:
        """Restore a model that this segmenter refocused."""
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
        pamr: bool | None = None,
        background: bool | None = None,
    ) -> Segmentation:
        """Segment one picture.

        Args:
            image: as `rfclip.images.to_rgb` takes it.
            classes: as `rfclip.segment.classes.parse_classes` takes them.
            threshold: pixels whose largest class probability is below it get the class called "background" or, if there
                is none, the label `Segmentation.nothing`.
            probabilities: also return every class's probability.
            pamr: refine the logits along the picture's edges, step 9 of the method; None: if the protocol does.
            background: add a class "background", made of general names such as sky, wall and road. None: if there is
                one class, which would otherwise cover every picture whole.

        Raises:
            ValueError: the image, the classes or the threshold is not as described, two names are the same to the
                model, or its features are not finite.
            RuntimeError: the segmenter is closed.

        Warns:
            UserWarning: the bundled CLIP is asked for names that it does not know, or for a picture that is no scene.
        """
        named = self.with_background(parse_classes(classes), background)
        self.check_names(named)
        return self.segment(to_rgb(image), named, threshold=threshold, probabilities=probabilities, pamr=pamr)

    @torch.inference_mode()
    def segment(
        self,
        rgb: Image.Image,
        named: ClassNames,
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        pamr: bool | None = None,
    ) -> Segmentation:
        """The same for an upright RGB picture and the names of each class, taken literally.

        A name may stand in several classes: those have the same score for it, and the first of them wins.
        """
        return self.segment_by(rgb, [named], threshold=threshold, probabilities=probabilities, pamr=pamr)[0]

    @torch.inference_mode()
    def segment_by(
        self,
        rgb: Image.Image,
        lists: Sequence[ClassNames],
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        pamr: bool | None = None,
    ) -> list[Segmentation]:
        """`segment` for several lists of names, which share one pass of the picture through the tower."""
        if installed(self.model) is not self._method:
            raise RuntimeError("this segmenter is closed, or its model was restored: make another Segmenter")
        if threshold is not None and not (is_finite(threshold) and 0 <= threshold <= 1):
            raise ValueError(f"threshold={threshold!r}: expected a probability, from 0 to 1")
        if self._bundled and not is_scene(rgb):
            warnings.warn(NO_SCENE, stacklevel=3)
        names = [self._upload(named) for named in lists]
        pamr = self.protocol.pamr if pamr is None else pamr
        found, (of_lists, whole) = [], self._logits(rgb, names, pamr)
        for named, listed, logits in zip(lists, names, of_lists, strict=True):
            labels, dense = self._labels(logits, whole, rgb, named, listed.class_of_name, threshold, probabilities)
            found.append(Segmentation(rgb, labels, tuple(map(title, named)), dense))
        return found

    @torch.inference_mode()
    def text_embeddings(self, names: tuple[str, ...]) -> Tensor:
        """One normalized embedding per name, [K, C] float32: the normalized mean of its prompts' normalized embeddings.

        Each name is encoded on its own, so that its embedding does not depend on the others, and kept in memory, and on
        disk under a key of the text tower, its weights and the prompts' tokens. The weights are read once: make another
        segmenter after changing them.
        """
        return self._text(names)

    def _upload(self, named: ClassNames) -> Names:
        """A list of names on the tower's device, where the last few stay."""
        text, device = self.text_embeddings(tuple(name for names in named for name in names)), self.tower.weight.device
        key, kept = (tuple(named), device), self._uploaded
        found = kept.get(key)
        if found is None:
            known = self._rule.knows(text, self.text_embeddings)
            classes = torch.tensor([c for c, names in enumerate(named) for _ in names], device=device)
            found = Names(text.to(device), classes, known if known is None else known.to(device))
            # Another dictionary, since another thread may read this one.
            self._uploaded = dict([*kept.items(), (key, found)][-LISTS:])
        return found

    def with_background(self, named: ClassNames, wanted: bool | None) -> ClassNames:
        """As `rfclip.segment.classes.with_background`, with general names that the model knows."""
        return with_background(named, wanted, GROUNDS if self._bundled else GENERAL)

    @property
    def _bundled(self) -> bool:
        """Whether the model is the bundled one, which knows a few names and drawn scenes only."""
        return bool(getattr(self.model, "trained_on", None))

    def check_names(self, named: ClassNames) -> None:
        """Raise ValueError if two names of classes are the same to the model."""
        names = tuple(name for each in named for name in each)
        if names != self._distinct:
            self._text.check_distinct(names)
            self._distinct = names

    def digest(self) -> str:
        """A hash of the model's weights and structure."""
        return digest(self.model)

    def _logits(self, rgb: Image.Image, lists: list[Names], pamr: bool) -> tuple[Iterator[Tensor], Tensor | None]:
        """For each list, the logits of all its names in every pixel that is seen: [K, h, w] float32.

        Sizes are those of the resized picture, of its patches where the rule goes to pixels at once, or of the picture
        as given where PAMR refined it there. Also the convolved patches [1, d, gh, gw] of the picture as a whole, if
        they are known or the rule needs them.
        """
        tower, windows, method, rule = self.tower, self.windows, self._method, self._rule
        x = windows.picture(rgb, tower)
        left, right, top, bottom = windows.margins(*x.shape[1:])
        padded = F.pad(x, (left, right, top, bottom))
        shape = padded.shape[1], padded.shape[2]
        corners, size = windows.corners(*shape), windows.size(*shape)
        patches = windows.patches(tower, padded, corners)
        names = sum(len(each.text) for each in lists)
        batch = self.batch or max(1, self.memory_limit // windows.bytes_each(tower, size, names))
        own = rule.image == "window" or (rule.image == "picture" and len(corners) == 1)
        image, whole = None, patches[0][None] if len(corners) == 1 else None
        if whole is None and (rule.regional or rule.image == "picture"):
            whole = replace(windows, window=None).patches(tower, padded, [(0, 0)])[0][None]
        if whole is not None and rule.image == "picture" and not own:
            image = F.normalize(method.image(whole).float(), dim=-1)
        parts: list[list[Tensor]] = [[] for _ in lists]
        for start in range(0, len(corners), batch):
            part = slice(start, start + batch)
            images = windows.images(padded, corners[part], tower) if method.card.sees_images else None
            tokens = torch.stack([window.movedim(0, -1) for window in patches[part]])  # as they lie in memory
            tokens = tokens.movedim(-1, 1)
            if own:
                features, seen = method.dense_and_image(tokens, images)
                image = F.normalize(seen.float(), dim=-1)
            else:
                features = method.dense(tokens, images)
            features = F.normalize(features.float(), dim=1)
            seen_by = None if image is None else image.expand(len(features), -1)
            for found, each in zip(parts, lists, strict=True):
                found.append(rule.window(features, seen_by, each.text, each.known))
        # One list at a time, since the logits of pixels take far more memory than those of patches.
        of_lists = (self._averaged(torch.cat(each), x, corners, size, shape, (top, left), rgb, pamr) for each in parts)
        return of_lists, whole

    def _averaged(
        self,
        logits: Tensor,
        x: Tensor,
        corners: list[Corner],
        size: tuple[int, int],
        shape: tuple[int, int],
        margin: Corner,
        rgb: Image.Image,
        pamr: bool,
    ) -> Tensor:
        """The logits [K, h, w] of the resized picture x from those of its windows, [W, K, gh, gw], as `_logits`."""
        if not logits.isfinite().all():
            raise ValueError(
                "the model's features of this picture are not finite: its weights are damaged, or overflow "
                f"in {str(self.tower.weight.dtype).removeprefix('torch.')} (try another precision)"
            )
        ops, (top, left), (height, width) = self._method.ops, margin, (x.shape[1], x.shape[2])
        if self._rule.at_once and len(corners) == 1 and shape == (height, width):
            averaged = logits[0]
        else:
            averaged = ops.average_windows(logits, corners, size, shape)[:, top : top + height, left : left + width]
        averaged = self._rule.picture(averaged)
        if not pamr:
            return averaged
        refined = self.windows.seen(rgb.height, rgb.width)[2:] if self.protocol.refined == "given" else (height, width)
        x, averaged = (
            F.interpolate(planes[None], size=refined, mode="bilinear", align_corners=False)[0]
            for planes in (x, averaged)
        )
        return ops.pamr(x[None], averaged[None])[0]

    def _labels(
        self,
        logits: Tensor,
        whole: Tensor | None,
        rgb: Image.Image,
        named: ClassNames,
        class_of_name: Tensor,
        threshold: float | None,
        keep: bool,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels [H, W] from logits [K, h, w] and, on request, probabilities [C, H, W], one band of rows at a time.

        Rules change labels, not probabilities.
        """
        ops = self._method.ops
        top, left, height, width = self.windows.seen(rgb.height, rgb.width)
        seen = slice(top, top + height), slice(left, left + width)
        titles = list(map(title, named))
        dtype: np.dtype[np.unsignedinteger] = np.dtype(np.uint8) if len(named) < 256 else np.dtype(np.uint16)
        nothing = np.iinfo(dtype).max
        below = titles.index("background") if "background" in titles else nothing
        found = self._rule.labels(ops, logits, (height, width), self.logit_scale, class_of_name, threshold)
        if whole is not None and self._rule.regional:
            found = self._rule.regions(self._method, whole, found)
        labels = np.full((rgb.height, rgb.width), nothing, dtype)
        labels[seen] = np.where((found < 0).cpu(), below, found.cpu())
        if not keep:
            return labels, None
        dense = np.zeros((len(named), rgb.height, rgb.width), np.float32)
        band = max(1, self.memory_limit // (4 * 4 * len(logits) * width))
        for first in range(0, height, band):
            rows = range(first, min(first + band, height))
            shares = ops.class_probabilities(logits, (height, width), self.logit_scale, class_of_name, len(named), rows)
            dense[:, top + first : top + rows.stop, seen[1]] = shares.cpu().numpy()
        return labels, dense


def _clip_tokenizer(name: str, model: nn.Module, tower: Tower) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a model with CLIP's vocabulary."""
    size, length = tower.vocabulary(model)
    if size != 49408:
        raise ValueError(
            f"{name} knows {size or 'no'} tokens, and CLIP's tokenizer has 49408: pass one that fits, such as "
            "tokenizer=open_clip.get_tokenizer(name)"
        )
    return open_clip.SimpleTokenizer(context_length=length)
