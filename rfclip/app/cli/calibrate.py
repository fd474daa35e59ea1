"""`rfclip calibrate`."""

from __future__ import annotations

import shlex
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from rfclip.app.cli import common
from rfclip.config import TINY, Origin, plain_name
from rfclip.files import write_whole

NAMED = 3  # of the arguments that say which they are


def calibrate(
    images: common.Images,
    model: common.Model = TINY,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where to write the settings, in JSON; by default named after the checkpoint."
        ),
    ] = None,
    overwrite: common.Overwrite = False,
) -> None:
    """Find a checkpoint's distraction dimensions from some pictures (a few dozen are enough), for --config."""
    with common.clear_errors():
        found, failed = common.some_images(images)
        common.check_new(out, overwrite)
        from rfclip import __version__
        from rfclip.calibration import calibrate as find_dims
        from rfclip.towers import read_tower
        from rfclip.towers.loading import check_model, find_model

        model, pretrained = find_model(model, pretrained)
        if model != TINY:
            check_model(model, pretrained, refocused=True)
        tags = () if pretrained is None else (pretrained,)
        if out is None:
            out = Path(Origin(plain_name(model), tags).file_name())
            common.check_new(out, overwrite)
        clip, _ = common.load(model, pretrained, device, None, [])
        unfound = len(failed)
        try:
            calibration = find_dims(clip, common.batches(found, failed, read_tower(clip), "calibrating"))
        finally:
            common.print_failed(failed)
        seen = len(found) + unfound - len(failed)
        common.answer(f"{seen} images. {calibration.report()}")
        pictures = ", ".join(images[:NAMED] + ["..."] * (len(images) > NAMED))
        source = f"calibrated on {seen} picture{'s' * (seen > 1)}: {pictures}"
        origin = Origin(plain_name(model), tags, source, date.today().isoformat(), __version__)
        text = calibration.config().to_json(origin)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole({out: lambda part: part.write_text(text, "utf-8")})
        common.say(f"written: {out}")
        command = ["rfclip", "segment", str(found[0][0]), "--classes", "cat, dog, grass", "--model", model]
        command += ["--pretrained", pretrained] if pretrained else []
        common.say(f"to go on: {shlex.join([*command, '--config', str(out)])}")
    raise typer.Exit(1 if failed else 0)
