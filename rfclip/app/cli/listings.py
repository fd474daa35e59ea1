"""`rfclip info`, `rfclip models` and `rfclip methods`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from rfclip import __version__
from rfclip.app.cli import common
from rfclip.config import PRESETS, TINY, plain_name

CAPTION = (
    "side: of the resized picture, the shorter one; window: side and stride of the windows, or the picture as a whole; "
    "scale: of the cosines; cut: the class probability below which a pixel is background, where there is such a class."
)


def info(device: common.Device = "cpu", backend: common.Backend = "auto") -> None:
    """Say what is installed, which backend runs on a device, and why."""
    with common.clear_errors():
        from importlib.metadata import PackageNotFoundError, version
        from platform import platform, python_version

        import torch

        from rfclip.ops import choose
        from rfclip.ops.dispatch import backend as find_backend

        table = Table(show_header=False)
        table.add_row("rfclip", __version__)
        for package in ("torch", "triton", "open_clip_torch"):
            try:
                table.add_row(package, version(package))
            except PackageNotFoundError:
                table.add_row(package, "not installed")
        table.add_row("python", f"{python_version()}, {platform()}")
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        table.add_row("GPUs", ", ".join(gpus) or "none that PyTorch can use")
        chosen = choose(backend, common.available(device), torch.float32)
        table.add_row(f"backend on {device}", f"{chosen.backend}: {chosen.reason}")
        borrowed = find_backend(chosen.backend).borrowed
        table.add_row("operations it takes from the reference", ", ".join(borrowed) or "none")
        common.out_console.print(table)


def models() -> None:
    """List the models that can be refocused, with the tags of their weights."""
    import open_clip

    from rfclip.towers.hugging_face import HUGGING_FACE
    from rfclip.towers.open_clip import can_refocus

    # At 80 columns, names and tags are complete; in a narrower terminal they are folded, not cut off.
    folded = (Column(header, overflow="fold") for header in ("model", "weights"))
    table = Table(*folded, Column("distraction dimensions", max_width=12))
    table.add_row(TINY, "bundled", "known")
    for name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not tags or not can_refocus(name):
            continue
        preset = (plain_name(name), "openai") in PRESETS and "openai" in tags
        table.add_row(name, ", ".join(tags), "known for openai, else calibrate" if preset else "calibrate")
    known = ", ".join(name.removeprefix(HUGGING_FACE) for name, _ in PRESETS if name.startswith(HUGGING_FACE))
    table.add_row(f"{HUGGING_FACE}NAME", f"{known}, other CLIPModels on the hub, or a folder", "known for these two")
    common.out_console.print(table)


def methods(
    on: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Show the protocols that apply to this dataset.")
    ] = None,
) -> None:
    """List the methods: their sources, and how they see a picture, in pixels for a tower trained at 224."""
    with common.clear_errors():
        from rfclip.methods import COMMON, METHODS, Protocol

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
