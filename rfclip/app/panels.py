"""The maps of an explanation as HTML that wraps to any screen, with words in the page's own colours."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from rfclip.explanation import Explanation
from rfclip.explanation.figures import BLUE, RED, Scale, at_point, token_map

SAME = 1e-3  # of the scale: a smaller difference is not seen
STYLE = """
.panels {display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1em .8em; margin: .6em 0}
.panels figure {margin: 0; display: flex; flex-direction: column; font-size: .875rem; line-height: 1.3}
.panels figcaption {margin-bottom: .3em; flex-grow: 1}
.panels img {width: 100%; border-radius: 3px}
.panels .scale {display: flex; justify-content: space-between; font-size: .8rem; font-variant-numeric: tabular-nums}
.panels .bar {height: .5em; margin-top: .3em; border-radius: 3px}
"""


def maps_of(found: Explanation) -> str:
    """What refocusing finds and moves in each block that has distraction tokens, or else where attention goes."""
    distracting = [layer for layer in found.layers if found.distraction[layer - 1].any()]
    if not distracting:
        said = "No block has distraction tokens, so RF-CLIP moves nothing. This is where the attention goes:"
        received = found.before.received
        scales = ((layer, Scale.attention(received[layer - 1])) for layer in found.layers)
        shown = [
            _panel(f"block {layer}: attention received", scale.over(found, received[layer - 1]), *_key(scale))
            for layer, scale in scales
        ]
        return _section("What RF-CLIP finds", said, shown)
    others = [str(layer) for layer in found.layers if layer not in distracting]
    said = f"Blocks without distraction tokens, where nothing is moved: {', '.join(others)}." if others else ""
    shown = []
    for layer in distracting:
        block = layer - 1
        tokens = token_map(found, found.distraction[block], found.defocused[block])
        key = (RED, RED, BLUE, BLUE), ("distract", "defocused")
        shown.append(_panel(f"block {layer}: distraction tokens, and defocused ones", tokens, *key))
        for title, colours, values, percent in (
            ("Fiedler vector, which parts the tokens", "PiYG", found.fiedler[block], False),
            ("attention taken (red) and given (blue)", "coolwarm_r", found.moved[block], True),
        ):
            scale = Scale.around_zero(colours, values)
            if scale:
                shown.append(_panel(f"block {layer}: {title}", scale.over(found, values), *_key(scale, percent)))
    return _section("What RF-CLIP finds", said, shown)


def attention_of(found: Explanation) -> str:
    """What the first point attends to in each block: before and after refocusing, or once where that is the same."""
    shown, same = [], True
    for layer in found.layers:
        before, after = (view.pointed[layer - 1, 0] for view in found.views)
        scale = Scale.attention(before)
        unchanged = np.abs(before - after).max() < SAME * scale.high
        same &= bool(unchanged)
        for when, values in (("", before),) if unchanged else ((" before", before), (" after", after)):
            shown.append(_panel(f"block {layer}{when}", at_point(found, scale.over(found, values), 0), *_key(scale)))
    said = "Refocusing changes nothing here." if same else "Before refocusing and after, where they differ."
    return _section("What the point attends to", said, shown)


def _section(title: str, said: str, panels: Iterable[str]) -> str:
    return f'<h2>{title}</h2><p>{html.escape(said)}</p><div class="panels">{"".join(panels)}</div>'


def _panel(caption: str, picture: Image.Image, colours: Iterable[Sequence[float]], ends: tuple[str, str]) -> str:
    """A picture above a bar of colours, each RGB from 0 to 1, and what the first and the last of them stand for."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92, subsampling=0)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image = f'<img alt="{html.escape(caption)}" src="{source}">'
    stops = ", ".join(f"rgb({', '.join(f'{100 * channel:.0f}%' for channel in colour)})" for colour in colours)
    bar = f'<div class="bar" style="background: linear-gradient(to right, {stops})"></div>'
    words = "".join(f"<span>{end}</span>" for end in ends)
    key = f'{bar}<div class="scale">{words}</div>'
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{image}{key}</figure>"


def _key(scale: Scale, percent: bool = True) -> tuple[np.ndarray, tuple[str, str]]:
    """The colours of a scale, and the values at its ends."""
    low, high = (f"{100 * end:.2g} %" if percent else f"{end:.2g}" for end in (scale.low, scale.high))
    return scale.mappable().to_rgba(np.linspace(scale.low, scale.high, 9))[:, :3], (low, high)
