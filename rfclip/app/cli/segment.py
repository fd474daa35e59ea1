"""`rfclip segment`."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rfclip.app.cli import common
from rfclip.app.sources import special
from rfclip.config import TINY
from rfclip.extras import require
from rfclip.methods import OWN


def segment(
    images: common.Images,
    classes: common.ClassLists,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("rfclip-out"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A model; `rfclip models` lists them. By default OpenAI's ViT-B/16, downloaded once (600 MB), or for "
            f"drawn scenes like the bundled one {TINY}.",
        ),
    ] = None,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    precision: common.Precision = "fp32",
    method: common.MethodName = "rf-clip",
    backend: common.Backend = "auto",
    config: common.Config = None,
    registers: common.Registers = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", "-t", min=0.0, max=1.0, help='Pixels less probable than this get no class, or "background".'
        ),
    ] = None,
    background: Annotated[
        bool | None,
        typer.Option(
            "--background/--no-background",
            help='Add a class "background" of general names (sky, wall, road, ...). By default if there is one class.',
        ),
    ] = None,
    post: common.Post = None,
    across_windows: common.AcrossWindows = False,
    protocol: common.ProtocolName = OWN,
    format: Annotated[
        Literal["png", "parquet"],
        typer.Option(help="png: three files per picture; parquet: run-length masks, many pictures per file."),
    ] = "png",
    stride: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of videos, segment every N-th frame, and label all of them.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="See pictures tile by tile at S times their own size, and write masks as GeoTIFF; 1 by default for "
            "georeferenced and very large pictures, which always go so.",
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Of such pictures, the bands that are red, green and blue, as in 4,3,2."),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option("--range", metavar="LOW,HIGH", help="Of such pictures, the values that are black and white."),
    ] = None,
    engine: common.EngineName = "local",
    workers: common.Workers = None,
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
) -> None:
    """Segment pictures by class names: an indexed mask, an overlay and a JSON file for each.

    A picture may be an https address. A video, or a camera such as camera:0, becomes a labelled video and a JSON file;
    a georeferenced or very large picture a georeferenced mask, a small overlay and a JSON file.
    """
    with common.clear_errors():
        found, failed = common.find_images(images)
        from rfclip.methods import find_method, find_protocol
        from rfclip.segment.classes import parse_lists

        named = parse_lists(classes)
        if len(named) + bool(background) > 255:
            raise ValueError(f"--classes: got {len(named)}; an indexed mask holds at most 255, the background included")
        if threshold is not None and not 0 <= threshold <= 1:  # Typer before 0.25 lets NaN pass
            raise ValueError(f"--threshold {threshold}: expected a probability, from 0 to 1")
        find_method(method)
        find_protocol(protocol, method)
        refocusing, neurons = common.read_config(config), common.read_registers(registers, [method])
        if format == "png":
            found, clashing = common.distinct(found)
            failed += clashing
        else:
            require("--format parquet", "parquet", "pyarrow")
        settings, unfit = special(
            found,
            stride=stride,
            scale=scale,
            bands=bands,
            values=values,
            files=format == "png",
            here=engine == "local",
        )
        found, failed = [each for each in found if str(each[0]) not in dict(unfit)], failed + unfit
        common.check_folder(out)
        from rfclip.app.engines import start

        starting = start(engine, workers, device)
        out.mkdir(parents=True, exist_ok=True)
        done, skipped, rate, mark = 0, 0, _Rate(), uuid.uuid4().hex[:8]
        if found:
            from rfclip.app.writer import Writer, described, plan_files, plan_shards
            from rfclip.segment.job import Job

            default = model is None
            if model is None:
                model, pretrained = _model_for([file for file, _ in found], pretrained)
            more: dict[str, Any] = {"post": post, "protocol": protocol, "registers": neurons}
            more["across_windows"] = across_windows
            job = Job(model, pretrained, refocusing, method, backend, device, precision, **more)
            # What is left once the workers are gone was theirs.
            with swept(out, mark), starting as where, contextlib.ExitStack() as stack:
                common.available(where.here)
                if default and model != TINY:
                    common.say(f"model: {model} with OpenAI's weights; --model takes another")
                with common.loading(model):
                    segmenter = stack.enter_context(job.segmenter(device=where.here))
                given, named = len(named), segmenter.with_background(named, background)
                segmenter.check_names(named)
                if len(named) > given:
                    why = "" if background else "one class would cover every picture, so that "
                    common.say(
                        f'{why}{", ".join(named[-1])} make up a class "background"; --no-background leaves it out'
                    )
                record = described(job, segmenter, named, threshold)
                stale: list[Path] = []
                if format == "png":
                    tasks, skipped, clashing = plan_files(found, out, record, overwrite, settings)
                    failed += clashing
                else:
                    tasks, skipped, stale = plan_shards(found, out, record, overwrite)
                with common.progress() as progress:
                    bar = progress.add_task("segmenting", total=sum(len(task["pictures"]) for task in tasks))
                    part = progress.add_task("", visible=False)

                    def watch(name: str, done: int, total: int | None) -> None:
                        progress.update(part, description=name, completed=done, total=total, visible=done != total)

                    there = partial(Writer, job.elsewhere(), named, record, mark=mark)
                    for result in where.results(
                        lambda: Writer(job, named, record, segmenter, mark, watch), there, tasks
                    ):
                        done += result["done"]
                        failed += map(tuple, result["failed"])
                        rate.add(result["done"] + len(result["failed"]))
                        progress.update(bar, completed=rate.count)
                for path in stale if done else []:
                    path.unlink()
    if as_json:
        reasons = [{"image": image, "reason": reason} for image, reason in failed]
        common.answer_json({"out": str(out), "done": done, "skipped": skipped, "failed": reasons})
        raise typer.Exit(1 if failed else 0)
    common.print_failed(failed)
    counts = [f"{done} segmented into {out}"]
    counts += [f"{skipped} skipped, since results exist (--overwrite replaces them)"] if skipped else []
    counts += [f"{len(failed)} failed"] if failed else []
    counts += [str(rate)] if str(rate) else []
    common.say("; ".join(counts))
    raise typer.Exit(1 if failed else 0)


def _model_for(files: Sequence[Path | str], pretrained: str | None) -> tuple[str, str | None]:
    """The model for pictures if none is given, by the first that can be opened: the bundled one for its own scenes."""
    if pretrained is not None:
        raise ValueError(f"--pretrained {pretrained}: give the --model as well that has these weights")
    from PIL import Image

    from rfclip.tiny.scenes import is_scene
    from rfclip.towers.loading import OPENAI

    for file in files:
        with contextlib.suppress(Exception), Image.open(file) as picture:  # what cannot be read is told later
            if not is_scene(picture):
                break
            return TINY, None
    return OPENAI


@contextlib.contextmanager
def swept(out: Path, mark: str) -> Iterator[None]:
    """Remove what workers that were killed in the middle of a file left of it."""
    try:
        yield
    finally:
        for part in out.rglob(f".{mark}*.part"):
            part.unlink(missing_ok=True)


class _Rate:
    """Pictures per second from the first result on: what comes before is mostly start-up."""

    def __init__(self) -> None:
        self.count = self._first = 0
        self._began = self._now = 0.0

    def add(self, pictures: int) -> None:
        self.count, self._now = self.count + pictures, time.monotonic()
        if not self._first:
            self._first, self._began = pictures, self._now

    def __str__(self) -> str:
        pictures, seconds = self.count - self._first, self._now - self._began
        return f"{pictures / seconds:.2f} pictures per second after the first" if pictures and seconds else ""
