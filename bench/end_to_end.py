"""From photographs to labels: images per second beside a plainly written loop, and how cost grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import open_clip
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

import rfclip
from bench.measure import Times, alternate, in_fresh_process, peak_bytes, slope
from bench.towers import Case, Memory, config_for, pictures, planted, refocused, twin
from rfclip.config import PLAIN

SHORT_SIDE, WINDOW, STRIDE, SCALE = 336, 224, 112, 40.0  # the paper's, and `rfclip.Segmenter`'s for ViT-B/16
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
LARGE = (1024, 2048)


@dataclass(frozen=True)
class Throughput:
    """A line of the report; `ratio` is of seconds, relative to plain open_clip in the same rounds."""

    implementation: str
    images: int
    classes: int
    rounds: int
    seconds: float
    spread: tuple[float, float]
    ratio: float

    @property
    def key(self) -> str:
        return f"end to end, {self.implementation}"

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


@dataclass(frozen=True)
class Growth:
    """How seconds grow with one size, the others fixed: slope 1 is linear; a smaller one has a constant part."""

    what: str
    unit: str
    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    slope: float


def photographs(count: int = len(PHOTOGRAPHS)) -> list[Image.Image]:
    """Photographs that scikit-image ships, with a short side of 336 pixels."""
    found = []
    for name in PHOTOGRAPHS[:count]:
        picture = Image.fromarray(getattr(skimage.data, name)())
        scale = SHORT_SIDE / min(picture.size)
        found.append(picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC))
    return found


def names(count: int) -> list[str]:
    return [f"thing {number}" for number in range(count)]


def segmenter(model: nn.Module, config: rfclip.RefocusConfig, backend: str, **options: int) -> rfclip.Segmenter:
    """A segmenter on a copy that shares the weights, with one prompt a name."""
    prompts = [lambda name: f"a photo of a {name}."]
    return rfclip.Segmenter(twin(model), config=config, backend=backend, templates=prompts, cache=False, **options)


def plain_text(model: nn.Module, classes: list[str]) -> Tensor:
    tokens = open_clip.SimpleTokenizer(context_length=model.context_length)([f"a photo of a {c}." for c in classes])
    return F.normalize(model.encode_text(tokens.to(model.visual.conv1.weight.device)).float(), dim=-1)


def plain_labels(model: nn.Module, text: Tensor, picture: Image.Image) -> np.ndarray:
    """Plain CLIP's patch tokens in sliding windows, as usually written: labels [H, W]."""
    visual, weight = model.visual, model.visual.conv1.weight
    x = TF.to_dtype(TF.pil_to_tensor(picture).to(weight.device), torch.float32, scale=True)
    scale = SHORT_SIDE / min(picture.size)
    height, width = round(picture.height * scale), round(picture.width * scale)
    x = TF.resize(x, [height, width], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    x = TF.normalize(x, list(visual.image_mean), list(visual.image_std))
    corners = [
        (top, left)
        for top in [*range(0, height - WINDOW, STRIDE), height - WINDOW]
        for left in [*range(0, width - WINDOW, STRIDE), width - WINDOW]
    ]
    windows = torch.stack([x[:, top : top + WINDOW, left : left + WINDOW] for top, left in corners])
    read = visual.forward_intermediates(windows.to(weight.dtype), indices=1, normalize_intermediates=True)
    features = torch.einsum("bdhw,dc->bchw", read["image_intermediates"][0], visual.proj)
    cosines = torch.einsum("bchw,kc->bkhw", F.normalize(features.float(), dim=1), text)
    cosines = F.interpolate(cosines, size=(WINDOW, WINDOW), mode="bilinear", align_corners=False)
    total, count = x.new_zeros(len(text), height, width), x.new_zeros(height, width)
    for (top, left), window in zip(corners, cosines, strict=True):
        total[:, top : top + WINDOW, left : left + WINDOW] += window
        count[top : top + WINDOW, left : left + WINDOW] += 1
    logits = F.interpolate((total / count)[None], size=picture.size[::-1], mode="bilinear", align_corners=False)[0]
    return (SCALE * logits).softmax(dim=0).argmax(dim=0).cpu().numpy()


@torch.inference_mode()
def throughput(name: str, quick: bool = False) -> Iterator[Throughput]:
    """Seconds for all photographs, with text embeddings already computed.

    Raises:
        AssertionError: the plain loop disagrees with the segmenter, with all of RF-CLIP turned off, on more than one
            pixel in a hundred, or "auto" with the reference.
    """
    model, photos, classes = planted(name), photographs(1 if quick else len(PHOTOGRAPHS)), names(4 if quick else 21)
    text, config = plain_text(model, classes), config_for(model)
    segmenters = {backend: segmenter(model, config, backend) for backend in ("reference", "auto")}
    found, wanted = (segmenters[backend](photos[0], classes).labels for backend in ("auto", "reference"))
    _check_agreement("auto", found, "the reference", wanted)
    with segmenter(model, PLAIN, "reference") as plain:
        _check_agreement(
            "the plain loop", plain_labels(model, text, photos[0]), "the segmenter", plain(photos[0], classes).labels
        )
    runs: dict[str, Callable[[], object]] = {"open_clip": lambda: [plain_labels(model, text, p) for p in photos]}
    for backend, run in segmenters.items():
        runs[backend] = lambda run=run: [run(photo, classes) for photo in photos]
    rounds = 2 if quick else 5
    found = alternate(runs, rounds)
    for implementation, times in found.items():
        yield Throughput(
            implementation,
            len(photos),
            len(classes),
            rounds,
            times.median,
            times.spread,
            times.median / found["open_clip"].median,
        )


def _check_agreement(what: str, labels: np.ndarray, other: str, wanted: np.ndarray) -> None:
    same = float((labels == wanted).mean())
    assert same > 0.99, f"{what} agrees with {other} on only {100 * same:.1f} % of the pixels"


@torch.inference_mode()
def growth(name: str, quick: bool = False) -> Iterator[Growth]:
    """Cost of the default backend, one size growing at a time."""
    model, rounds = planted(name), 2 if quick else 5
    photo = photographs(1)[0]
    run = segmenter(model, config_for(model), "auto")

    def tower(case: Case) -> Callable[[], object]:
        return refocused(model, pictures(case), "auto")

    batches = (1, 2) if quick else (1, 2, 4, 8)
    areas = ((224, 224), (224, 448)) if quick else ((224, 224), (336, 336), (448, 448), (672, 672))
    sides = (224, 448) if quick else (224, 336, 448, 672)
    counts = (4, 8) if quick else (21, 60, 171)
    pictured = (1, 2) if quick else (1, 2, 4, 8)
    yield _growth("the tower, 224x224", "images in a batch", {b: tower(Case((224, 224), b)) for b in batches}, rounds)
    in_one_piece = {h * w: tower(Case((h, w))) for h, w in areas}
    yield _growth("the tower, in one piece", "pixels", in_one_piece, rounds)

    def square(side: int) -> Callable[[], object]:
        sized, picture = segmenter(model, config_for(model), "auto", short_side=side), photo.resize((side, side))
        return lambda: sized(picture, names(counts[0]))

    by_area = {side**2: square(side) for side in sides}
    yield _growth("segmenting a square photograph in windows of 224", "pixels", by_area, rounds)
    by_classes = {count: lambda count=count: run(photo, names(count)) for count in counts}
    yield _growth("segmenting a 336-pixel photograph", "classes", by_classes, rounds)
    by_images = {count: lambda count=count: [run(photo, names(counts[0])) for _ in range(count)] for count in pictured}
    yield _growth("segmenting 336-pixel photographs", "photographs", by_images, rounds)


def _growth(what: str, unit: str, functions: dict[int, Callable[[], object]], rounds: int) -> Growth:
    times: dict[str, Times] = alternate({str(size): function for size, function in functions.items()}, rounds)
    seconds = tuple(times[str(size)].median for size in functions)
    return Growth(what, unit, tuple(functions), seconds, slope(list(functions), seconds))


def large_memory(name: str, counts: tuple[int, ...] = (1, 171)) -> Iterator[Memory]:
    """Peak memory of segmenting a large picture, in a fresh process for each number of classes."""
    for classes in counts:
        loaded, peak = in_fresh_process(segment_large, name, classes)
        what = f"segmenting {LARGE[0]}x{LARGE[1]} pixels, {classes} class{'es' if classes > 1 else ''}"
        yield Memory(what, "auto", loaded, peak)


def segment_large(name: str, classes: int) -> tuple[int, int]:
    """Peak bytes before and after."""
    model = planted(name)
    run = segmenter(model, config_for(model), "auto")
    run.text_embeddings(tuple(names(classes)))
    loaded = peak_bytes()
    run(np.random.default_rng(0).integers(0, 256, (*LARGE, 3), dtype=np.uint8), names(classes))
    return loaded, peak_bytes()
