"""Draw the sprite sheet of `rfclip.scenes` from Noto Color Emoji (Debian: fonts-noto-color-emoji, Apache-2.0).

python tools/make_sprites.py [FONT]
"""

import os
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
from rfclip.scenes import OBJECTS, SPRITE_COLUMNS, SPRITE_SIDE  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
OUT = Path(__file__).parent.parent / "rfclip" / "tiny" / "sprites.png"


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
    part = OUT.with_suffix(".part.png")
    sheet.save(part, optimize=True)
    os.replace(part, OUT)
    print(f"{OUT}: {len(OBJECTS)} sprites, {OUT.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(*sys.argv[1:])
