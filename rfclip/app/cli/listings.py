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
    """List the models that can be refocused, with the tags of their weights."""
    import open_clip

    from rfclip.towers.hugging_face import HUGGING_FACE
    from rfclip.towers.open_clip import can_refocus

    tags_of = {name: open_clip.list_pretrained_tags_by_model(name) for name in open_clip.list_models()}
    tags_of = {name: tags for name, tags in tags_of.items() if tags and can_refocus(name)}
    known_for = {name: [tag for tag in tags if (plain_name(name), tag) in PRESETS] for name, tags in tags_of.items()}
    if as_json:
        listed = [{"model": name, "weights": tags_of[name], "known for": known_for[name]} for name in tags_of]
        common.answer_json([{"model": TINY, "weights": [], "known for": []}, *listed])
        return
    # At 80 columns, names and tags are complete; in a narrower terminal they are folded, not cut off.
    folded = (Column(header, overflow="fold") for header in ("model", "weights"))
    table = Table(*folded, Column("distraction dimensions", max_width=12))
    table.add_row(TINY, "bundled", "known")
    for name, tags in tags_of.items():
        known = ", ".join(known_for[name])
        table.add_row(name, ", ".join(tags), f"known for {known}, else calibrate" if known else "calibrate")
    known = ", ".join(name.removeprefix(HUGGING_FACE) for name, _ in PRESETS if name.startswith(HUGGING_FACE))
    table.add_row(f"{HUGGING_FACE}NAME", f"{known}, other CLIPModels on the hub, or a folder", "known for those named")
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
