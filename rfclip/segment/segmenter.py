"""Segments pictures by class names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rfclip.config import TINY, RefocusConfig, RegisterConfig, check_post, check_precision, is_finite
from rfclip.datasets.names import ClassNames
from rfclip.images import ImageLike, is_image, to_rgb
from rfclip.methods import RF_CLIP, Protocol, across, feedback, find_method
from rfclip.methods.post import GRID, propagate
from rfclip.methods.rule import Rule
from rfclip.plugin import installed, refocus
from rfclip.segment.classes import GENERAL, Classes, parse_classes, title, with_background
from rfclip.segment.result import Segmentation
from rfclip.segment.text import TEMPLATES, TextEmbeddings, digest
from rfclip.segment.windows import Corner, Windows
from rfclip.tiny.scenes import GROUNDS, is_scene
from rfclip.towers import read_tower
from rfclip.towers.loading import check_model, find_model, find_tokenizer, load_model

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


@dataclass(frozen=True)
class Seen:
    """A picture as the tower sees it.

    Attributes:
        rgb: the picture.
        x: what is seen of it, resized and normalized, [3, h, w] on the tower's device.
        padded: the same with a margin of zeros, [3, H, W].
        margin: how much there is above and to the left.
        corners: of the windows over `padded`.
        size: height and width of each window.
        patches: of each window, convolved, [d, gh, gw].
        whole: those of the whole picture, [1, d, gh, gw], if they are known or the protocol's rule needs them.
    """

    rgb: Image.Image
    x: Tensor
    padded: Tensor
    margin: Corner
    corners: list[Corner]
    size: tuple[int, int]
    patches: list[Tensor]
    whole: Tensor | None


class Segmenter:
    """Segments pictures by class names with RF-CLIP, or with another method.

    A picture is resized to a short side of one and a half windows, seen through overlapping windows of the model's own
    size, whose logits are averaged, resized to the picture and turned into labels (steps 7 to 9 of the method).

    Args:
        model: a name, as for `rfclip.load_model`, or a model, as for `rfclip.refocus`; a plain model is refocused until
            `close()`.
        pretrained: open_clip's tag or a path to safetensors, if model is a name.
        config: RF-CLIP's settings; None takes the model's own if they are known. Not for a model refocused already.
        registers: the same for the method "registers".
        method: one of `rfclip.methods.METHODS`; None takes RF-CLIP, or that of a model refocused already.
        protocol: how pictures are seen and labels decided, with the defaults of the sides, the scale and the templates
            below; None takes the method's own.
        backend, cuda_graphs: as for `rfclip.refocus`; a model refocused already keeps its own.
        device, precision: if model is a name.
        tokenizer: from texts to tokens, for a ready model of another vocabulary than CLIP's; None takes the model's, if
            `rfclip.load_model` loaded it, and else CLIP's.
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
        across_windows: attend across all windows of a picture in the last block, as GLA-CLIP does
            (`rfclip.methods.across`), for methods whose last block is self-attention.

    Raises:
        ValueError: an argument is out of range, the protocol has other positions than a model refocused already, its
            rule does not go with the method or the model, or as `rfclip.load_model` and `rfclip.refocus`.
    """

    def __init__(
        self,
        model: str | nn.Module = TINY,
        pretrained: str | None = None,
        *,
        config: RefocusConfig | None = None,
        registers: RegisterConfig | None = None,
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
        across_windows: bool = False,
    ) -> None:
        check_precision(precision)
        if isinstance(model, str):
            model, pretrained = find_model(model, pretrained)
            self.name, self.pretrained = model, pretrained
            if model != TINY and find_method(method or RF_CLIP).configured:  # before a download that would be in vain
                check_model(model, pretrained, refocused=True)
                config = RefocusConfig.preset(model, pretrained) if config is None else config
            self.model = load_model(model, pretrained, device=device, precision=precision)
        elif pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r} goes with a model's name; this model has its weights")
        else:
            self.name, self.pretrained, self.model = type(model).__name__, None, model
        self.tower = read_tower(self.model)
        present = installed(self.tower)
        if present is not None and any(each is not None for each in (config, method, registers)):
            raise ValueError("config, method, registers: this model is already refocused, with its own")
        card = present.card if present else find_method(method or RF_CLIP)
        protocol = protocol or card.protocol
        if present is not None and protocol.position_offset != present.tower.position_offset:
            raise ValueError(
                f"protocol: it resizes position embeddings with an offset of {protocol.position_offset:g}, and this "
                f"model is refocused with {present.tower.position_offset:g}: give the plain model, and method="
            )
        if present is not None and not present.follows(protocol):
            raise ValueError(
                f"protocol: it has the constants {dict(protocol.constants.get(card.name, {}))}, and this model is "
                f"refocused with {present.constants}: give the plain model, and method="
            )
        self.protocol, self._rule = protocol, protocol.load_rule()
        self._text = TextEmbeddings(
            self.model,
            self.tower,
            tokenizer or find_tokenizer(self.model, self.tower),
            TEMPLATES[protocol.templates] if templates is None else templates,
            cache,
        )
        self.windows = Windows.by_protocol(protocol, self.tower, window, stride, short_side, long_side)
        if batch is not None and batch < 1:
            raise ValueError(f"batch={batch}: expected at least 1, or None")
        if logit_scale is not None and not is_finite(logit_scale):
            raise ValueError(f"logit_scale={logit_scale!r}: expected a finite number")
        self.batch, self.memory_limit, self.across_windows = batch, memory_limit, across_windows
        self._distinct: tuple[str, ...] = ()  # names that were checked last
        self._uploaded: dict[object, Names] = {}  # what the last lists of names need on the device
        self.logit_scale = protocol.logit_scale if logit_scale is None else logit_scale
        self._handle = None
        if present is None:
            how: dict[str, Any] = {"method": card.name, "backend": backend, "registers": registers}
            self._handle = refocus(self.model, config, cuda_graphs=cuda_graphs, **how)
        running = installed(self.tower)
        assert running is not None
        if self._handle is not None:
            running.follow(protocol)
        self._method = running
        try:
            self._rule.check(running)
            if across_windows:
                across.check_across(running)
                self._check_plain("across_windows")
        except ValueError:
            self.close()
            raise

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

    @property
    def registers(self) -> RegisterConfig | None:
        """The register neurons in use; None if the method has none."""
        return getattr(self._method, "registers", None)

    def close(self) -> None:
        """Restore a model that this segmenter refocused."""
        if self._handle is not None:
            self._handle.remove()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a string is a path, not an iterable of paths
        self,
        image: ImageLike,
        classes: Classes,
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        post: str | None = None,
        background: bool | None = None,
        progress: bool = False,
    ) -> Segmentation: ...

    @overload
    def __call__(
        self,
        image: Iterable[ImageLike],
        classes: Classes,
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        post: str | None = None,
        background: bool | None = None,
        progress: bool = False,
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        image: ImageLike | Iterable[ImageLike],
        classes: Classes,
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        post: str | None = None,
        background: bool | None = None,
        progress: bool = False,
    ) -> Segmentation | list[Segmentation]:
        """Segment one picture, or a list of pictures, which share passes through the tower.

        Args:
            image: one as `rfclip.images.to_rgb` takes it, or any iterable of such. For more pictures than memory holds
                results of, see `stream`.
            classes: as `rfclip.segment.classes.parse_classes` takes them.
            threshold: pixels whose largest class probability is below it get the class called "background" or, if there
                is none, the label `Segmentation.nothing`.
            probabilities: also return every class's probability.
            post: what happens after a first pass, step 9 of the method: "none"; "pamr", which refines the logits of
                pixels along the picture's edges; "pearl", PEARL's propagation (`rfclip.methods.post`); or "resclip", a
                second pass through the tower with attention corrected by the classes of the first
                (`rfclip.methods.feedback`). None: what the protocol does.
            background: add a class "background", made of general names such as sky, wall and road. None: if there is
                one class, which would otherwise cover every picture whole.
            progress: show a progress bar on the error stream.

        Returns:
            A `Segmentation`, or for several pictures a list of them.

        Raises:
            ValueError: an image, the classes or an option is not as described, two names are the same to the model, or
                its features are not finite.
            RuntimeError: the segmenter is closed.

        Warns:
            UserWarning: the bundled CLIP is asked for names that it does not know, or for a picture that is no scene.
        """
        options: dict[str, Any] = {"threshold": threshold, "probabilities": probabilities, "post": post}
        if is_image(image) or not isinstance(image, Iterable):  # what is neither, `to_rgb` refuses
            named = self._named(classes, background)
            return self.segment(to_rgb(cast(ImageLike, image)), named, confidence=True, **options)
        found: Iterable[Segmentation] = self.stream(image, classes, background=background, **options)
        if progress:
            from rich.console import Console
            from rich.progress import track

            total = len(image) if isinstance(image, Sized) else None
            found = track(found, "segmenting", total, console=Console(stderr=True))
        return list(found)

    def stream(
        self,
        images: Iterable[ImageLike],
        classes: Classes,
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        post: str | None = None,
        background: bool | None = None,
    ) -> Iterator[Segmentation]:
        """The results of pictures one after the other, as a call with a list returns them.

        No more pictures are read ahead than share a pass through the tower. Classes and options are checked at once.

        Args:
            images: any iterable, also one without end.
            classes, threshold, probabilities, post, background: as for a call.

        Raises:
            ValueError, RuntimeError: as a call does; the results before that of a bad image are given first.
        """
        named = self._named(classes, background)
        self._check_call(threshold, post)
        names = self._upload(named)
        options: dict[str, Any] = {"threshold": threshold, "probabilities": probabilities, "post": post}

        def results() -> Iterator[Segmentation]:
            for seen in self._together(images, len(names.text)):
                yield from (found for (found,) in self._segmented(seen, [named], [names], confidence=True, **options))

        return results()

    def _named(self, classes: Classes, background: bool | None) -> ClassNames:
        """The names of each class as a user gives them."""
        named = self.with_background(parse_classes(classes), background)
        self.check_names(named)
        return named

    @torch.inference_mode()
    def segment(
        self,
        rgb: Image.Image,
        named: ClassNames,
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        confidence: bool = False,
        post: str | None = None,
    ) -> Segmentation:
        """The same for an upright RGB picture and the names of each class, taken literally, with confidence on request.

        A name may stand in several classes: those have the same score for it, and the first of them wins.
        """
        options: dict[str, Any] = {"threshold": threshold, "probabilities": probabilities, "confidence": confidence}
        return self.segment_by(rgb, [named], post=post, **options)[0]

    @torch.inference_mode()
    def segment_by(
        self,
        rgb: Image.Image,
        lists: Sequence[ClassNames],
        *,
        threshold: float | None = None,
        probabilities: bool = False,
        confidence: bool = False,
        post: str | None = None,
    ) -> list[Segmentation]:
        """`segment` for several lists of names, which share one pass of the picture through the tower."""
        self._check_call(threshold, post)
        options: dict[str, Any] = {"threshold": threshold, "probabilities": probabilities, "confidence": confidence}
        return self._segmented([self._see(rgb)], lists, list(map(self._upload, lists)), post=post, **options)[0]

    def _check_call(self, threshold: float | None, post: str | None) -> None:
        if installed(self.model) is not self._method:
            raise RuntimeError("this segmenter is closed, or its model was restored: make another Segmenter")
        if threshold is not None and not (is_finite(threshold) and 0 <= threshold <= 1):
            raise ValueError(f"threshold={threshold!r}: expected a probability, from 0 to 1")
        self.check_post(post)

    def check_post(self, post: str | None) -> None:
        """Raise ValueError for a `post` that there is not, or that does not go with the method or the protocol."""
        check_post(post)
        if (post or self.protocol.post) == "resclip":
            feedback.check_feedback(self._method)
            self._check_plain("post='resclip'")
            if self.across_windows:
                raise ValueError("post='resclip' corrects attention within each window: leave out across_windows")

    def _check_plain(self, option: str) -> None:
        """Raise ValueError for a rule that looks at windows for itself."""
        if type(self._rule).look is not Rule.look:
            raise ValueError(f"{option}: the protocol has features of its own; give another, such as the common one")

    @torch.inference_mode()
    def _together(self, images: Iterable[ImageLike], names: int) -> Iterator[list[Seen]]:
        """Pictures that share passes through the tower."""
        seen: list[Seen] = []
        windows = 0
        for number, image in enumerate(images):
            try:
                rgb = to_rgb(image)
            except (ValueError, OSError) as error:
                if seen:
                    yield seen
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"image {number}: {error}") from error
            seen.append(self._see(rgb))
            windows += len(seen[-1].corners)
            if windows >= self._batch(seen[-1].size, names):
                yield seen
                seen, windows = [], 0
        if seen:
            yield seen

    @torch.inference_mode()
    def _segmented(
        self,
        pictures: Sequence[Seen],
        lists: Sequence[ClassNames],
        names: Sequence[Names],
        *,
        threshold: float | None,
        probabilities: bool,
        confidence: bool,
        post: str | None,
    ) -> list[list[Segmentation]]:
        """For each picture, the result by each list of names, which are on the device."""
        post = self.protocol.post if post is None else post
        found: list[list[Segmentation]] = []
        for seen, of_lists in zip(pictures, self._logits(pictures, names, post), strict=True):
            found.append([])
            # One list at a time, since the logits of pixels take far more memory than those of patches.
            for named, listed, logits in zip(lists, names, of_lists, strict=True):
                averaged = self._averaged(torch.stack(logits), seen, listed.text, post)
                labels = self._labels(averaged, seen, named, listed.class_of_name, threshold)
                dense, certain = None, None
                if probabilities or confidence:
                    classes = listed.class_of_name
                    dense, certain = self._probabilities(averaged, seen, len(named), classes, labels, probabilities)
                found[-1].append(Segmentation(seen.rgb, labels, tuple(map(title, named)), dense, certain))
        return found

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
            background = torch.tensor([title(names) == "background" for names in named for _ in names])
            known = self._rule.knows(text, self.text_embeddings, background)
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

    def _batch(self, size: tuple[int, int], names: int) -> int:
        """How many windows of a size go through the tower at a time."""
        return self.batch or max(1, self.memory_limit // self.windows.bytes_each(self.tower, size, names))

    def _see(self, rgb: Image.Image) -> Seen:
        if self._bundled and not is_scene(rgb):
            warnings.warn(NO_SCENE, stacklevel=4)
        tower, windows, rule = self.tower, self.windows, self._rule
        x = windows.picture(rgb, tower)
        left, right, top, bottom = windows.margins(*x.shape[1:])
        padded = F.pad(x, (left, right, top, bottom))
        shape = padded.shape[1], padded.shape[2]
        corners = windows.corners(*shape)
        patches = windows.patches(tower, padded, corners)
        whole = patches[0][None] if len(corners) == 1 else None
        if whole is None and (rule.regional or rule.image == "picture"):
            whole = replace(windows, window=None).patches(tower, padded, [(0, 0)])[0][None]
        return Seen(rgb, x, padded, (top, left), corners, windows.size(*shape), patches, whole)

    def _logits(self, pictures: Sequence[Seen], lists: Sequence[Names], post: str) -> list[list[list[Tensor]]]:
        """For each picture, list and window, the logits [K, gh, gw] of all the list's names in the window's patches.

        Windows of one size share passes through the tower, whichever picture they are of.
        """
        method, rule, tower = self._method, self._rule, self.tower
        # The windows of each size, and whether the tower's own embedding of them is the image that the rule asks for.
        groups: dict[tuple[torch.Size, bool], list[tuple[int, int]]] = {}
        images: list[Tensor | None] = []
        for number, seen in enumerate(pictures):
            own = rule.image == "window" or (rule.image == "picture" and len(seen.corners) == 1)
            images.append(None)
            if seen.whole is not None and rule.image == "picture" and not own:
                images[-1] = F.normalize(method.image(seen.whole).float(), dim=-1)
            windows = [(number, window) for window in range(len(seen.corners))]
            groups.setdefault((seen.patches[0].shape, own), []).extend(windows)
        parts: list[list[list[Tensor]]] = [[[] for _ in lists] for _ in pictures]
        crossed = [self._across(seen) for seen in pictures] if self.across_windows else None
        for (_, own), windows in groups.items():
            batch = self._batch(pictures[windows[0][0]].size, sum(len(each.text) for each in lists))
            for start in range(0, len(windows), batch):
                part = windows[start : start + batch]
                given = None
                if method.card.sees_images or rule.sees_images or post == "resclip":
                    cut = (
                        self.windows.images(pictures[number].padded, [pictures[number].corners[window]], tower)
                        for number, window in part
                    )
                    given = torch.cat(list(cut))
                tokens = torch.stack([pictures[number].patches[window].movedim(0, -1) for number, window in part])
                tokens = tokens.movedim(-1, 1)  # as they lie in memory
                of_pictures = [of_one for number, _ in part if (of_one := images[number]) is not None]
                seen_by = torch.cat(of_pictures) if of_pictures else None
                if crossed is not None:
                    features = torch.stack([crossed[number][window] for number, window in part])
                    seen_by = F.normalize(method.image(tokens).float(), dim=-1) if own else seen_by
                elif own:
                    dense, image = method.dense_and_image(tokens, given)
                    features, seen_by = F.normalize(dense.float(), dim=1), F.normalize(image.float(), dim=-1)
                else:
                    features = rule.look(method, tokens, given)
                for place, each in enumerate(lists):
                    logits = rule.window(features, seen_by, each.text, each.known)
                    if post == "resclip":
                        assert given is not None
                        features_again = self._fed_back(tokens, given, logits)
                        logits = rule.window(features_again, seen_by, each.text, each.known)
                    for (number, _), of_window in zip(part, logits, strict=True):
                        parts[number][place].append(of_window)
        return parts

    def _across(self, seen: Seen) -> Tensor:
        """The normalized patch embeddings of a picture's windows, [W, C, gh, gw], with attention across them."""
        batches = torch.stack(seen.patches).split(self._batch(seen.size, 0))
        return F.normalize(across.across_windows(self._method, batches).float(), dim=1)

    def _fed_back(self, patches: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """The normalized patch embeddings of windows in a second pass, after one that gave these logits."""
        method, constants = self._method, self.protocol.tuned("resclip", feedback.DEFAULTS)
        labels = feedback.patch_labels(
            method.ops, logits, images, self.tower.patch_size, self.logit_scale, constants["confidence"]
        )
        again = feedback.fed_back(method, patches, feedback.agreement(labels), constants)
        return F.normalize(again.float(), dim=1)

    def _averaged(self, logits: Tensor, seen: Seen, text: Tensor, post: str) -> Tensor:
        """The logits [K, h, w] in every pixel that is seen from those in the windows' patches, [W, K, gh, gw].

        The size is that of the resized picture, of its patches where the rule goes to pixels at once, of the picture as
        given where PAMR refined it there, or of the cells that PEARL's propagation works on.
        """
        if not logits.isfinite().all():
            raise ValueError(
                "the model's features of this picture are not finite: its weights are damaged, or overflow "
                f"in {str(self.tower.weight.dtype).removeprefix('torch.')} (try another precision)"
            )
        ops, x, rgb, (top, left) = self._method.ops, seen.x, seen.rgb, seen.margin
        (height, width), shape = x.shape[1:], (seen.padded.shape[1], seen.padded.shape[2])
        if self._rule.at_once and len(seen.corners) == 1 and shape == (height, width):
            averaged = logits[0]
        else:
            whole = ops.average_windows(logits, seen.corners, seen.size, shape)
            averaged = whole[:, top : top + height, left : left + width]
        averaged = self._rule.picture(averaged)
        if post in ("none", "resclip"):
            return averaged
        given = self.windows.seen(rgb.height, rgb.width)[2:]
        if post == "pearl":
            return propagate(averaged, x, text, given, self.protocol.tuned("pearl", {"cells": GRID})["cells"])
        refined = given if self.protocol.refined == "given" else (height, width)
        x, averaged = (
            F.interpolate(planes[None], size=refined, mode="bilinear", align_corners=False)[0]
            for planes in (x, averaged)
        )
        return ops.pamr(x[None], averaged[None])[0]

    def _labels(
        self,
        logits: Tensor,
        seen: Seen,
        named: ClassNames,
        class_of_name: Tensor,
        threshold: float | None,
    ) -> np.ndarray:
        """Labels [H, W] from logits [K, h, w]."""
        ops, rgb = self._method.ops, seen.rgb
        top, left, height, width = self.windows.seen(rgb.height, rgb.width)
        part = slice(top, top + height), slice(left, left + width)
        titles = list(map(title, named))
        dtype: np.dtype[np.unsignedinteger] = np.dtype(np.uint8) if len(named) < 256 else np.dtype(np.uint16)
        nothing = np.iinfo(dtype).max
        below = titles.index("background") if "background" in titles else nothing
        found = self._rule.labels(ops, logits, (height, width), self.logit_scale, class_of_name, threshold)
        if seen.whole is not None and self._rule.regional:
            found = self._rule.regions(self._method, seen.whole, found)
        labels = np.full((rgb.height, rgb.width), nothing, dtype)
        labels[part] = np.where((found < 0).cpu(), below, found.cpu())
        return labels

    def _probabilities(
        self, logits: Tensor, seen: Seen, classes: int, class_of_name: Tensor, labels: np.ndarray, keep: bool
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Probabilities [C, H, W] if they are kept, and the mean one of each class where it is found [C].

        One band of rows at a time. Rules change labels, not probabilities.
        """
        top, left, height, width = self.windows.seen(seen.rgb.height, seen.rgb.width)
        dense = np.zeros((classes, *labels.shape), np.float32) if keep else None
        sums = np.zeros(classes)
        band = max(1, self.memory_limit // (4 * 4 * len(logits) * width))
        for first in range(0, height, band):
            rows = range(first, min(first + band, height))
            shares = self._method.ops.class_probabilities(
                logits, (height, width), self.logit_scale, class_of_name, classes, rows
            )
            part = slice(top + first, top + rows.stop), slice(left, left + width)
            found = labels[part].astype(np.int64)
            labelled = torch.from_numpy(np.minimum(found, classes - 1)).to(shares.device)
            won = shares.gather(0, labelled[None])[0].cpu().numpy()
            sums += np.bincount(np.minimum(found, classes).ravel(), won.ravel(), classes + 1)[:classes]
            if dense is not None:
                dense[:, part[0], part[1]] = shares.cpu().numpy()
        areas = np.bincount(labels.ravel(), minlength=classes)[:classes]
        return dense, np.divide(sums, areas, out=np.full(classes, np.nan), where=areas > 0)
