"""Draw the sprite sheet of `rfclip.tiny.scenes` and the demo's scene.

The sprites are Noto Color Emoji (Debian: fonts-noto-color-emoji, Apache-2.0).

python tools/make_sprites.py [FONT]
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
from rfclip.tiny.scenes import OBJECTS, SPRITE_COLUMNS, SPRITE_SIDE, make_scene  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
OUT = Path(__file__).parent.parent / "rfclip" / "tiny"
DEMO_SEED = (3, 195)  # in none of the streams that train or score the model; one whose objects it finds


def main(font_path: str = FONT) -> None:
    font = ImageFont.truetype(font_path, size=109)  # the only size of this bitmap font
    rows = -(-len(OBJECTS) // SPRITE_COLUMNS)
    sheet = Image.new("RGBA", (SPRITE_COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE))
    for index, (name, emoji) in enumerate(OBJECTS.items()):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((10, 10), emoji, font=font, embedded_color=True)
        box = glyph.getbbox()
        if box is None:
            raise SystemExit(f"{font_path} draws nothing for {name} ({emoji})")
        glyph = glyph.crop(box)
        glyph.thumbnail((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)
        row, column = divmod(index, SPRITE_COLUMNS)
        sheet.paste(glyph, (column * SPRITE_SIDE, row * SPRITE_SIDE))
    save(partial(sheet.save, format="PNG"), "sprites.png")
    save(make_scene(DEMO_SEED, 320, objects=(3, 4), object_size=(100, 150)).save, "scene.png")


def save(write: Callable[..., None], name: str) -> None:
    part = OUT / f"{name}.part"
    write(part, optimize=True)
    os.replace(part, OUT / name)
    print(f"{OUT / name}: {(OUT / name).stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(*sys.argv[1:])
