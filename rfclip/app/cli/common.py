"""What the commands share: options, the terminal, and finding pictures."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from rfclip.app.sources import VIDEOS, result_name
from rfclip.config import TINY, BackendName, PostName, PrecisionName, RefocusConfig, RegisterConfig
from rfclip.files import RESULTS, same_name
from rfclip.methods import METHODS

if TYPE_CHECKING:
    import torch

    from rfclip.towers import Tower

PictureT = TypeVar("PictureT", bound=Path | str)

out_console = Console()
console = Console(stderr=True)

Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="Files, folders, or quoted globs; earlier outputs are skipped."),
]
Model = Annotated[str, typer.Option("--model", "-m", help="A model; `rfclip models` lists them.")]
ClassLists = Annotated[
    list[str],
    typer.Option(
        "--classes",
        "-c",
        help='"cat, dog, grass"; with synonyms "cat, kitten; dog"; a file, one class per line; or a list of the '
        "field's: voc21. Several add up.",
    ),
]
Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag for the weights, or a path to safetensors.")]
Device = Annotated[str, typer.Option("--device", "-d", help="Where to run: cpu, cuda, cuda:1, mps.")]
Config = Annotated[Path | None, typer.Option(help="RF-CLIP's settings in JSON, as `rfclip calibrate` writes them.")]
Registers = Annotated[
    Path | None, typer.Option(help="Register neurons in JSON, as `rfclip registers` writes them, for that method.")
]
Precision = Annotated[PrecisionName, typer.Option(help="Of the weights and of the image tower.")]
MethodName = Annotated[
    str, typer.Option("--method", help="One of `rfclip methods`.", autocompletion=lambda: list(METHODS))
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
Backend = Annotated[BackendName, typer.Option(help="See `rfclip info` for what auto chooses.")]
Post = Annotated[
    PostName | None,
    typer.Option(
        "--post",
        help="What happens after a first pass: pamr refines the logits of pixels along the picture's edges; pearl "
        "shares them among neighbours of one colour and meaning; resclip passes again, with attention corrected by the "
        "classes of the first pass. By default what the protocol does.",
    ),
]
AcrossWindows = Annotated[
    bool,
    typer.Option(
        "--across-windows",
        help="Attend across all windows of a picture in the last block, for methods whose last block is "
        "self-attention: the core of GLA-CLIP on CLIP alone, not its published configuration with a DINO.",
    ),
]
ProtocolName = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="How pictures are seen and labels decided: own (as the method's paper does it), common (as RF-CLIP's "
        "does, for all), or a method whose way it is; with a dataset, own:voc21, as it is there.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="local: this process; ray: workers of an existing Ray cluster, or of a local Ray."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="With ray: how many workers; by default one per GPU, or per four CPU cores.")
]
Inject = Annotated[
    float,
    typer.Option(
        metavar="P", min=0.0, max=1.0, help="Simulate distraction: over-activate this share of the patch tokens."
    ),
]


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Print what went wrong instead of a traceback if the cause is outside the program, and exit with 2.

    The package's own warnings are printed as well, each once.
    """
    try:
        with _warnings_to(lambda text: console.print(text, highlight=False, soft_wrap=True)):
            yield
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _warnings_to(show: Callable[[str], None]) -> Iterator[None]:
    shown: set[str] = set()

    def line(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if category is UserWarning and str(message) not in shown:
            shown.add(str(message))
            show(f"[yellow]warning:[/] {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = line
        yield


def say(text: str) -> None:
    """Print a line of plain text to the terminal's error stream."""
    console.print(escape(text), highlight=False, soft_wrap=True)


def answer(text: str) -> None:
    """Print a line of plain text to standard output."""
    out_console.print(escape(text), highlight=False, soft_wrap=True)


def answer_json(value: object) -> None:
    """Print a JSON value to standard output."""
    out_console.print_json(json.dumps(value, ensure_ascii=False), highlight=False)


def check_new(out: Path | None, overwrite: bool) -> None:
    """Refuse a file that exists or cannot be made."""
    if out is not None and (out.is_dir() or (out.parent.exists() and not out.parent.is_dir())):
        raise ValueError(f"--out {out}: expected a file in a folder")
    if out is not None and out.exists() and not overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it")


def check_folder(out: Path) -> None:
    """Refuse a folder whose place a file has taken."""
    there = next((path for path in (out, *out.absolute().parents) if path.exists()), None)
    if there is None:
        raise ValueError(f"--out {out}: there is no such drive")
    if not there.is_dir():
        raise ValueError(f"--out {out}: expected a folder, but a file of that name exists")


def loading(model: str) -> Status:
    """A spinner while a model is loaded."""
    return console.status(
        f"loading {escape(model)} (its weights are downloaded the first time)" if model != TINY else "loading"
    )


def progress() -> Progress:
    """A progress bar on a terminal, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def find_images(given: list[str]) -> tuple[list[tuple[Path | str, Path]], list[tuple[str, str]]]:
    """Pictures as (file, path of its result below the output folder, without suffix), and what was not found.

    In place of a file there may be an address or a camera, as text.

    What a folder holds beside pictures and earlier outputs is printed, one line per suffix, with the reason.
    """
    found: dict[Path | str, tuple[Path | str, Path]] = {}
    missing = []
    for item in given:
        path, named = Path(item), result_name(item)
        files: Sequence[tuple[Path | str, Path]]
        if named is not None:
            files, reason = [(item, named)], ""
        elif path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.endswith(RESULTS)]
            files = [(file, file.relative_to(path)) for file in _readable(inside, item)]
            reason = "no picture in this folder"
        elif path.exists():
            files, reason = [(path, Path(path.name))], ""
        else:
            names = sorted(glob.glob(item, recursive=True))
            matched = [Path(name) for name in names if os.path.isfile(name) and not name.endswith(RESULTS)]
            files = [(file, Path(file.name)) for file in matched]
            reason = "no such file, and no file matches it as a pattern"
        for file, result in files:
            found.setdefault(file if isinstance(file, str) else file.resolve(), (file, result))
        if not files:
            missing.append((item, reason))
    # Without suffix as far as that is unique, among each other and among those that keep theirs.
    results = [result.with_suffix("") for _, result in found.values()]
    before: list[Path] = []
    while results != before:
        before, counts = results, Counter(map(same_name, results))
        pairs = zip(found.values(), before, strict=True)
        results = [whole if counts[same_name(result)] > 1 else result for (_, whole), result in pairs]
    return [(file, result) for (file, _), result in zip(found.values(), results, strict=True)], missing


def _readable(files: list[Path], folder: str) -> list[Path]:
    """Those of a folder's files that may be pictures; the rest is printed."""
    from rfclip.formats import unread

    readable: list[Path] = []
    skipped: dict[tuple[str, str], list[str]] = {}
    for file in files:
        video = file.suffix.lower() in VIDEOS
        reason = "a video, which `rfclip segment` takes by its own name" if video else unread(file)
        if reason:
            skipped.setdefault((reason, file.suffix.lower()), []).append(file.name)
        else:
            readable.append(file)
    for (reason, suffix), names in skipped.items():
        these = names[0] if len(names) == 1 else f"{len(names)} files {f'*{suffix}' if suffix else 'without a suffix'}"
        say(f"skipped in {folder}: {these}: {reason}")
    return readable


def some_images(given: list[str]) -> tuple[list[tuple[Path, Path]], list[tuple[str, str]]]:
    """As `find_images`, for commands that read files only; ValueError if there is no picture at all."""
    found, missing = find_images(given)
    files = [(file, result) for file, result in found if isinstance(file, Path)]
    missing += [(file, "not a file; only `rfclip segment` takes it") for file, _ in found if isinstance(file, str)]
    if not files:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in missing))
    return files, missing


def distinct(images: Sequence[tuple[PictureT, Path]]) -> tuple[list[tuple[PictureT, Path]], list[tuple[str, str]]]:
    """Pictures whose results have names of their own, and the others, which would overwrite each other, and why."""
    counts = Counter(same_name(result) for _, result in images)
    failed = [
        (str(file), f"another picture's results are called {result} as well: rename one, or give each its own --out")
        for file, result in images
        if counts[same_name(result)] > 1
    ]
    return [(file, result) for file, result in images if counts[same_name(result)] == 1], failed


def print_failed(failed: list[tuple[str, str]]) -> None:
    """Print each picture that failed, and why."""
    for name, reason in failed:
        reason = reason.removeprefix(f"{name} ")
        console.print(f"[bold red]failed:[/] {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True)


def available(name: str) -> torch.device:
    """A torch device.

    Raises:
        ValueError: it is not available.
    """
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not available here ({reason}); try --device cpu") from error
    return device


def read_config(path: Path | None) -> RefocusConfig | None:
    """The settings in a file, if one is given."""
    if path is None:
        return None
    try:
        return RefocusConfig.from_json(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def read_registers(path: Path | None, methods: list[str]) -> RegisterConfig | None:
    """The register neurons in a file, if one is given, for those of the methods that have any."""
    from rfclip.methods import find_method

    if path is None:
        return None
    if not any(find_method(name).registers for name in methods):
        raise ValueError(f"--registers: {', '.join(methods) or 'rf-clip'} takes none; it is for the method registers")
    try:
        return RegisterConfig.from_json(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"--registers {path}: {error}") from error


def batches(
    found: Sequence[tuple[Path, Path]], failed: list[tuple[str, str]], tower: Tower, doing: str, size: int = 16
) -> Iterator[torch.Tensor]:
    """Pictures as a tower was trained on them, so many at a time; those that cannot be read are added to `failed`."""
    from open_clip import image_transform
    from torch import stack

    from rfclip.images import to_rgb

    prepare = image_transform(tower.image_size, is_train=False, mean=tower.image_mean, std=tower.image_std)
    batch = []
    with progress() as shown:
        for path, _ in shown.track(found, description=doing):
            try:
                batch.append(prepare(to_rgb(path)).to(tower.weight.device))
            except (ValueError, OSError) as error:
                failed.append((str(path), str(error)))
            if len(batch) == size:
                yield stack(batch)
                batch = []
    if batch:
        yield stack(batch)


def method_names(given: str) -> list[str]:
    """The methods that --method names: one, several separated by commas, or all."""
    from rfclip.methods import METHODS, find_method

    names = list(METHODS) if given == "all" else [name.strip() for name in given.split(",")]
    for name in names:
        find_method(name)
    return list(dict.fromkeys(names))


def load(
    model: str, pretrained: str | None, device: str, given: RefocusConfig | None, methods: list[str]
) -> tuple[Any, RefocusConfig | None]:
    """A model, and the settings for those of the methods that have any: those given, the model's own, or a preset's."""
    from rfclip.methods import find_method

    configured = [find_method(name).configured for name in methods]
    read = any(configured)
    if given is not None and not read:
        have = "has" if len(methods) == 1 else "have"
        raise ValueError(f"--config: {', '.join(methods)} {have} nothing to configure; leave it out")
    from rfclip.towers import read_tower
    from rfclip.towers.loading import check_model, find_model, load_model

    if read and all(configured) and model != TINY:
        check_model(*find_model(model, pretrained), refocused=True)
    with loading(model):
        clip = load_model(model, pretrained, device=available(device))
    if not read or read_tower(clip).reason:  # such a tower's methods say so themselves
        return clip, None
    return clip, given or clip.refocus_config or RefocusConfig.preset(model, pretrained)
