"""`rfclip calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rfclip.app.cli import common
from rfclip.config import TINY
from rfclip.files import write_whole


def calibrate(
    images: common.Images,
    model: common.Model = TINY,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the settings found, in JSON.")] = None,
    overwrite: common.Overwrite = False,
) -> None:
    """Find a checkpoint's distraction dimensions from some pictures (a few dozen are enough)."""
    with common.clear_errors():
        found, failed = common.some_images(images)
        common.check_new(out, overwrite)
        from rfclip.calibration import calibrate as find_dims
        from rfclip.towers import read_tower

        clip, _ = common.load(model, pretrained, device, None, [])
        unfound = len(failed)
        try:
            calibration = find_dims(clip, common.batches(found, failed, read_tower(clip), "calibrating"))
        finally:
            common.print_failed(failed)
        seen = len(found) + unfound - len(failed)
        common.answer(f"{seen} images. {calibration.report()}")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole({out: lambda part: part.write_text(calibration.config().to_json(), "utf-8")})
            common.say(f"written: {out}")
    raise typer.Exit(1 if failed else 0)
