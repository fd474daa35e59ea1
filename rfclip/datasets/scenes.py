"""Procedural scenes that the bundled CLIP was not trained on; they need no data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from rfclip.datasets.base import Dataset, Item
from rfclip.tiny.scenes import CLASSES, OBJECTS, make_scene

# First numbers of the scenes' seeds; training uses another.
SEGMENTATION_STREAM, SINGLE_STREAM = 1, 2


@dataclass(frozen=True)
class Scenes(Dataset):
    """`count` scenes with labels for every pixel, and as many with a single object, for zero-shot top-1.

    Another `seed` gives other scenes; `object_size` is the range in pixels of the longer sides of the objects in those
    with labels, of 168 x 168 pixels.
    """

    count: int = 300
    seed: int = 0
    object_size: tuple[int, int] = (32, 76)

    name, title, options = "scenes", "Scenes", ("count", "seed", "object_size")
    methods = ("clip", "kk", "kk-mean", "rf-clip")

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count}: expected at least one scene")
        make_scene(0, object_size=self.object_size)  # which checks it

    @property
    def classes(self) -> list[tuple[str, ...]]:
        return [(name,) for name in CLASSES]

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(OBJECTS)

    def items(self, limit: int | None = None) -> list[Item]:
        count = self.count if limit is None else min(limit, self.count)
        scenes = [{"image": f"scene {n}", "seed": [SEGMENTATION_STREAM, self.seed, n]} for n in range(count)]
        singles = [{"image": f"single object {n}", "seed": [SINGLE_STREAM, self.seed, n]} for n in range(count)]
        return [*scenes, *singles]

    def read(self, item: Item) -> tuple[Image.Image, np.ndarray | int]:
        seed = tuple(item["seed"])
        if seed[0] == SEGMENTATION_STREAM:
            scene = make_scene(seed, object_size=self.object_size)
            return scene.picture(), scene.labels
        scene = make_scene(seed, 112, objects=(1, 1), object_size=(40, 100))
        return scene.picture(), min(scene.present())  # objects come before grounds

    def described(self) -> dict[str, object]:
        return super().described() | {"count": self.count, "seed": self.seed, "object_size": list(self.object_size)}
