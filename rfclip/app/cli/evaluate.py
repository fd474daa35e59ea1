"""`rfclip evaluate`, `rfclip ablate` and `rfclip prepare`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from rfclip.app.cli import common
from rfclip.config import TINY, RefocusConfig, RegisterConfig
from rfclip.datasets import DATASETS
from rfclip.extras import require
from rfclip.files import write_whole
from rfclip.methods import COMMON, OWN, RF_CLIP, find_protocol

if TYPE_CHECKING:
    from torch import nn

    from rfclip.app.engines import Engine
    from rfclip.datasets.base import Dataset, Item
    from rfclip.datasets.names import ClassNames
    from rfclip.scoring.metrics import Scores
    from rfclip.scoring.report import Row
    from rfclip.scoring.run import Scorer
    from rfclip.segment.job import Job

RUNS = Path("rfclip-runs")

Root = Annotated[Path | None, typer.Option(help="Folder of the datasets; a wrong one shows the layout expected.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Score only the first so many pictures.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Windows at a time in the image tower.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"A model; `rfclip models` lists them. Scenes are scored on {TINY} by default."),
]
Count = Annotated[int | None, typer.Option(min=1, help="scenes: how many, 300 by default.")]
ObjectSize = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="MIN MAX", help="scenes: longer sides of the objects, in pixels of 168; 32 76 by default."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="scenes: another seed gives other scenes; 0 by default.")]
Names = Annotated[
    str,
    typer.Option(
        help="What classes are called: official (the field's lists), plain (the dataset's own names), synonyms (some "
        "of the official names replaced), or a file of one class per line. Several, separated by commas, share one "
        "pass through the tower.",
    ),
]
Share = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="--names synonyms: how much of the names that have synonyms is replaced; 0.5 by default."
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        min=1, help="--names synonyms: how many draws, from --seed on, of which the mean and worst show; 5 by default."
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Folder of the run, below rfclip-runs by default; an interrupted run resumes there."
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="One of `rfclip methods`, several separated by commas, or all; by default rf-clip, and on scenes its "
        "baselines as well.",
    ),
]


def evaluate(
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help=f"One of {', '.join(DATASETS)}."),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="The eight of the paper's table 2; with --method released, beside its figures."),
    ] = False,
    root: Root = None,
    limit: Limit = None,
    count: Count = None,
    seed: Seed = None,
    object_size: ObjectSize = None,
    batch: Batch = None,
    post: common.Post = None,
    across_windows: common.AcrossWindows = False,
    method: Methods = None,
    protocol: common.ProtocolName = OWN,
    names: Names = "official",
    share: Share = None,
    seeds: Seeds = None,
    inject_distraction: common.Inject = 0.0,
    model: Model = None,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    backend: common.Backend = "auto",
    config: common.Config = None,
    registers: common.Registers = None,
    engine: common.EngineName = "local",
    workers: common.Workers = None,
    out: RunFolder = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file for a contact sheet of what each method makes of two pictures.")
    ] = None,
    overwrite: common.Overwrite = False,
) -> None:
    """Score a model on a dataset: mIoU, a table of classes, the confusion matrix and the worst pictures."""
    with common.clear_errors():
        if every == (dataset is not None):
            raise ValueError("give one dataset's NAME, or --all")
        if every and sheet is not None:
            raise ValueError("--sheet shows one dataset: give its NAME in place of --all")
        _check_installed("evaluate")
        common.check_new(sheet, overwrite)
        common.check_folder(out or RUNS)
        methods = common.method_names(method) if method else []
        find_protocol(protocol, RF_CLIP)
        given, neurons = common.read_config(config), common.read_registers(registers, methods)
        wanted = list(dict.fromkeys(part.strip() for part in names.split(",")))
        if "synonyms" not in wanted and not share is seeds is None:
            raise ValueError(f"--{'seeds' if share is None else 'share'} goes with --names synonyms")
        of_scenes = None if "synonyms" in wanted and dataset != "scenes" else seed
        opened = _open(None if every else dataset, root=root, count=count, seed=of_scenes, object_size=object_size)
        lists = {data.name: _name_lists(data, wanted, share, seeds, seed or 0) for data in opened}
        methods = methods or list(opened[0].methods)
        items = {data.name: data.items(limit) for data in opened}
        model, pretrained = _model(model, pretrained, opened)
        from rfclip.app.engines import start

        starting = start(engine, workers, device)
        from rfclip.scoring.report import paper_figure, rows_of
        from rfclip.segment.job import Job

        # The paper's figures are for OpenAI's weights, all pictures, and the settings of the authors' code.
        plain = protocol in (OWN, "released") and post in (None, "none") and not across_windows
        plain &= not (limit or config or inject_distraction)
        comparable = (pretrained or "").lower() == "openai" and plain
        rows: list[Row] = []
        with starting as where:
            clip, refocusing = common.load(model, pretrained, where.here, given, methods)
            more: dict[str, Any] = {"batch": batch, "post": post, "inject": inject_distraction, "protocol": protocol}
            more["across_windows"] = across_windows
            shared = Job(model, pretrained, None, RF_CLIP, backend, device, **more)
            own = _injected(refocusing, inject_distraction)
            if inject_distraction:
                from rfclip.simulated_distraction import injected_registers

                neurons = injected_registers(clip, neurons)
            jobs = dict(_possible(clip, shared, methods, own, neurons, method == "all"))
            single = len(opened) * len(jobs) == 1
            marks = _marks(protocol, names) + "-across-windows" * across_windows
            out = out or RUNS.joinpath(*([_run_name(opened[0].name, *jobs) + marks] if single else []))
            for name, job in jobs.items():
                for data in opened:
                    folder = out if single else out / (_run_name(data.name, name) + marks)
                    scores = _score(job, data, items[data.name], folder, clip, where, overwrite, lists[data.name])
                    rows += rows_of(name, data.title, scores, paper_figure(data, model, name, comparable))
            if sheet is not None:
                _draw_sheet(sheet, opened[0], items[opened[0].name], jobs, clip, where, lists[opened[0].name])
        title = f"{model}, {pretrained or 'its own weights'}{_with_distraction(inject_distraction)}"
        title += f"; {_about(protocol)}; names: {names}" + "; attention across windows" * across_windows
        _print_table("method", rows, title, out / ("table.md" if single else f"table{marks}.md"))
        common.answer(f"Written to {out}.")
        if not inject_distraction and refocusing == RefocusConfig(distraction_dims=()):
            common.answer("This model has no distraction dimensions: rf-clip equals kk-mean here.")


def ablate(
    ablation: Annotated[str, typer.Argument(metavar="TABLE", help="Of the paper: 1, 4, 5, 6 or 7; or tau or beta.")],
    dataset: Annotated[str, typer.Argument(metavar="NAME", help="A dataset, as for `rfclip evaluate`.")] = "scenes",
    root: Root = None,
    limit: Limit = None,
    count: Count = None,
    seed: Seed = None,
    object_size: ObjectSize = None,
    batch: Batch = None,
    post: common.Post = None,
    inject_distraction: common.Inject = 0.0,
    model: Model = None,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    backend: common.Backend = "auto",
    config: common.Config = None,
    engine: common.EngineName = "local",
    workers: common.Workers = None,
    out: RunFolder = None,
    overwrite: common.Overwrite = False,
) -> None:
    """Score the variants of one of the paper's ablations on a dataset."""
    with common.clear_errors():
        from rfclip.scoring.ablations import check_ablation, variants

        check_ablation(ablation)
        _check_installed("ablate")
        common.check_folder(out or RUNS)
        given = common.read_config(config)
        (opened,) = _open(dataset, root=root, count=count, seed=seed, object_size=object_size)
        items = opened.items(limit)
        model, pretrained = _model(model, pretrained, [opened])
        from rfclip.app.engines import start

        starting = start(engine, workers, device)
        from rfclip.scoring.report import Row
        from rfclip.segment.job import Job
        from rfclip.towers import read_tower

        out = out or RUNS / f"{dataset}-ablation-{ablation}"
        rows: list[Row] = []
        with starting as where:
            clip, refocusing = common.load(model, pretrained, where.here, given, [RF_CLIP])
            refocusing = _injected(refocusing, inject_distraction)
            assert refocusing is not None
            configs = variants(ablation, refocusing, len(read_tower(clip).blocks))
            more: dict[str, Any] = {"batch": batch, "post": post, "inject": inject_distraction}
            shared = Job(model, pretrained, None, RF_CLIP, backend, device, **more)
            scored: dict[RefocusConfig, Scores] = {}  # the full method appears more than once in a table
            for number, (label, choice) in enumerate(configs.items(), 1):
                if choice not in scored:
                    job = replace(shared, config=choice)
                    folder = out / f"variant-{number}"
                    (scored[choice],) = _score(job, opened, items, folder, clip, where, overwrite).values()
                rows.append(Row(label, opened.title, scored[choice]))
        title = f"ablation {ablation}, {model}{_with_distraction(inject_distraction)}"
        _print_table("variant", rows, title, out / "ablation.md")
        common.answer(f"Written to {out}.")


def prepare(
    dataset: Annotated[str, typer.Argument(metavar="NAME", help="coco_object or context.")],
    root: Annotated[Path, typer.Option(help="Folder of the datasets.")],
) -> None:
    """Make the label files of COCO-Object from COCO-Stuff's, or of Pascal Context from its annotations."""
    with common.clear_errors():
        from rfclip.datasets.prepare import PREPARED

        if dataset not in PREPARED:
            raise ValueError(f"dataset {dataset!r}: expected {' or '.join(PREPARED)}; the others need no preparation")
        written = []
        with common.progress() as progress:
            task = progress.add_task(dataset, total=None)
            for path in PREPARED[dataset](root):
                written.append(path)
                progress.update(task, completed=len(written))
        common.answer(f"{len(written)} files, the last one {written[-1]}")


def _check_installed(command: str) -> None:
    require(command, "evaluate", "matplotlib", "torchmetrics", "scipy", "sklearn")


def _open(name: str | None, **options: object) -> list[Dataset]:
    """The dataset of that name or, without one, those of the paper's table 2."""
    from rfclip.datasets import find_dataset, in_paper

    return [find_dataset(each).open(**options) for each in (in_paper() if name is None else [name])]


def _model(given: str | None, pretrained: str | None, opened: list[Dataset]) -> tuple[str, str | None]:
    """The model given and its weights, or the bundled one on scenes.

    Raises:
        ValueError: no model is given for photographs, of which the bundled one knows nothing.
    """
    photographs = [data.name for data in opened if data.name != "scenes"]
    if given is None and photographs:
        raise ValueError(
            f"{', '.join(photographs)}: give a --model that knows photographs, such as --model ViT-B-16-quickgelu "
            f"--pretrained openai. The bundled one knows drawn scenes only; --model {TINY} scores it all the same"
        )
    from rfclip.towers.loading import find_model

    return find_model(given or TINY, pretrained)


def _name_lists(
    dataset: Dataset, wanted: list[str], share: float | None, seeds: int | None, first: int
) -> dict[str, ClassNames]:
    from rfclip.datasets.names import name_lists

    return name_lists(dataset, wanted, 0.5 if share is None else share, range(first, first + (seeds or 5)))


def _about(protocol: str) -> str:
    """A protocol in a title."""
    whose, colon, dataset = protocol.partition(":")
    said = {OWN: "each method by its own protocol", COMMON: "the common protocol, RF-CLIP's"}
    return said.get(whose, f"the protocol of {whose}") + (f" for {dataset}" if colon else "")


def _injected(config: RefocusConfig | None, share: float) -> RefocusConfig | None:
    from rfclip.simulated_distraction import injected

    return injected(config) if config is not None and share else config


def _with_distraction(share: float) -> str:
    return f"; simulated distraction in {100 * share:g} % of the patch tokens" if share else ""


def _possible(
    clip: nn.Module,
    shared: Job,
    names: list[str],
    config: RefocusConfig | None,
    registers: RegisterConfig | None,
    every: bool,
) -> Iterator[tuple[str, Job]]:
    """The job of each method. Of all methods, those that this model cannot have are left out, saying so."""
    from rfclip.methods import find_method

    for name in names:
        card = find_method(name)
        own, neurons = config if card.configured else None, registers if card.registers else None
        job = replace(shared, method=name, config=own, registers=neurons)
        try:
            with job.segmenter(clip):
                pass
        except (ValueError, OSError) as error:
            if not every:
                raise
            text = f"[yellow]left out:[/] {escape(name)}: {escape(str(error))}"
            common.console.print(text, highlight=False, soft_wrap=True)
            continue
        yield name, job


def _marks(protocol: str, names: str) -> str:
    """What a folder's name says of another protocol or other names than the default, so that each run has its own."""
    parts = [protocol.replace(":", "-")] * (protocol != OWN)
    if names != "official":
        parts.append("+".join(Path(part.strip()).stem for part in names.split(",")))
    return "".join(f"-{part}" for part in parts)


def _run_name(dataset: str, method: str) -> str:
    return dataset if method == "rf-clip" else f"{dataset}-{method}"


def _score(
    job: Job,
    dataset: Dataset,
    items: list[Item],
    folder: Path,
    clip: nn.Module,
    engine: Engine,
    overwrite: bool,
    lists: dict[str, ClassNames] | None = None,
) -> dict[str, Scores]:
    """Start a run in a folder, or resume it, with the model loaded already."""
    from rfclip.scoring.report import finish
    from rfclip.scoring.run import Run, Scorer

    with (
        common.progress() as progress,
        Scorer(job, dataset, clip, engine.here, lists) as scorer,
        Run(folder, scorer.settings(), items, overwrite=overwrite) as run,
    ):
        todo = run.missing()
        if len(todo) < len(items):
            common.say(f"{folder}: {len(items) - len(todo)} of {len(items)} pictures were scored earlier")
        bar = progress.add_task(dataset.title, total=len(items), completed=len(items) - len(todo))
        there = partial(Scorer, job.elsewhere(), dataset.elsewhere(), lists=lists)
        for _ in run.keep(engine.results(lambda: scorer, there, todo)):
            progress.advance(bar)
        return finish(run, scorer)


def _draw_sheet(
    path: Path,
    dataset: Dataset,
    items: list[Item],
    jobs: dict[str, Job],
    clip: nn.Module,
    engine: Engine,
    lists: dict[str, ClassNames],
) -> None:
    from rfclip.scoring.run import Scorer
    from rfclip.scoring.sheet import contact_sheet

    def scorers() -> Iterator[tuple[str, Scorer]]:
        for name, job in jobs.items():
            with Scorer(job, dataset, clip, engine.here, lists) as scorer:
                yield name, scorer

    figure = contact_sheet(dataset, items, scorers())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: lambda part: figure.savefig(part, format="png", dpi=100)})


def _print_table(heading: str, rows: list[Row], title: str, path: Path) -> None:
    """On the terminal, and in Markdown."""
    from rfclip.scoring.report import table

    heads, cells = table(rows, heading)
    if len({row.title for row in rows}) == 1:
        title = f"{rows[0].title}, {rows[0].scores.images} pictures, {title}"
    shown = Table(*heads, title=title)
    for row in cells:
        shown.add_row(*row)
    common.out_console.print(shown)
    lines = [f"# {title}", "", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)), ""]
    write_whole({path: lambda part: part.write_text("\n".join(lines), "utf-8")})
