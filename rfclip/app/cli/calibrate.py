"""`rfclip calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rfclip.app.cli import common
from rfclip.config import TINY
from rfclip.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16  # pictures at a time


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
        from open_clip import image_transform
        from torch import stack

        from rfclip.calibration import calibrate as find_dims
        from rfclip.images import to_rgb
        from rfclip.towers import read_tower
        from rfclip.towers.loading import check_model, find_model

        if model != TINY:
            check_model(*find_model(model, pretrained), refocused=True)
        clip, _ = common.load(model, pretrained, device, None, [])
        tower = read_tower(clip)
        prepare = image_transform(tower.image_size, is_train=False, mean=tower.image_mean, std=tower.image_std)
        seen = 0

        def batches() -> Iterator[Tensor]:
            nonlocal seen
            batch = []
            with common.progress() as progress:
                for path, _ in progress.track(found, description="calibrating"):
                    try:
                        batch.append(prepare(to_rgb(path)).to(tower.weight.device))
                        seen += 1
                    except (ValueError, OSError) as error:
                        failed.append((str(path), str(error)))
                    if len(batch) == BATCH:
                        yield stack(batch)
                        batch = []
            if batch:
                yield stack(batch)

        try:
            calibration = find_dims(clip, batches())
        finally:
            common.print_failed(failed)
        common.answer(f"{seen} images. {calibration.report()}")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole({out: lambda part: part.write_text(calibration.config().to_json(), "utf-8")})
            common.say(f"written: {out}")
    raise typer.Exit(1 if failed else 0)
