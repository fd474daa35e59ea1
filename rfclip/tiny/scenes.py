"""Procedural scenes: emoji cut-outs on textured grounds, with an exact label for every pixel.

The bundled CLIP was trained on such scenes, and `rfclip evaluate scenes` scores on others. A scene is a pure function
of its seed, so only the sprite sheet is stored. The sprites are Noto emoji
(Apache-2.0), drawn by `tools/make_sprites.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Object names and the emoji that draws each; the order is the order of the sprite sheet and of the labels.
OBJECTS = {
    "cat": "🐈",
    "dog": "🐕",
    "horse": "🐎",
    "cow": "🐄",
    "pig": "🐖",
    "sheep": "🐑",
    "elephant": "🐘",
    "giraffe": "🦒",
    "zebra": "🦓",
    "tiger": "🐅",
    "rabbit": "🐇",
    "duck": "🦆",
    "owl": "🦉",
    "penguin": "🐧",
    "parrot": "🦜",
    "flamingo": "🦩",
    "fish": "🐟",
    "shark": "🦈",
    "turtle": "🐢",
    "butterfly": "🦋",
    "octopus": "🐙",
    "crab": "🦀",
    "car": "🚗",
    "bus": "🚌",
    "truck": "🚚",
    "tractor": "🚜",
    "locomotive": "🚂",
    "bicycle": "🚲",
    "helicopter": "🚁",
    "sailboat": "⛵",
    "rocket": "🚀",
    "apple": "🍎",
    "banana": "🍌",
    "pizza": "🍕",
    "burger": "🍔",
    "strawberry": "🍓",
    "watermelon": "🍉",
    "carrot": "🥕",
    "cake": "🎂",
    "donut": "🍩",
    "chair": "🪑",
    "guitar": "🎸",
    "clock": "⏰",
    "book": "📕",
    "balloon": "🎈",
    "backpack": "🎒",
    "tree": "🌳",
    "sunflower": "🌻",
    "cactus": "🌵",
    "mushroom": "🍄",
}
GROUNDS = ("grass", "sky", "water", "sand", "snow", "brick")
CLASSES = (*OBJECTS, *GROUNDS)

MARK = {"Software": "rfclip scene"}  # what a scene's picture and its PNG file say of themselves

SPRITE_SIDE = 96  # pixels: the side of one cell of the sprite sheet
SPRITE_COLUMNS = 10


@dataclass(frozen=True)
class Scene:
    """One scene: `image` uint8 [S, S, 3], `labels` uint8 [S, S] of indices into `CLASSES`."""

    image: np.ndarray
    labels: np.ndarray

    def present(self, least: int = 1) -> list[int]:
        """Classes that cover at least `least` pixels, largest area first."""
        area = np.bincount(self.labels.ravel(), minlength=len(CLASSES))
        return [int(c) for c in np.argsort(-area, kind="stable") if area[c] >= least]

    def picture(self) -> Image.Image:
        """The image as an RGB picture that `is_scene` knows."""
        picture = Image.fromarray(self.image)
        picture.info.update(MARK)
        return picture

    def save(self, path: Path, **options: bool) -> None:
        """Write the picture as a PNG file that `is_scene` knows once opened."""
        info = PngInfo()
        for key, text in MARK.items():
            info.add_text(key, text)
        self.picture().save(path, format="PNG", pnginfo=info, **options)


def is_scene(picture: Image.Image) -> bool:
    """Whether a picture says that it is a scene, which only ours do."""
    return MARK.items() <= picture.info.items()


@functools.cache
def sprites() -> tuple[Image.Image, ...]:
    """The objects' cut-outs as RGBA images, cropped to their opaque part, in the order of `OBJECTS`."""
    with resources.files("rfclip.tiny").joinpath("sprites.png").open("rb") as file:
        sheet = Image.open(file).convert("RGBA")
    cells = []
    for index in range(len(OBJECTS)):
        row, column = divmod(index, SPRITE_COLUMNS)
        left, top = column * SPRITE_SIDE, row * SPRITE_SIDE
        cell = sheet.crop((left, top, left + SPRITE_SIDE, top + SPRITE_SIDE))
        cells.append(cell.crop(cell.getchannel("A").getbbox()))
    return tuple(cells)


def make_scene(
    seed: int | tuple[int, ...],
    size: int = 168,
    *,
    objects: tuple[int, int] = (1, 4),
    object_size: tuple[int, int] = (32, 76),
) -> Scene:
    """Draw the scene of `seed`.

    Args:
        seed: what numpy's `default_rng` takes; equal seeds give equal scenes.
        size: side of the square scene in pixels.
        objects: the smallest and the largest number of cut-outs; the kinds differ within a scene.
        object_size: range in pixels of a cut-out's longer side.

    Raises:
        ValueError: a scene of that size cannot hold its objects.
    """
    if not 0 <= objects[0] <= objects[1] <= len(OBJECTS):
        raise ValueError(f"objects={objects}: expected 0 <= least <= most <= {len(OBJECTS)}")
    if not 1 <= object_size[0] <= object_size[1] <= size:
        raise ValueError(f"object_size={object_size}: expected 1 <= least <= most <= size, and size is {size}")
    rng = np.random.default_rng(seed)
    pixels, labels = _background(rng, size)
    canvas = Image.fromarray(pixels)
    count = int(rng.integers(objects[0], objects[1] + 1))
    taken = np.zeros((size, size), dtype=bool)
    for kind in rng.choice(len(OBJECTS), size=count, replace=False):
        sprite = _pose(sprites()[kind], rng, int(rng.integers(object_size[0], object_size[1] + 1)))
        opaque = np.asarray(sprite.getchannel("A")) >= 128
        height, width = opaque.shape
        left, top = _place(rng, taken, opaque, size)
        canvas.paste(sprite, (left, top), sprite)
        window = np.s_[top : top + height, left : left + width]
        labels[window][opaque] = kind
        taken[window] |= opaque
    gain, shift = rng.uniform(0.85, 1.15), rng.uniform(-12, 12)
    image = np.clip(np.asarray(canvas, dtype=np.float32) * gain + shift, 0, 255).astype(np.uint8)
    return Scene(image, labels)


def _pose(sprite: Image.Image, rng: np.random.Generator, longest: int) -> Image.Image:
    """Flip, turn and scale a cut-out."""
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = sprite.rotate(rng.uniform(-15, 15), resample=Image.Resampling.BILINEAR, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    scale = longest / max(turned.size)
    return turned.resize([max(1, round(side * scale)) for side in turned.size], Image.Resampling.BILINEAR)


def _place(rng: np.random.Generator, taken: np.ndarray, opaque: np.ndarray, size: int) -> tuple[int, int]:
    """The corner, out of eight tries, where the cut-out hides least of the earlier ones."""
    height, width = opaque.shape
    best, least = (0, 0), np.inf
    for _ in range(8):
        left, top = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
        hidden = int(np.count_nonzero(taken[top : top + height, left : left + width] & opaque))
        if hidden < least:
            best, least = (left, top), hidden
        if least == 0:
            break
    return best


def _background(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One ground, or two that meet at a wavy horizon: pixels uint8 [S, S, 3] and labels uint8 [S, S]."""
    upper, lower = rng.choice(len(GROUNDS), size=2, replace=False)
    pixels = _ground(GROUNDS[lower], rng, size)
    labels = np.full((size, size), len(OBJECTS) + lower, dtype=np.uint8)
    if rng.random() < 0.5:
        columns = np.arange(size) / size
        wave = rng.uniform(0, 0.06) * np.sin(2 * np.pi * (rng.uniform(0.5, 2) * columns + rng.random()))
        horizon = (rng.uniform(0.25, 0.75) + rng.uniform(-0.2, 0.2) * (columns - 0.5) + wave) * size
        above = np.arange(size)[:, None] < horizon[None, :]
        pixels[above] = _ground(GROUNDS[upper], rng, size)[above]
        labels[above] = len(OBJECTS) + upper
    return pixels, labels


def _noise(rng: np.random.Generator, size: int, rows: int, columns: int) -> np.ndarray:
    """Smooth noise in about [-1, 1], float32 [S, S], with `rows` x `columns` independent bumps."""
    grid = rng.uniform(-1, 1, size=(max(2, rows), max(2, columns))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def _ground(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """The texture of one ground, uint8 [S, S, 3]."""
    bumps = max(2, size // 28)
    rough = rng.standard_normal((size, size), dtype=np.float32)
    if name == "grass":  # blades: noise that is fine across and long upwards
        shade = 14 * _noise(rng, size, size // 8, size // 2) + 10 * _noise(rng, size, bumps, bumps) + 8 * rough
        base, tint = (72, 138, 48), (0.7, 1.0, 0.5)
    elif name == "sky":  # a gradient with soft clouds
        rows = np.linspace(-1, 1, size, dtype=np.float32)[:, None]
        clouds = np.clip(_noise(rng, size, bumps, bumps // 2) + 0.5 * _noise(rng, size, 2 * bumps, bumps) - 0.3, 0, 1)
        shade = 22 * rows + 70 * clouds
        base, tint = (110, 170, 232), (1.0, 0.7, 0.15)
    elif name == "water":  # ripples: long across, short upwards
        shade = 20 * _noise(rng, size, size // 4, bumps) + 10 * _noise(rng, size, size // 2, 3 * bumps) + 2 * rough
        base, tint = (28, 92, 150), (0.6, 1.0, 1.0)
    elif name == "sand":
        shade = 12 * _noise(rng, size, 2 * bumps, bumps) + 13 * rough
        base, tint = (214, 182, 122), (1.0, 1.0, 0.9)
    elif name == "snow":
        shade = 9 * _noise(rng, size, bumps, bumps) + 3 * rough
        base, tint = (226, 232, 240), (1.0, 0.9, 0.6)
    else:  # brick: courses with joints, every other course shifted by half a brick
        height, width = int(rng.integers(9, 15)), int(rng.integers(20, 32))
        y, x = np.arange(size)[:, None], np.arange(size)[None, :]
        course = (y + int(rng.integers(height))) // height
        along = x + int(rng.integers(width)) + (course % 2) * (width // 2)
        tone = rng.normal(0, 12, size=(size // height + 3, size // width + 4)).astype(np.float32)
        joint = ((y + np.zeros_like(x)) % height < 2) | (along % width < 2)
        shade = np.where(joint, 55, tone[course - course.min(), along // width]) + 5 * rough
        base, tint = (158, 76, 58), (0.9, 1.0, 1.0)
    colour = np.asarray(base, np.float32) + rng.normal(0, 6, size=3).astype(np.float32)
    return np.clip(colour + shade[..., None] * np.asarray(tint, np.float32), 0, 255).astype(np.uint8)
