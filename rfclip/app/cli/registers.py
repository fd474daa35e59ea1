"""`rfclip registers`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rfclip.app.cli import common
from rfclip.config import OUTLIER_NORMS, TINY, RegisterConfig, plain_name
from rfclip.files import write_whole


def registers(
    images: common.Images,
    model: common.Model = TINY,
    pretrained: common.Pretrained = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="The norm over which a token of the last block's output is an outlier; by default the authors' for "
            "this checkpoint, such as 30 for OpenAI's ViT-B/16, or twice the median of each picture."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many neurons to keep, the best.")] = 10,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Look at so many first blocks; by default the first half.")
    ] = None,
    readout: Annotated[
        str, typer.Option(help="The method whose last block makes patch embeddings: kk-mean, clearclip, clip, ...")
    ] = RegisterConfig.readout,
    inject_distraction: common.Inject = 0.0,
    device: common.Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write what is found, in JSON.")] = None,
    overwrite: common.Overwrite = False,
) -> None:
    """Find a checkpoint's register neurons from some pictures, for the method "registers" (a few dozen are enough)."""
    with common.clear_errors():
        found, failed = common.some_images(images)
        common.check_new(out, overwrite)
        RegisterConfig((), threshold)
        from rfclip.methods.registers import check_readout
        from rfclip.registers import find_registers
        from rfclip.simulated_distraction import inject_distraction as injected
        from rfclip.towers import read_tower
        from rfclip.towers.loading import find_model

        check_readout(readout)
        if threshold is None:
            name, tag = find_model(model, pretrained)
            threshold = OUTLIER_NORMS.get((plain_name(name), (tag or "").lower()))
        clip, _ = common.load(model, pretrained, device, None, [])
        try:
            with injected(clip, inject_distraction):
                pictures = common.batches(found, failed, read_tower(clip), "looking", size=4)
                neurons = find_registers(clip, pictures, threshold=threshold, count=count, blocks=blocks)
        finally:
            common.print_failed(failed)
        common.answer(f"{neurons.images} images. {neurons.report()}")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            text = replace(neurons.config, readout=readout).to_json()
            write_whole({out: lambda part: part.write_text(text, "utf-8")})
            common.say(f"written: {out}")
    raise typer.Exit(1 if failed else 0)
