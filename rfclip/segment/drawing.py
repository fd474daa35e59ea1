"""Labels in colour: which colour a class has, and how it is laid over a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

ALPHA = 0.6  # opacity of the colours
GRAY: Colour = (128, 128, 128)  # of the class "background"; no other class is gray
PREFERRED = 64  # colours that names are spread over: the more, the fewer names meet, and the more colours are alike
SALT = (122735347).to_bytes(4, "big")  # one that gives the names in the demonstrations colours far apart
VIVID = 60  # between the strongest channel of a colour and its weakest
CONTRAST = 0.8  # of the gray picture below


def class_colours(names: Iterable[str]) -> dict[str, Colour]:
    """A colour for each class by its name, whatever the others, unless an earlier name has taken that colour.

    "background" is gray. Of up to 256 other names, no two have the same colour.
    """
    palette, colours = _palette(), dict[str, Colour]()
    free = set(range(len(palette)))
    for name in names:
        if name == "background":
            colours[name] = GRAY
        elif name not in colours:
            wanted = hashlib.blake2b(name.casefold().encode(), digest_size=8, salt=SALT).digest()[-1] % PREFERRED
            # The next colour that is free, as in a hash table; the others once all of the preferred ones are taken.
            probed = (*range(wanted, PREFERRED), *range(wanted), *range(PREFERRED, len(palette)))
            index = next((i for i in probed if i in free), wanted)
            free.discard(index)
            colours[name] = palette[index]
    return colours


def _palette() -> list[Colour]:
    """256 colours by Glasbey's method, each as unlike black, white and the earlier ones as possible; dull ones last."""
    import colorcet  # slow to import

    colours = [
        (round(255 * red), round(255 * green), round(255 * blue))
        for red, green, blue in colorcet.glasbey_bw_minc_20_minl_30
    ]
    return sorted(colours, key=lambda colour: max(colour) - min(colour) < VIVID)


def as_seen(colour: Colour, alpha: float = ALPHA) -> Colour:
    """What a colour looks like over a gray picture, for a legend."""
    red, green, blue = (round(alpha * channel + (1 - alpha) * gray) for channel, gray in zip(colour, GRAY, strict=True))
    return red, green, blue


def soft_gray(picture: Image.Image) -> Image.Image:
    """The picture without colours and with less contrast, RGB."""
    return picture.convert("L").point([round(128 + CONTRAST * (value - 128)) for value in range(256)]).convert("RGB")


def tinted(
    picture: Image.Image, labels: np.ndarray, colours: Mapping[int, Colour], alpha: float = ALPHA
) -> Image.Image:
    """The picture in gray, and over it the colours of those labels [H, W] that have one.

    Under a colour the gray is as light as GRAY on average, so that a class looks the same in every picture.
    """
    size = int(np.iinfo(labels.dtype).max) + 1
    table, shift = np.zeros((size, 3), np.float32), np.zeros(size, np.float32)
    opacity = np.zeros(size, np.float32)
    gray = np.asarray(soft_gray(picture).convert("L"))
    areas = np.bincount(labels.ravel(), minlength=size)
    lightness = np.bincount(labels.ravel(), gray.ravel(), minlength=size) / np.maximum(areas, 1)
    for label, colour in colours.items():
        table[label], opacity[label], shift[label] = colour, alpha, GRAY[0] - lightness[label]
    result = np.empty((*labels.shape, 3), np.uint8)
    for row, (found, below) in enumerate(zip(labels, gray, strict=True)):  # by rows, to hold no picture of floats
        under = (np.clip(below + shift[found], 0, 255) * (1 - opacity[found]))[:, None]
        result[row] = np.rint(under + table[found] * opacity[found][:, None])
    return Image.fromarray(result)


def outlined(picture: Image.Image, labels: np.ndarray) -> Image.Image:
    """The picture with white lines, edged in black, between its labels [H, W]."""
    line = np.zeros(labels.shape, bool)
    line[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    line[1:] |= labels[1:] != labels[:-1]
    line = _wider(line, min(labels.shape) // 600)
    for colour, where in (("black", _wider(line, 1 + min(labels.shape) // 900)), ("white", line)):
        picture = Image.composite(Image.new("RGB", picture.size, colour), picture, Image.fromarray(where))
    return picture


def _wider(line: np.ndarray, pixels: int) -> np.ndarray:
    """Bool [H, W], grown by that many pixels in all four directions."""
    for _ in range(pixels):
        grown = line.copy()
        grown[1:] |= line[:-1]
        grown[:-1] |= line[1:]
        grown[:, 1:] |= line[:, :-1]
        grown[:, :-1] |= line[:, 1:]
        line = grown
    return line


def marked(picture: Image.Image, right: float, down: float, colour: Colour = (0, 160, 255)) -> Image.Image:
    """A copy with a dot, ringed in white and black, at those shares of its width and height."""
    radius, fine = max(4, min(picture.size) // 50), 4
    side = 2 * radius * fine
    dot = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(dot)
    for margin, fill in ((0, "black"), (side // 16, "white"), (side // 4, colour)):
        draw.ellipse((margin, margin, side - 1 - margin, side - 1 - margin), fill=fill)
    dot = dot.resize((2 * radius, 2 * radius), Image.Resampling.BOX)  # with smooth edges
    copy = picture.convert("RGB")
    copy.paste(dot, (round(right * picture.width) - radius, round(down * picture.height) - radius), dot)
    return copy


def with_legend(picture: Image.Image, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    """The picture, on a canvas at least 240 pixels wide, above rows of colour swatches with their names."""
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
