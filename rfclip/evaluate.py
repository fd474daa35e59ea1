"""How well a model segments the procedural scenes: zero-shot top-1, mIoU and pixel accuracy of each method."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from rfclip.benchmarks import IGNORED
from rfclip.config import RefocusConfig
from rfclip.methods import find_method
from rfclip.plugin import refocus
from rfclip.scenes import CLASSES, OBJECTS, Scene, make_scene
from rfclip.segmenter import Segmenter, palette
from rfclip.tower import read_tower

# First numbers of the scenes' seeds; training uses another, so none of these was ever trained on.
SEGMENTATION_STREAM, SINGLE_STREAM = 1, 2
INJECTED_DIMS = (5, 37, 70, 101)
SHEET_COLUMNS = 5


@dataclass(frozen=True)
class SceneScores:
    """One method's figures, in [0, 1]; `iou` holds NaN for classes that occur in no label and no prediction."""

    method: str
    top1: float
    iou: dict[str, float]
    pixel_accuracy: float

    @property
    def miou(self) -> float:
        return float(np.nanmean(list(self.iou.values())))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by label (rows) and prediction (columns), int64 [C, C], of arrays of one shape; label 255 is left out."""
    target, found = (torch.from_numpy(array.astype(np.int64)) for array in (labels, predicted))
    return multiclass_confusion_matrix(found, target, classes, ignore_index=IGNORED).numpy()


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """By class, float64 [C], of pixels by label and prediction [C, C]; NaN where a class occurs in neither."""
    hits = np.diag(confusion)
    with np.errstate(invalid="ignore"):
        return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def choices(model: nn.Module, names: Sequence[str], config: RefocusConfig) -> tuple[dict[str, dict], dict[str, str]]:
    """The options of a `Segmenter` for each method that this model can have, and for the others the reason.

    `config` goes to the methods that have one.
    """
    possible, refused = {}, {}
    for name in names:
        options = {"method": name} | ({"config": config} if find_method(name).configured else {})
        try:
            refocus(model, **options).remove()
            possible[name] = options
        except (ValueError, OSError) as error:
            refused[name] = str(error)
    return possible, refused


def injected(config: RefocusConfig) -> RefocusConfig:
    """The config for scenes with injected distraction: its dimensions are those injected."""
    return replace(config, distraction_dims=INJECTED_DIMS)


def evaluate_scenes(
    model: nn.Module,
    choices: Mapping[str, Mapping[str, object]],
    *,
    count: int = 300,
    seed: int = 0,
    inject: float = 0.0,
    backend: str = "auto",
) -> Iterator[SceneScores]:
    """Score each choice on `count` scenes for segmentation and as many single-object scenes for top-1.

    Args:
        model: a CLIP that is not refocused.
        choices: by label, `Segmenter`'s options. Where distraction is injected, its dimensions are `INJECTED_DIMS`.
        count: scenes of each kind.
        seed: other scenes for another seed.
        inject: the share of patch tokens that are over-activated in mid-network, see `inject_distraction`.
        backend: as for `rfclip.refocus`.

    Raises:
        ValueError: count is not positive, or inject is not in [0, 1].
    """
    if count < 1:
        raise ValueError(f"count={count}: expected at least one scene")
    scenes = [make_scene((SEGMENTATION_STREAM, seed, number)) for number in range(count)]
    singles = [
        make_scene((SINGLE_STREAM, seed, number), 112, objects=(1, 1), object_size=(40, 100)) for number in range(count)
    ]
    scored: dict[frozenset, SceneScores] = {}  # the full method stands in a table more than once
    with inject_distraction(model, inject):
        for label, choice in choices.items():
            same = frozenset(choice.items())
            if same not in scored:
                with Segmenter(model, **choice, backend=backend) as segmenter:
                    confusion = _confusion(segmenter, scenes)
                    top1 = _top1(segmenter, singles)
                iou = dict(zip(CLASSES, intersection_over_union(confusion).tolist(), strict=True))
                scored[same] = SceneScores(label, top1, iou, np.trace(confusion) / confusion.sum())
            yield replace(scored[same], method=label)


def contact_sheet(
    model: nn.Module,
    choices: Mapping[str, Mapping[str, object]],
    *,
    numbers: Sequence[int] = (0, 1),
    seed: int = 0,
    inject: float = 0.0,
    backend: str = "auto",
) -> Figure:
    """Some scenes, their labels, and what each choice makes of them, with the mIoU on that scene alone.

    Arguments are those of `evaluate_scenes`, `numbers` those of the scenes. Each class of a scene has a colour; pixels
    that are taken for a class that is not there are black.
    """
    rows = math.ceil((2 + len(choices)) / SHEET_COLUMNS)
    size = (2 * SHEET_COLUMNS, 2.2 * rows * len(numbers))
    figure = Figure(figsize=size, layout="constrained")
    scenes = [make_scene((SEGMENTATION_STREAM, seed, number)) for number in numbers]
    found = {}
    with inject_distraction(model, inject):
        for label, choice in choices.items():
            with Segmenter(model, **choice, backend=backend) as segmenter:
                found[label] = [segmenter(scene.image, CLASSES).labels for scene in scenes]
    for number, part in enumerate(np.atleast_1d(figure.subfigures(len(scenes)))):
        scene = scenes[number]
        cells = {"picture": scene.image, "labels": _coloured(scene.labels, scene)}
        for label, labels in found.items():
            iou = intersection_over_union(confusion_matrix(scene.labels, labels[number], len(CLASSES)))
            cells[f"{label}: {100 * np.nanmean(iou):.0f} %"] = _coloured(labels[number], scene)
        axes = part.subplots(rows, SHEET_COLUMNS, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, (title, pixels) in zip(axes, cells.items(), strict=False):
            axis.imshow(pixels, interpolation="nearest")
            axis.set_title(title, fontsize=9)
        present = scene.present()
        colours = np.array(palette(len(present))) / 255
        patches = [Patch(color=colour, label=CLASSES[c]) for c, colour in zip(present, colours, strict=True)]
        part.legend(handles=[*patches, Patch(color="black", label="not there")], loc="outside lower center", ncols=8)
    return figure


def _coloured(labels: np.ndarray, scene: Scene) -> np.ndarray:
    """The scene in gray, uint8 [S, S, 3], under a colour for each class that is in it, and black for others."""
    present = scene.present()
    colours = np.zeros((len(CLASSES), 3), np.uint8)
    colours[present] = palette(len(present))
    return (0.65 * colours[labels] + 0.35 * scene.image.mean(axis=2, keepdims=True)).astype(np.uint8)


def _confusion(segmenter: Segmenter, scenes: list[Scene]) -> np.ndarray:
    """Pixels by label (rows) and prediction (columns), summed over the scenes."""
    return sum(confusion_matrix(scene.labels, segmenter(scene.image, CLASSES).labels, len(CLASSES)) for scene in scenes)


@torch.inference_mode()
def _top1(segmenter: Segmenter, singles: list[Scene]) -> float:
    """How often the CLS embedding of a scene with one object is nearest to that object's name."""
    tower = read_tower(segmenter.model)
    text = segmenter.text_embeddings(tuple(OBJECTS))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.image_mean, tower.image_std))
    right = 0
    for first in range(0, len(singles), 50):
        scenes = singles[first : first + 50]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 255
        images = F.interpolate(images, size=tower.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        embeddings = tower.encode_image(segmenter.model, ((images - mean) / std).to(tower.weight))
        predicted = (F.normalize(embeddings.float(), dim=-1).cpu() @ text.T).argmax(dim=1)
        truth = [min(scene.present()) for scene in scenes]  # objects come before grounds
        right += (predicted == torch.tensor(truth)).sum().item()
    return right / len(singles)


@contextlib.contextmanager
def inject_distraction(model: nn.Module, share: float, *, strength: float = 40.0, seed: int = 0) -> Iterator[None]:
    """Simulate the paper's phenomenon: over-activate a share of the patch tokens in fixed dimensions in mid-network.

    In the middle block, what the MLP adds to the chosen tokens (the same places in each image of a size) grows in
    `INJECTED_DIMS` by `strength` times the token's standard deviation. A simulation, not something the model does by
    itself.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"inject={share}: expected a share of the patch tokens, from 0 to 1")
    blocks = read_tower(model).blocks
    middle = blocks[len(blocks) // 2 - 1]
    stream: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor]) -> None:
        stream[:] = inputs

    def over_activate(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        tokens = output.shape[1] - 1
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        chosen = 1 + order[: round(share * tokens)].to(output.device)
        before = stream.pop()
        if not len(chosen):
            return output
        spread = (before + output)[:, chosen].std(dim=-1, keepdim=True)
        dims = torch.tensor(INJECTED_DIMS, device=output.device)
        output = output.clone()
        output[:, chosen[:, None], dims] += strength * spread
        return output

    if not share:
        yield
        return
    hooks = middle.ln_2.register_forward_pre_hook(remember), middle.mlp[-1].register_forward_hook(over_activate)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
