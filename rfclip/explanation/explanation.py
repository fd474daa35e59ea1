"""The quantities of the paper's figures 2 to 5 and 7, as arrays: what CLIP attends to before and after refocusing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rfclip.config import PLAIN, RefocusConfig, check_post
from rfclip.images import ImageLike, to_rgb
from rfclip.methods import METHODS, OWN, RF_CLIP, find_protocol
from rfclip.methods.rf_clip import RFCLIP, Observed
from rfclip.ops import operations
from rfclip.ops.numerics import matmul
from rfclip.ops.reference import attention_sets, move_attention
from rfclip.plugin import checked_config, installed
from rfclip.segment.classes import Classes
from rfclip.segment.result import Segmentation
from rfclip.segment.segmenter import Segmenter
from rfclip.towers import Tower, read_tower
from rfclip.towers.preprocess import Preprocess

CHUNK = 64 << 20  # bytes of attention rows, over all heads, that are held at a time

SEGMENTED_BY = {
    "clip": "plain CLIP",
    "kk-mean": "without refocusing (kk-mean)",
    RF_CLIP: "RF-CLIP",
    "released": "the code that RF-CLIP's authors released",
}


@dataclass(frozen=True)
class View:
    """What the blocks of a tower did with one picture; all attention is the mean over heads.

    Attributes:
        weights: [L, N], the largest weight in D_dis (in any dimension if D_dis is empty) of each patch at the input of
            each block, phi of equation 6.
        received: [L, N], the mean attention that each patch receives from the patches; the prefix is among the keys.
        pointed: [L, P, N], the attention that the points' patches pay to the patches.
        attention: [T, T] for each layer requested, the prefix first.
        profile: [d], the mean weight of each dimension over patches and blocks.
    """

    weights: np.ndarray
    received: np.ndarray
    pointed: np.ndarray
    attention: dict[int, np.ndarray]
    profile: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """A picture in a tower before and after refocusing. L blocks, N = gh * gw patches, T = prefix + N tokens; float32.

    Attributes:
        image: the picture as the tower saw it, RGB, resized.
        grid: (gh, gw).
        config: the settings that refocused.
        points: the points requested, as (row, column) on the grid.
        layers: those whose matrices are kept, from 1.
        before, after: the plain and the refocused tower.
        distraction, defocused: bool [L, N], T_dis and the tokens that receive its budget, in the refocused tower.
        fiedler: [L, N], the second eigenvector of the graph cut; NaN in blocks without a cut.
        moved: [L, N], what refocusing adds to `received`: negative where a token gives. The last block moves nothing.
        segmentations: of the original picture by plain CLIP, without refocusing, and by RF-CLIP or the released code;
            empty without classes.
    """

    image: Image.Image
    grid: tuple[int, int]
    config: RefocusConfig
    points: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    before: View
    after: View
    distraction: np.ndarray
    defocused: np.ndarray
    fiedler: np.ndarray
    moved: np.ndarray
    segmentations: dict[str, Segmentation]

    @property
    def views(self) -> tuple[View, View]:
        """Before and after."""
        return self.before, self.after

    @property
    def thresholds(self) -> tuple[float, float | None]:
        """Of `weights`, tau / d, and of `received`, tau_attn / N, if the config has it."""
        return self.config.thresholds(len(self.before.profile), self.grid[0] * self.grid[1])


@torch.inference_mode()
def explain(
    model: nn.Module,
    image: ImageLike,
    config: RefocusConfig | None = None,
    *,
    points: Sequence[tuple[float, float]] | None = None,
    layers: Sequence[int] | None = None,
    classes: Classes | None = None,
    method: str = RF_CLIP,
    protocol: str = OWN,
    post: str | None = None,
    short_side: int | None = None,
    backend: str = "auto",
    memory_limit: int = 1 << 30,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    long_side: int | None = None,
    cache: str | os.PathLike | bool | None = None,
) -> Explanation:
    """Look into a CLIP's image tower, plain and refocused, on one whole picture.

    Args:
        model: as for `rfclip.refocus`, not refocused.
        image: as `rfclip.images.to_rgb` takes it.
        config: as for `rfclip.refocus`.
        points: (x, y) in pixels of the picture, whose attention to follow; None: three on its diagonal.
        layers: numbers of the blocks, from 1, whose attention matrices to keep; None: four evenly spaced ones, the last
            among them, the nearest being replaced by the one that moves most.
        classes: as for `Segmenter`; None: the picture is not segmented.
        method: what segments the picture last, "rf-clip" or "released".
        protocol: by which it is segmented, as `rfclip.methods.find_protocol` takes it.
        post: what happens after a first pass, as for `Segmenter.segment`; None: what the protocol does. All are shown
            with it.
        short_side: of the picture in the tower, in pixels, rounded to patches; None: as the tower was trained.
        backend: as for `rfclip.refocus`.
        memory_limit: the most bytes that the matrices kept may take: 8 T^2 per layer.
        tokenizer, long_side, cache: as for `Segmenter`; they matter only with classes.

    Raises:
        ValueError: a point lies outside the picture, a layer is not in the tower, the matrices would take too much,
            or as `rfclip.refocus`, `to_rgb` and `Segmenter`.
        RuntimeError: the model is already refocused, or in training mode.
    """
    if method not in (RF_CLIP, "released"):
        raise ValueError(f"method={method!r}: expected {RF_CLIP!r} or 'released'; others are not explained")
    check_post(post)
    if post == "resclip":
        raise ValueError(
            "post='resclip': plain CLIP is shown beside, which has no attention that it could correct; expected none, "
            "pamr or pearl"
        )
    tower, rgb = read_tower(model), to_rgb(image)
    tower.check_refocusable("an explanation")
    config = checked_config(model, tower, config)
    tower.check_ready()
    if installed(tower) is not None:
        raise RuntimeError(
            "this model is already refocused: undo that first (handle.remove()); explain refocuses it on its own"
        )
    points = [(rgb.width * f, rgb.height * f) for f in (0.25, 0.5, 0.75)] if points is None else points
    preprocess = Preprocess.of(tower)
    grid = preprocess.grid(rgb, short_side)
    kept = _layers(layers, len(tower.blocks))
    size = 2 * 4 * len(kept) * (grid[0] * grid[1] + tower.prefix) ** 2
    if size > memory_limit:
        raise ValueError(
            f"the attention matrices of {len(kept)} layers at {grid[0]} x {grid[1]} patches take {size >> 20} MiB, "
            f"and memory_limit is {memory_limit >> 20} MiB: ask for fewer layers or a smaller short_side"
        )
    places = tuple(_place(point, rgb, grid) for point in points)
    small = preprocess.resized(rgb, short_side)
    patches = tower.patches(preprocess.normalized(small).to(tower.weight.device)[None])
    rows = [tower.prefix + row * grid[1] + column for row, column in places]

    def watched(what: RefocusConfig) -> _Watched:
        run = _Watched(tower, what, backend, config, rows, kept)
        run.stream(patches)
        return run

    refocused = watched(config)
    if layers is None:
        default, kept = kept, _with_layer(kept, busiest(refocused.found["moved"], refocused.found["distraction"]))
        refocused = refocused if kept == default else watched(config)
    plain = watched(PLAIN)
    segmentations = {}
    if classes is not None:
        for name in ("clip", "kk-mean", method):
            with Segmenter(
                model,
                method=name,
                protocol=find_protocol(protocol, name),
                config=config if name == method else None,
                backend=backend,
                cuda_graphs=False,  # for a single picture
                tokenizer=tokenizer,
                long_side=long_side,
                cache=cache,
            ) as segmenter:
                segmentations[name] = segmenter(rgb, classes, post=post)
    found = {name: np.stack(values) for name, values in refocused.found.items()}
    before, after = plain.view(), refocused.view()
    return Explanation(small, grid, config, places, kept, before, after, **found, segmentations=segmentations)


def busiest(moved: Iterable[np.ndarray], distraction: Iterable[np.ndarray]) -> int | None:
    """The number, from 1, of the block that moves the most attention, or else distracts most; None if nothing does."""
    for amounts in ([np.abs(block).sum() for block in moved], [block.sum() for block in distraction]):
        if any(amounts):
            return 1 + int(np.argmax(amounts))
    return None


class _Watched(RFCLIP):
    """RF-CLIP that keeps what an explanation shows of each block."""

    def __init__(
        self,
        tower: Tower,
        config: RefocusConfig,
        backend: str,
        looked_at: RefocusConfig,
        rows: list[int],
        layers: tuple[int, ...],
    ) -> None:
        super().__init__(METHODS[RF_CLIP], tower, config, backend)
        dims = looked_at.distraction_dims or range(tower.width)
        self._dims, self._shifted, self._rows, self._layers = dims, looked_at.shifted, rows, layers
        self._views: list[tuple[np.ndarray, ...]] = []
        self._attention: dict[int, np.ndarray] = {}
        self.found: dict[str, list[np.ndarray]] = {"distraction": [], "defocused": [], "fiedler": [], "moved": []}

    def view(self) -> View:
        """Everything kept, stacked over blocks."""
        weights, received, pointed, profile = (np.stack(values) for values in zip(*self._views, strict=True))
        return View(weights, received, pointed, self._attention, profile.mean(axis=0))

    def observe(self, seen: Observed) -> None:
        number, x, q, k, distraction, fiedler, target = seen
        prefix, T = self.tower.prefix, x.shape[1]
        patches, N = x[:, prefix:], T - prefix
        nobody = torch.zeros(1, T, dtype=torch.bool, device=x.device)
        dis, tgt = nobody, nobody
        if distraction is not None and target is not None:
            dis, tgt = attention_sets(distraction, target, prefix)
        kept = np.empty((T, T), np.float32) if number in self._layers else None
        plain, received = torch.zeros(2, T, dtype=torch.float64, device=x.device)
        pointed = torch.empty(len(self._rows), N)
        step = max(1, CHUNK // (4 * q.shape[1] * T))
        for first in range(0, T, step):
            logits = matmul(q[:, :, first : first + step], k.mT) * q.shape[-1] ** -0.5
            A = logits.softmax(dim=-1)
            moved = move_attention(A, dis, tgt, self.config.beta, prefix, first).mean(dim=(0, 1))
            patch_rows = slice(max(0, prefix - first), None)
            plain += A.mean(dim=(0, 1))[patch_rows].sum(dim=0)
            received += moved[patch_rows].sum(dim=0)
            if kept is not None:
                kept[first : first + step] = moved.cpu()
            for place, row in enumerate(self._rows):
                if first <= row < first + step:
                    pointed[place] = moved[row - first, prefix:].cpu()
        if kept is not None:
            self._attention[number] = kept
        plain, received = plain[prefix:] / N, received[prefix:] / N
        ops = operations("reference")
        weights = ops.distraction_scores(patches, self._dims, shifted=self._shifted)[0]
        profile = ops.dimension_weights(patches, shifted=self._shifted)[0].mean(dim=0)
        self._views.append(tuple(_array(value) for value in (weights, received, pointed, profile)))
        located = nobody[0, prefix:] if distraction is None else distraction[0]
        for name, value in (
            ("distraction", located),
            ("defocused", tgt[0, prefix:]),
            ("fiedler", torch.full_like(plain, torch.nan) if fiedler is None else fiedler[0]),
            ("moved", received - plain),
        ):
            self.found[name].append(_array(value))


def _layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(sorted({max(1, round(count * part / 4)) for part in (1, 2, 3, 4)}))
    beyond = [number for number in layers if not 1 <= number <= count]
    if beyond or not layers:
        raise ValueError(f"layers={list(layers)}: expected numbers from 1 to {count}")
    return tuple(sorted(set(layers)))


def _with_layer(layers: tuple[int, ...], wanted: int | None) -> tuple[int, ...]:
    """The layers with the nearest one, unless it is the last, replaced by the wanted one."""
    if wanted is None or wanted in layers or len(layers) < 2:
        return layers
    nearest = min(layers[:-1], key=lambda layer: abs(layer - wanted))
    return tuple(sorted({*layers, wanted} - {nearest}))


def _place(point: tuple[float, float], rgb: Image.Image, grid: tuple[int, int]) -> tuple[int, int]:
    x, y = point
    if not (0 <= x < rgb.width and 0 <= y < rgb.height):
        raise ValueError(f"point {x:g},{y:g} lies outside the picture of {rgb.width} x {rgb.height} pixels")
    return int(y * grid[0] / rgb.height), int(x * grid[1] / rgb.width)


def _array(value: Tensor) -> np.ndarray:
    return value.cpu().numpy() if value.dtype == torch.bool else value.float().cpu().numpy()
