"""`rfclip models` and `rfclip methods`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from rfclip.app.cli import common
from rfclip.config import TINY, plain_name
from rfclip.presets import PRESETS

CAPTION = (
    "side: of the resized picture, the shorter one; window: side and stride of the windows, or the picture as a whole; "
    "scale: of the cosines; cut: the class probability below which a pixel is background, where there is such a class."
)


def models(as_json: common.Json = False) -> None:
    """List open_clip's models, whether they are refocused, only read, or neither and why, and the tags of weights."""
    import open_clip

    from rfclip.towers import use_of
    from rfclip.towers.hugging_face import HUGGING_FACE

    tags_of = {name: open_clip.list_pretrained_tags_by_model(name) for name in open_clip.list_models()}
    known_for = {name: [tag for tag in tags if (plain_name(name), tag) in PRESETS] for name, tags in tags_of.items()}
    uses = {name: use_of(name) for name in tags_of}
    if as_json:
        heads = ("model", "use", "reason", "weights", "known for")
        rows = [(name, *uses[name], tags_of[name], known_for[name]) for name in tags_of]
        rows = [(TINY, "refocus", "", [], []), *rows]
        common.answer_json([dict(zip(heads, row, strict=True)) for row in rows])
        return
    # At 80 columns, most names and tags are complete; in a narrower terminal they are folded, not cut off.
    reasons = list(dict.fromkeys(reason for _, reason in uses.values() if reason))
    said = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    caption = "\n".join(["Distraction dimensions are known for the weights that say so; else calibrate.", *said])
    folded = (Column(header, overflow="fold") for header in ("model", "weights"))
    table = Table(*folded, Column("use", max_width=11), caption=caption, caption_justify="left")
    table.add_row(TINY, "bundled", "refocus")
    for name, tags in tags_of.items():
        use, reason = uses[name]
        known = "".join(f"; known for {tag}" for tag in known_for[name])
        why = f" ({reasons.index(reason) + 1})" if reason else ""
        table.add_row(name, ", ".join(tags) or "none known", f"{use}{known}{why}")
    known = ", ".join(name.removeprefix(HUGGING_FACE) for name, _ in PRESETS if name.startswith(HUGGING_FACE))
    table.add_row(
        f"{HUGGING_FACE}NAME", f"{known}, other CLIPModels on the hub, or a folder", "refocus; known for those named"
    )
    common.out_console.print(table)


def methods(
    on: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Show the protocols that apply to this dataset.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List the methods: their sources, and how they see a picture, in pixels for a tower trained at 224."""
    with common.clear_errors():
        from dataclasses import asdict

        from rfclip.methods import COMMON, METHODS, Protocol

        if as_json:
            shown = {name: card.protocol for name, card in METHODS.items()} | {COMMON: Protocol()}
            shown = shown if on is None else {name: protocol.on(on) for name, protocol in shown.items()}
            sources = {name: card.source for name, card in METHODS.items()}
            common.answer_json(
                [
                    {"method": name, "source": sources.get(name), "protocol": asdict(protocol)}
                    for name, protocol in shown.items()
                ]
            )
            return
        heads = (Column(head, no_wrap=True) for head in ("method", "side", "window", "scale", "cut"))
        table = Table(*heads, "source, and what else its protocol does", caption=CAPTION, caption_justify="left")
        rows = [(name, card.source, card.protocol) for name, card in METHODS.items()]
        for name, source, protocol in [*rows, (COMMON, "RF-CLIP's protocol, for all methods", Protocol())]:
            p = protocol if on is None else protocol.on(on)
            window = "whole" if p.window is None else f"{p.window} / {p.stride}"
            threshold = "-" if p.threshold is None else f"{p.threshold:g}"
            said = "; ".join(filter(None, (source, p.beyond())))
            table.add_row(name, str(p.short_side), window, f"{p.logit_scale:g}", threshold, said)
        common.out_console.print(table)
