"""The `rfclip` command. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import math
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from rfclip import __version__
from rfclip.config import TINY
from rfclip.files import printable, write_whole

app = typer.Typer(
    help="RF-CLIP: training-free open-vocabulary segmentation with CLIP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console()
console = Console(stderr=True)

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE...", help="Files, folders, or quoted globs; earlier results in them are passed over."
    ),
]
Model = Annotated[str, typer.Option(help="A model; `rfclip models` lists them.")]
Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag for its weights, or a path to safetensors.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
Config = Annotated[Path | None, typer.Option(help="A refocusing config in JSON, as `rfclip calibrate` writes it.")]
MethodName = Annotated[str, typer.Option("--method", help="rf-clip, or another method of `rfclip methods`.")]
Methods = Annotated[
    str | None,
    typer.Option("--method", help="Of `rfclip methods`: one, several by commas, or all; rf-clip if not given."),
]
Backend = Annotated[str, typer.Option(help="auto, eager, reference or triton; `rfclip info` says which auto takes.")]
Pamr = Annotated[bool, typer.Option("--pamr", help="Refine along the picture's edges (PAMR).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
EngineName = Annotated[
    str, typer.Option("--engine", help="local: this process; ray: workers of the Ray cluster there is, or a local Ray.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="ray: how many; else one for each GPU, or for each four CPU cores.")
]

Root = Annotated[Path | None, typer.Option(help="Folder of the benchmarks' data; a wrong one shows the layout.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Score only so many pictures, the first.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Windows at a time in the image tower.")]
Count = Annotated[
    int | None,
    typer.Option(help="scenes: how many for segmentation, and as many for top-1; 300 if not given."),
]
Seed = Annotated[int | None, typer.Option(help="scenes: others for another seed; 0 if not given.")]
Inject = Annotated[
    float,
    typer.Option(
        metavar="P",
        help="Simulate distraction: over-activate this share of the patch tokens. Of the benchmarks, scenes only.",
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the run, below rfclip-runs if not given; a stopped run goes on there. "
        "For scenes, a JSON file for the figures."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"rfclip {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # What the libraries log on a failed download, this command says once and in a sentence.
    logging.disable(logging.ERROR)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Print what went wrong instead of a traceback where the cause is outside the program, and exit with 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _warnings_to(show: Callable[[str], None]) -> Iterator[None]:
    """Print each of the package's own warnings once, as a line."""
    shown: set[str] = set()

    def line(message: Warning | str, category: type[Warning], *rest: object) -> None:
        if category is UserWarning and str(message) not in shown:
            shown.add(str(message))
            show(f"[yellow]warning:[/] {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = line
        yield


def _check_new(out: Path | None, overwrite: bool) -> None:
    if out is not None and (out.is_dir() or (out.parent.exists() and not out.parent.is_dir())):
        raise ValueError(f"--out {out}: expected a file in a folder")
    if out is not None and out.exists() and not overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it")


def _loading(model: str):
    return console.status(
        f"loading {escape(model)} (the first time, its weights are downloaded)" if model != TINY else "loading"
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _find_images(given: list[str]) -> tuple[list[tuple[Path, Path]], list[tuple[str, str]]]:
    """Pictures as (file, path of the result below the output folder, without suffix), and what was not found."""
    from rfclip.outputs import OUTPUTS

    found: dict[Path, tuple[Path, Path]] = {}
    missing = []
    for item in given:
        path = Path(item)
        if path.is_dir():
            pictures = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES)
            inside = [file for file in pictures if file.is_file() and not file.name.endswith(OUTPUTS)]
            files = [(file, file.relative_to(path)) for file in inside]
            reason = "no picture in this folder"
        elif path.exists():
            files, reason = [(path, Path(path.name))], ""
        else:
            names = sorted(glob.glob(item, recursive=True))
            matched = [Path(name) for name in names if os.path.isfile(name) and not name.endswith(OUTPUTS)]
            files = [(file, Path(file.name)) for file in matched]
            reason = "no such file, and no file matches it as a pattern"
        for file, result in files:
            found.setdefault(file.resolve(), (file, result))
        if not files:
            missing.append((item, reason))
    stems = Counter(result.with_suffix("") for _, result in found.values())
    images = []
    for file, result in found.values():
        stem = result.with_suffix("")
        images.append((file, result if stems[stem] > 1 else stem))
    return images, missing


def _check_distinct(images: list[tuple[Path, Path]]) -> None:
    clashing = [str(result) for result, count in Counter(result for _, result in images).items() if count > 1]
    if clashing:
        raise ValueError(
            f"several images would be written as {', '.join(clashing)}; segment their folders one at a time"
        )


def _print_failed(failed: list[tuple[str, str]]) -> None:
    for name, reason in failed:
        reason = reason.removeprefix(f"{name} ")
        console.print(f"[bold red]failed:[/] {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True)


def _device(name: str):
    """A torch device that is there; ValueError otherwise."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not available here ({reason}); try --device cpu") from error
    return device


def _config(path: Path | None):
    from rfclip.config import RefocusConfig

    if path is None:
        return None
    try:
        return RefocusConfig.from_json(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


@app.command()
def segment(
    images: Images,
    classes: Annotated[
        str, typer.Option(help='"cat, dog, grass"; with synonyms "cat, kitten; dog"; or a file of one class a line.')
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("rfclip-out"),
    model: Model = TINY,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    method: MethodName = "rf-clip",
    backend: Backend = "auto",
    config: Config = None,
    threshold: Annotated[
        float | None, typer.Option(help='Pixels less probable than this get no class, or "background".')
    ] = None,
    pamr: Pamr = False,
    format: Annotated[
        str,
        typer.Option(
            help="png: three files a picture; parquet: run-length masks of many a file; --overwrite replaces all."
        ),
    ] = "png",
    engine: EngineName = "local",
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Segment pictures by class names: an indexed mask, an overlay and a JSON file for each."""
    with _clear_errors(), _warnings_to(lambda text: console.print(text, highlight=False, soft_wrap=True)):
        found, failed = _find_images(images)
        from rfclip.engines import start
        from rfclip.methods import find_method
        from rfclip.outputs import Job, Writer, plan_files, plan_shards
        from rfclip.segmenter import parse_classes

        named = parse_classes(classes)
        if len(named) > 255:
            raise ValueError(f"--classes: got {len(named)}; an indexed mask holds at most 255")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"--threshold {threshold}: expected a probability, from 0 to 1")
        if precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"--precision {precision}: expected fp32, bf16 or fp16")
        find_method(method)
        if format not in ("png", "parquet"):
            raise ValueError(f"--format {format}: expected png or parquet")
        if format == "png":
            _check_distinct(found)
        out.mkdir(parents=True, exist_ok=True)
        job = Job(named, model, pretrained, _config(config), method, backend, device, precision, threshold, pamr)
        done, skipped, rate = 0, 0, _Rate()
        if found:
            with start(engine, workers, device) as where:
                _device(where.here)
                with _loading(model):
                    segmenter = job.segmenter(where.here)
                described, stale = job.described(segmenter), []
                if format == "png":
                    tasks, skipped, clashing = plan_files(found, out, overwrite)
                    failed += clashing
                else:
                    tasks, skipped, stale = plan_shards(found, out, described, overwrite)
                with _progress() as progress:
                    bar = progress.add_task("segmenting", total=sum(len(task["pictures"]) for task in tasks))
                    there = partial(Writer, job.elsewhere(), described)
                    for result in where.results(lambda: Writer(job, described, segmenter), there, tasks):
                        done += result["done"]
                        failed += map(tuple, result["failed"])
                        rate.add(result["done"] + len(result["failed"]))
                        progress.update(bar, completed=rate.count)
                for path in stale if done else []:
                    path.unlink()
    _print_failed(failed)
    counts = [f"{done} segmented into {escape(str(out))}"]
    counts += [f"{skipped} left as they were, for results exist (--overwrite replaces them)"] if skipped else []
    counts += [f"{len(failed)} failed"] if failed else []
    counts += [str(rate)] if str(rate) else []
    console.print("; ".join(counts), highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


class _Rate:
    """Pictures a second, from the first result on: what comes before is mostly start."""

    def __init__(self) -> None:
        self.count = self._first = 0
        self._began = self._now = 0.0

    def add(self, pictures: int) -> None:
        self.count, self._now = self.count + pictures, time.monotonic()
        if not self._first:
            self._first, self._began = pictures, self._now

    def __str__(self) -> str:
        pictures, seconds = self.count - self._first, self._now - self._began
        return f"{pictures / seconds:.2f} pictures a second after the first" if pictures and seconds else ""


@app.command()
def calibrate(
    images: Images,
    model: Model = TINY,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the config found, in JSON.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Find a checkpoint's distraction dimensions from some pictures (a few dozen are enough)."""
    with _clear_errors():
        found, missing = _find_images(images)
        _check_new(out, overwrite)
        if not found:
            raise ValueError("; ".join(f"{name}: {reason}" for name, reason in missing))
        from open_clip import image_transform
        from torch import stack

        from rfclip.images import to_rgb
        from rfclip.models import load_model
        from rfclip.plugin import calibrate as find_dims
        from rfclip.tower import read_tower

        with _loading(model):
            clip = load_model(model, pretrained, device=_device(device))
        tower = read_tower(clip)
        prepare = image_transform(tower.image_size, is_train=False, mean=tower.image_mean, std=tower.image_std)
        failed = list(missing)
        seen = 0

        def batches() -> Iterator:
            nonlocal seen
            batch = []
            with _progress() as progress:
                for path, _ in progress.track(found, description="calibrating"):
                    try:
                        batch.append(prepare(to_rgb(path)).to(tower.weight.device))
                        seen += 1
                    except (ValueError, OSError) as error:
                        failed.append((str(path), str(error)))
                    if len(batch) == 16:
                        yield stack(batch)
                        batch = []
            if batch:
                yield stack(batch)

        try:
            calibration = find_dims(clip, batches())
        finally:
            _print_failed(failed)
        out_console.print(f"{seen} images. {calibration.report()}", highlight=False, soft_wrap=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole({out: lambda part: part.write_text(calibration.config().to_json(), "utf-8")})
            console.print(f"written: {escape(str(out))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def explain(
    images: Images,
    points: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="A point to follow, in pixels; may be given again.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help='Blocks to show, from 1: "3,6,9"; four if not given.')] = None,
    classes: Annotated[
        str | None, typer.Option(help=f"As for segment; if not given, those of {TINY}, and none for other models.")
    ] = None,
    model: Model = TINY,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    config: Config = None,
    inject_distraction: Inject = 0.0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("rfclip-explained"),
    overwrite: Overwrite = False,
) -> None:
    """Show what refocusing changes in pictures: PNG figures and an HTML report for each, and a profile over all."""
    with _clear_errors(), _warnings_to(lambda text: console.print(text, highlight=False, soft_wrap=True)):
        found, failed = _find_images(images)
        if not found:
            raise ValueError("; ".join(f"{name}: {reason}" for name, reason in failed))
        _check_distinct(found)
        try:
            places = [tuple(map(float, point.split(","))) for point in points or ()]
            numbers = None if layers is None else [int(number) for number in layers.split(",")]
        except ValueError as error:
            raise ValueError(f"expected --points X,Y and --layers N,N,...: {error}") from error
        if any(len(place) != 2 for place in places):
            raise ValueError(f"--points {' '.join(points or ())}: expected X,Y")
        if not next(path for path in (out, *out.absolute().parents) if path.exists()).is_dir():
            raise ValueError(f"--out {out}: expected a folder, and there is a file of this name")
        from rfclip import evaluate, explanation, figures
        from rfclip.models import load_tokenizer

        figured = [out / "profile.png"] + [
            file for file, _ in found if file.stem in figures.CAPTIONS and (file.parent / "report.html").exists()
        ]
        earlier = {file.resolve() for file in figured}
        found = [(file, result) for file, result in found if file.resolve() not in earlier]
        clip, refocusing = _load(model, pretrained, device, config)
        refocusing = evaluate.injected(refocusing) if inject_distraction else refocusing
        classes = classes or clip.trained_on
        profiles, done = [], []
        with _progress() as progress:
            for file, result in progress.track(found, description="explaining"):
                folder = out / result
                try:
                    _check_new(folder / "report.html", overwrite)
                    with evaluate.inject_distraction(clip, inject_distraction):
                        seen = explanation.explain(
                            clip,
                            file,
                            refocusing,
                            points=places or None,
                            layers=numbers,
                            classes=classes,
                            backend=backend,
                            tokenizer=load_tokenizer(model),
                        )
                    pictures = {name: figures.png(figure) for name, figure in figures.draw(seen).items()}
                    facts = {
                        "model": model,
                        "weights": pretrained or "its own",
                        "injected distraction": inject_distraction,
                    }
                    page = figures.report(seen, pictures, printable(file.name), facts)
                    folder.mkdir(parents=True, exist_ok=True)
                    saves = {folder / f"{name}.png": partial(_write_bytes, data) for name, data in pictures.items()}
                    write_whole(saves | {folder / "report.html": partial(_write_bytes, page.encode())})
                except (ValueError, OSError) as error:
                    failed.append((str(file), str(error)))
                    continue
                profiles.append(seen.before.profile)
                done.append(folder)
        if len(done) > 1:
            mean = figures.png(figures.draw_profile(sum(profiles) / len(profiles), refocusing.distraction_dims))
            try:
                _check_new(out / "profile.png", overwrite)
                write_whole({out / "profile.png": partial(_write_bytes, mean)})
            except (ValueError, OSError) as error:
                failed.append((str(out / "profile.png"), str(error)))
    _print_failed(failed)
    for folder in done:
        console.print(f"written: {escape(str(folder / 'report.html'))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    model: Model = TINY,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    config: Config = None,
) -> None:
    """Serve a page to try it in the browser, until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes, too
    with _clear_errors(), tempfile.TemporaryDirectory(prefix="rfclip-") as folder:
        # Before Gradio is imported, which then makes the folder; what lies in it already, Gradio does not copy.
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "gradio")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            from rfclip import serve as page
        except ImportError as error:
            raise ValueError('the page needs gradio: pip install "rfclip[serve]"') from error
        from rfclip.models import check_model, open_clip_name

        _device(device)
        name = open_clip_name(model)
        if name != TINY:
            check_model(name, pretrained)
        choices = page.checkpoints(name, pretrained, _config(config))
        page.serve(
            choices,
            Path(folder),
            host,
            port,
            device,
            backend,
            ready=lambda address: console.print(f"Open {address} ; Ctrl-C stops it.", soft_wrap=True),
        )


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


@app.command()
def info(device: Device = "cpu", backend: Backend = "auto") -> None:
    """Say what is installed, which backend runs on a device, and why."""
    with _clear_errors():
        from importlib.metadata import PackageNotFoundError, version
        from platform import platform, python_version

        import torch

        from rfclip.backends import borrowed, choose

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
        chosen = choose(backend, _device(device), torch.float32)
        table.add_row(f"backend on {device}", f"{chosen.backend}: {chosen.reason}")
        table.add_row("of it in the reference's PyTorch", ", ".join(borrowed(chosen.backend)) or "nothing")
        out_console.print(table)


@app.command()
def models() -> None:
    """List the models that can be refocused, with the tags of their weights."""
    import open_clip

    from rfclip.config import PRESETS
    from rfclip.models import HUGGING_FACE, can_refocus

    # At 80 columns, names and tags are whole; in a narrower terminal they are folded, not cut.
    folded = (Column(header, overflow="fold") for header in ("model", "weights"))
    table = Table(*folded, Column("distraction dimensions", max_width=12))
    table.add_row(TINY, "in the package", "known")
    for name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not tags or not can_refocus(name):
            continue
        preset = (name.removesuffix("-quickgelu"), "openai") in PRESETS and "openai" in tags
        table.add_row(name, ", ".join(tags), "known for openai, else calibrate" if preset else "calibrate")
    known = ", ".join(name.removeprefix(HUGGING_FACE) for name, _ in PRESETS if name.startswith(HUGGING_FACE))
    table.add_row(f"{HUGGING_FACE}NAME", f"{known}, other CLIPModels on the hub, or a folder", "known for these two")
    out_console.print(table)


@app.command()
def methods() -> None:
    """List the methods: where they come from, and how they see a picture, in pixels for a tower trained at 224."""
    from rfclip.methods import METHODS

    table = Table(Column("method", no_wrap=True), "source", "short side", "window", "stride", "scale", "threshold")
    for name, method in METHODS.items():
        p = method.protocol
        sides = (str(side) for side in (p.short_side, p.window, p.stride))
        table.add_row(
            name, method.source, *sides, f"{p.logit_scale:g}", "-" if p.threshold is None else f"{p.threshold:g}"
        )
    out_console.print(table)


@app.command()
def evaluate(
    benchmark: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="scenes, voc21, voc20, context60, context59, coco_stuff, coco_object, cityscapes or ade20k.",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="The eight benchmarks of the paper's table 2, and its row.")
    ] = False,
    root: Root = None,
    limit: Limit = None,
    batch: Batch = None,
    pamr: Pamr = False,
    method: Methods = None,
    count: Count = None,
    seed: Seed = None,
    inject_distraction: Inject = 0.0,
    model: Model = TINY,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    config: Config = None,
    engine: EngineName = "local",
    workers: Workers = None,
    out: RunFolder = None,
    sheet: Annotated[
        Path | None, typer.Option(help="scenes: a PNG file for a contact sheet of what each method makes of two.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a model on a benchmark: mIoU, a table of classes, the confusion matrix and the worst pictures.

    On the scenes, procedural ones that no model was trained on, plain CLIP and the two kk baselines are scored beside
    RF-CLIP.
    """
    with _clear_errors(), _warnings_to(lambda text: console.print(text, highlight=False, soft_wrap=True)):
        if every == (benchmark is not None):
            raise ValueError("give one benchmark's NAME, or --all")
        if benchmark == "scenes":
            _scenes_only(root=root, limit=limit, batch=batch, pamr=pamr, engine=engine != "local", workers=workers)
            _check_new(out, overwrite)
            _check_new(sheet, overwrite)
            names = _method_names(method or "clip,kk,kk-mean,rf-clip")
            from rfclip.config import RefocusConfig
            from rfclip.evaluate import injected

            clip, refocusing = _load(model, pretrained, device, config, names)
            given = injected(refocusing) if inject_distraction else refocusing
            count, seed = 300 if count is None else count, seed or 0
            title = f"{count} scenes, seed {seed}, {model}"
            chosen = _choices(clip, names, given, method == "all")
            _score_scenes(clip, chosen, title, count, seed, inject_distraction, backend, out)
            if sheet is not None:
                from rfclip.evaluate import contact_sheet

                figure = contact_sheet(clip, chosen, seed=seed, inject=inject_distraction, backend=backend)
                sheet.parent.mkdir(parents=True, exist_ok=True)
                write_whole({sheet: lambda part: figure.savefig(part, format="png", dpi=100)})
            if not inject_distraction and refocusing == RefocusConfig(distraction_dims=()):
                out_console.print(
                    "This model has no distraction dimensions: rf-clip equals kk-mean here.", soft_wrap=True
                )
            return
        if sheet is not None:
            raise ValueError("--sheet goes with scenes only")
        names = _method_names(method or "rf-clip")
        # The paper's figures are for OpenAI's weights, all pictures and its own settings.
        comparable = (pretrained or "").lower() == "openai" and not (pamr or limit or config)
        found = _find_benchmarks(None if every else benchmark, root, limit, count, seed, inject_distraction)
        from rfclip.engines import start
        from rfclip.runs import Setup, table_rows

        common = {"backend": backend, "device": device, "batch": batch, "pamr": pamr}
        rows = []
        with start(engine, workers, device) as where:
            clip, refocusing = _load(model, pretrained, where.here, config, names)
            chosen = _choices(clip, names, refocusing, method == "all")
            single = len(found) * len(chosen) == 1
            out = out or Path("rfclip-runs", *([_run_name(benchmark, *chosen)] if single else []))
            for name, options in chosen.items():
                results = []
                for data, pairs in found:
                    setup = Setup(data.name, root, model, pretrained, **options, **common)
                    folder = out if single else out / _run_name(data.name, name)
                    results.append(_score(setup, pairs, folder, clip, where, overwrite))
                rows += table_rows(results, model, name, comparable)
        heads = ("method", "benchmark", "pictures", "mIoU %", "paper %", "difference")
        _print_table(heads, rows, f"{model}, {pretrained or 'its own weights'}", None if single else out / "table2.md")
        out_console.print(f"Written to {out}.", soft_wrap=True, highlight=False)


@app.command()
def ablate(
    ablation: Annotated[str, typer.Argument(metavar="TABLE", help="Of the paper: 1, 4, 5, 6 or 7; or tau or beta.")],
    benchmark: Annotated[str, typer.Argument(metavar="NAME", help="A benchmark, as for `rfclip evaluate`.")] = "scenes",
    root: Root = None,
    limit: Limit = None,
    batch: Batch = None,
    pamr: Pamr = False,
    count: Count = None,
    seed: Seed = None,
    inject_distraction: Inject = 0.0,
    model: Model = TINY,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    config: Config = None,
    engine: EngineName = "local",
    workers: Workers = None,
    out: RunFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """Score the variants of one of the paper's ablations on a benchmark."""
    with _clear_errors(), _warnings_to(lambda text: console.print(text, highlight=False, soft_wrap=True)):
        from rfclip.ablations import variants
        from rfclip.tower import read_tower

        if benchmark == "scenes":
            _scenes_only(root=root, limit=limit, batch=batch, pamr=pamr, engine=engine != "local", workers=workers)
            _check_new(out, overwrite)
            from rfclip.evaluate import injected

            clip, refocusing = _load(model, pretrained, device, config)
            refocusing = injected(refocusing) if inject_distraction else refocusing
            configs = variants(ablation, refocusing, len(read_tower(clip).blocks))
            count, seed = 300 if count is None else count, seed or 0
            title = f"ablation {ablation}, {count} scenes, seed {seed}, {model}"
            chosen = {label: {"config": choice} for label, choice in configs.items()}
            _score_scenes(clip, chosen, title, count, seed, inject_distraction, backend, out)
            return
        ((found, pairs),) = _find_benchmarks(benchmark, root, limit, count, seed, inject_distraction)
        from rfclip.engines import start
        from rfclip.runs import Setup

        out = out or Path("rfclip-runs", f"{benchmark}-ablation-{ablation}")
        common = {"backend": backend, "device": device, "batch": batch, "pamr": pamr}
        rows = []
        with start(engine, workers, device) as where:
            clip, refocusing = _load(model, pretrained, where.here, config)
            configs = variants(ablation, refocusing, len(read_tower(clip).blocks))
            scored = {}  # the full method stands in a table more than once
            for number, (label, choice) in enumerate(configs.items(), 1):
                if choice not in scored:
                    setup = Setup(found.name, root, model, pretrained, choice, **common)
                    scored[choice] = _score(setup, pairs, out / f"variant-{number}", clip, where, overwrite)
                rows.append((label, f"{100 * scored[choice].miou:.1f}"))
        title = f"ablation {ablation}, {found.title}, {len(pairs)} pictures, {model}"
        _print_table(("variant", "mIoU %"), rows, title, out / "ablation.md")
        out_console.print(f"Written to {out}.", soft_wrap=True, highlight=False)


@app.command()
def prepare(
    benchmark: Annotated[str, typer.Argument(metavar="NAME", help="coco_object or context.")],
    root: Annotated[Path, typer.Option(help="Folder of the benchmarks' data.")],
) -> None:
    """Make the label files of COCO-Object from COCO-Stuff's, or of Pascal Context from its annotations."""
    with _clear_errors():
        from rfclip.prepare import PREPARED

        if benchmark not in PREPARED:
            raise ValueError(
                f"benchmark {benchmark!r}: expected {' or '.join(PREPARED)}; the others need no preparation"
            )
        written = []
        with _progress() as progress:
            task = progress.add_task(benchmark, total=None)
            for path in PREPARED[benchmark](root):
                written.append(path)
                progress.update(task, completed=len(written))
        out_console.print(f"{len(written)} files, the last one {written[-1]}", soft_wrap=True, highlight=False)


def _scenes_only(**options: object) -> None:
    for name, given in options.items():
        if given:
            raise ValueError(f"--{name} does not go with scenes")


def _method_names(given: str) -> list[str]:
    """The methods of --method; before a model is loaded."""
    from rfclip.methods import METHODS, find_method

    names = list(METHODS) if given == "all" else [name.strip() for name in given.split(",")]
    for name in names:
        find_method(name)
    return list(dict.fromkeys(names))


def _choices(clip, names: list[str], config, every: bool) -> dict[str, dict]:
    """The options of each method; of all, those that this model cannot have are left out, and that is said."""
    from rfclip.evaluate import choices

    possible, refused = choices(clip, names, config)
    for name, reason in refused.items():
        if not every:
            raise ValueError(reason)
        console.print(f"[yellow]left out:[/] {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True)
    return possible


def _run_name(benchmark: str, method: str) -> str:
    return benchmark if method == "rf-clip" else f"{benchmark}-{method}"


def _load(model: str, pretrained: str | None, device: str, config: Path | None, names: Sequence[str] = ("rf-clip",)):
    """The model, and the config that is given, is the model's own or is its preset's, where a method takes one."""
    from rfclip.config import RefocusConfig
    from rfclip.methods import find_method
    from rfclip.models import load_model

    given, read = _config(config), any(find_method(name).configured for name in names)
    if given is not None and not read:
        raise ValueError(f"--config: nothing to configure in {', '.join(names)}; leave it out")
    with _loading(model):
        clip = load_model(model, pretrained, device=_device(device))
    return clip, (given or clip.refocus_config or RefocusConfig.preset(model, pretrained)) if read else None


def _find_benchmarks(
    name: str | None, root: Path | None, limit: int | None, count: int | None, seed: int | None, inject: float
) -> list[tuple]:
    """The benchmark of that name, or all, each with its pictures and labels; before a model is loaded."""
    from rfclip.benchmarks import BENCHMARKS

    if name is not None and name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}: expected scenes, {', '.join(BENCHMARKS)}")
    for option, given in (
        ("--count", count is not None),
        ("--seed", seed is not None),
        ("--inject-distraction", inject),
    ):
        if given:
            raise ValueError(f"{option} goes with scenes only")
    if root is None:
        raise ValueError("--root DIR is missing: the folder that holds the benchmarks' data")
    chosen = BENCHMARKS.values() if name is None else [BENCHMARKS[name]]
    return [(benchmark, benchmark.pairs(root)[:limit]) for benchmark in chosen]


def _score(setup, pairs: list[tuple[Path, Path]], folder: Path, clip, engine, overwrite: bool):
    """Do a run in a folder, or go on with it, the model being here already; returns the result."""
    from rfclip.runs import Run, Scorer

    with setup.segmenter(clip) as segmenter, _progress() as progress:
        scorer = Scorer(setup, segmenter)
        with Run(folder, setup.settings(segmenter), pairs, setup.root, overwrite=overwrite) as run:
            todo = run.missing()
            bar = progress.add_task(scorer.benchmark.title, total=len(pairs), completed=len(pairs) - len(todo))
            for _ in run.keep(engine.results(lambda: scorer, partial(Scorer, setup.elsewhere()), todo)):
                progress.advance(bar)
            return run.finish(scorer)


def _print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]], title: str, path: Path | None) -> None:
    """On the terminal and, where a path is given, in Markdown."""
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row)
    out_console.print(table)
    if path is not None:
        lines = [f"# {title}", "", *(f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows)), ""]
        write_whole({path: lambda part: part.write_text("\n".join(lines), "utf-8")})


def _score_scenes(
    clip, chosen: dict[str, dict], title: str, count: int, seed: int, inject: float, backend: str, out: Path | None
) -> None:
    from rfclip.evaluate import evaluate_scenes

    if inject:
        title += f"; simulated distraction in {100 * inject:g} % of the patch tokens"
    rows, records = [], []
    with console.status("evaluating"):
        for scores in evaluate_scenes(clip, chosen, count=count, seed=seed, inject=inject, backend=backend):
            figures = {"top1": scores.top1, "miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy}
            rows.append((scores.method, *(f"{100 * figure:.1f}" for figure in figures.values())))
            iou = {name: None if math.isnan(value) else value for name, value in scores.iou.items()}
            records.append({"method": scores.method} | figures | {"iou": iou})
    _print_table(("method", "top-1 %", "mIoU %", "pixel accuracy %"), rows, title, None)
    if out is not None:
        record = {"title": title, "count": count, "seed": seed, "inject_distraction": inject, "rows": records}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole({out: lambda part: part.write_text(json.dumps(record, indent=2) + "\n", "utf-8")})
