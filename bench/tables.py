"""A run as JSON, Markdown and a plot, and its comparison with an earlier one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bench.end_to_end import Growth, Throughput
from bench.kernels import KernelTime
from bench.roofline import GPUS, Projection, peak_of
from bench.towers import Memory, Part, TowerTime
from rfclip.files import write_whole
from tools.kernel_report.report import table

WORSE = 1.10  # times an earlier ratio is a regression
TRIED = """\
Found on two cores of an AMD EPYC, 2026-11-24. At 224x224 and batch 1, everything but the linear layers (of which plain
CLIP has the last MLP in addition) takes 0.12 of plain CLIP's time, plain attention alone 0.06. Key similarity is one
more product and softmax of that size per block; the cut is some 150 operations of a few microseconds; and the code and
data of every step must be fetched from memory again, since a block's matrices (28 MB) evict them from the caches:
compare the last column. At batch 8 this is paid only once.

What helped: one matrix of attention, ordered by group, below 256 tokens (three flash attentions above); tiles of 2 MB;
plain blocks where nothing distracts; no query in the last block; reading the least value from the sums. What did not:
smaller tiles (key similarity: 1.0 to 1.5 times the time); contiguous keys; linear layers packed for oneDNN (as fast as
MKL's: 140 GFLOP/s of fp32); orthogonalizing the cut's vectors once instead of twice (wrong vectors)."""


@dataclass
class Report:
    """The results of one run."""

    machine: dict[str, object]
    versions: dict[str, str]
    model: str
    how: str
    kernels: list[KernelTime] = field(default_factory=list)
    towers: list[TowerTime] = field(default_factory=list)
    profile: list[Part] = field(default_factory=list)
    methods: list[TowerTime] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    throughput: list[Throughput] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    roofline: list[Projection] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # sections that ended early, and why

    def ratios(self) -> dict[str, float]:
        """Every ratio to plain CLIP; less is better."""
        rows = [*self.towers, *self.methods, *self.memory, *self.throughput]
        return {row.key: row.ratio for row in rows if row.ratio is not None}

    def failures(self) -> list[str]:
        rows = [*self.towers, *self.methods, *self.memory]
        return [*self.broken, *(f"{row.key}: {row.failure}" for row in rows if row.failure)]

    def json(self) -> str:
        return json.dumps(asdict(self) | {"ratios": self.ratios(), "failures": self.failures()}, indent=2) + "\n"

    def markdown(self) -> str:
        gpu = self.machine["gpu"] or "no GPU"
        lines = [
            "# Bench\n",
            f"{self.machine['cpu']}, {self.machine['cores']} cores, {self.machine['threads']} threads, "
            f"{self.machine['ram_gb']} GB, {gpu}; load before the run {self.machine['load_before']}.",
            f"{'; '.join(f'{name} {value}' for name, value in self.versions.items())}; model {self.model}, random "
            "weights.\n",
            f"{self.how}\n",
            *(f"**Failed: {failure}**\n" for failure in self.broken),
        ]
        if self.kernels:
            lines.append(_kernel_table(self.kernels))
        if self.towers:
            lines.append(_tower_table("Towers", self.towers, self.machine["gpu"]))
        if self.profile:
            lines.append(_profile_table(self.profile))
        if self.methods:
            lines.append(_tower_table("Methods", self.methods, self.machine["gpu"]))
        if self.memory:
            lines.append(_memory_table(self.memory))
        if self.throughput:
            lines.append(_throughput_table(self.throughput))
        if self.growth:
            lines.append(_growth_table(self.growth))
        if self.roofline:
            lines.append(_roofline_tables(self.roofline))
        return "\n".join(lines)


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _goal(value: float | None, goal: float | None, form: str = "{:.2f}") -> str:
    if value is None or goal is None:
        return "-"
    return f"at most {form.format(goal)}: {'met' if value <= goal else 'MISSED'}"


def _kernel_table(rows: list[KernelTime]) -> str:
    heads = "operation, sizes, device and dtype | implementation | median ms | over the reference"
    shown = [(row.what, row.implementation, f"{1000 * row.seconds:.3f}", _number(row.ratio)) for row in rows]
    return table("## Single operations: time", heads, shown)


def _tower_table(title: str, rows: list[TowerTime], gpu: object) -> str:
    peak = peak_of(str(gpu)) if gpu else None
    heads = "case | tokens | implementation | median ms | 20 % to 80 % | over plain | goal | error | note"
    shown = []
    for row in rows:
        if row.failure:
            shown.append((row.case, row.tokens, row.implementation, "FAILED", "-", "-", "-", "-", row.failure))
            continue
        note = row.note
        if peak:
            rate = row.operations / row.seconds
            note = f"{rate / 1e12:.1f} TFLOP/s, {rate / peak.flops:.0%} of the peak. {note}"
        spread = " to ".join(f"{1000 * end:.2f}" for end in row.spread)
        goal, error = _goal(row.ratio, row.goal), _number(row.error, "{:.1e}")
        ratio, median = _number(row.ratio), f"{1000 * row.seconds:.2f}"
        shown.append((row.case, row.tokens, row.implementation, median, spread, ratio, goal, error, note))
    return table(f"## {title}: time", heads, shown)


def _profile_table(rows: list[Part]) -> str:
    heads = "case | function | calls | total ms | over plain | total ms of immediate repeats"
    shown = []
    for row in rows:
        warm = "-" if row.warm is None else f"{1000 * row.warm:.2f}"
        shown.append((row.case, row.function, row.calls, f"{1000 * row.seconds:.2f}", f"{row.share:.3f}", warm))
    return table("## Where eager's time goes, in the cases whose goal it missed", heads, shown) + f"\n{TRIED}\n"


def _memory_table(rows: list[Memory]) -> str:
    heads = "case | implementation | MB with the model loaded | peak MB | over plain | goal"
    shown = []
    for row in rows:
        goal = _goal(row.peak / 1e6, row.limit / 1e6, "{:.0f} MB") if row.limit else _goal(row.ratio, row.goal)
        found = ("KILLED", "-", "-", "-") if row.failure else (row.loaded // 10**6, row.peak // 10**6)
        ends = () if row.failure else (_number(row.ratio), goal)
        shown.append((row.case, row.implementation, *found, *ends))
    return table("## Peak memory of a process", heads, shown)


def _throughput_table(rows: list[Throughput]) -> str:
    heads = "implementation | photographs | classes | images a second | seconds | 20 % to 80 % | over open_clip"
    shown = []
    for row in rows:
        spread = " to ".join(f"{end:.2f}" for end in row.spread)
        figures = (f"{figure:.2f}" for figure in (row.images_per_second, row.seconds))
        shown.append((row.implementation, row.images, row.classes, *figures, spread, f"{row.ratio:.2f}"))
    return table("## End to end: photographs of 336 pixels", heads, shown)


def _growth_table(rows: list[Growth]) -> str:
    heads = "what | in | seconds | log-log slope"
    shown = []
    for row in rows:
        points = ", ".join(f"{size}: {seconds:.3g}" for size, seconds in zip(row.sizes, row.seconds, strict=True))
        shown.append((row.what, row.unit, points, f"{row.slope:.2f}"))
    return table("## How cost grows", heads, shown)


def _roofline_tables(rows: list[Projection]) -> str:
    heads = " | ".join(["model", "image", "tower or operator", *(f"{gpu}, projected µs" for gpu in GPUS)])
    towers = [row for row in rows if row.name.endswith("tower")]
    operators = [row for row in rows if not row.name.endswith("tower")]
    tables = []
    for title, found in (("towers", towers), ("operators", operators)):
        cells = [(row.model, row.image, row.name, *(f"{1e6 * row.seconds[gpu]:.2f}" for gpu in GPUS)) for row in found]
        tables.append(table(f"## Roofline of the {title}: projected, not measured", heads, cells))
    return "\n".join(tables)


def plot(rows: list[TowerTime]) -> Figure:
    """Seconds against tokens for one image, on logarithmic axes."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.seconds is not None and "batch 1," in row.case and "autocast" not in row.case:
            name = "plain CLIP" if row.implementation in ("open_clip", "plain tower") else row.implementation
            lines.setdefault(name, {})[row.tokens] = row.seconds
    ticks = sorted({tokens for line in lines.values() for tokens in line})
    for (name, line), marker in zip(lines.items(), "os^vDx", strict=False):
        axes.plot(list(line), list(line.values()), marker=marker, label=name)
    axes.set(xlabel="tokens of one image", ylabel="seconds", title="Cost of the image tower")
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    return figure


def regressions(report: Report, earlier: dict) -> list[str]:
    """The ratios, measured by both runs, that grew by more than a tenth since the earlier one."""
    found = []
    for key, ratio in report.ratios().items():
        before = earlier["ratios"].get(key)
        if before is not None and ratio > WORSE * before:
            found.append(f"{key}: {ratio:.3f}, was {before:.3f}")
    return found


def write(folder: Path, report: Report) -> None:
    """Write bench.json, bench.md and, if towers were timed, cost.png, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    saves: dict[str, Callable[[Path], object]] = {
        "bench.json": lambda part: part.write_text(report.json(), "utf-8"),
        "bench.md": lambda part: part.write_text(report.markdown(), "utf-8"),
    }
    if any(row.seconds is not None for row in report.towers):
        saves["cost.png"] = lambda part: plot(report.towers).savefig(part, format="png", dpi=150)
    write_whole({folder / name: save for name, save in saves.items()})
