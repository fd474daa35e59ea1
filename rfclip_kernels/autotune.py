"""Measure which tiles are the fastest on the GPU that is here, for `rfclip_kernels.use_tiles`.

python -m rfclip_kernels.autotune --out tiles.json [--minutes M] [--kernels A,B] [--sizes A,B] [--device cpu]

Every kernel that multiplies matrices runs in fp16 on the registry's examples at several sizes of ViT-B/16, with each
candidate. One counts if it compiles, does not spill, and gives the default's result; it is chosen if it is at least 2 %
faster than the default, in the mean over the sizes that share an entry of the table. Processes compile ahead, and
CUDA graphs are timed. The table is written after each kernel. Each candidate's time, or why it does not count, is a
line of the log, on stderr. The exit code is 2 where there is nothing to measure on. With --device cpu the same code
runs in Triton's interpreter on tiny sizes, and its times mean nothing.
"""

import argparse
import gc
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult, Pool, ThreadPool
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves

from . import launchers, tiles
from .launch import interpreted
from .operations import Operations
from .registry import EXAMPLES, Sizes
from .tiles import Entry, Tiles

Jobs: TypeAlias = "dict[Tiles, AsyncResult[str | None]]"

TOLERANCE = 2e-3  # of the root mean square: four roundings of fp16
GAIN = 1.02  # less than this may be noise, and the default stays
PATIENCE = 20  # seconds without any news of a kernel's compilations
TIMED = {  # those that a forward spends the most time in first
    "refocused_attention": ("refocused_attention",),
    "proxy_attention": ("proxy_attention, known normalizers",),
    "row_logsumexp": ("key_normalizers",),
    "key_affinity": ("key_affinity, first block",),
    "self_attention": ("self_attention", "self_attention, bias", "proxy_attention"),
    "key_similarity": ("key_similarity, first block",),
    "received_attention": ("received_attention",),
    "cosine_aggregation": ("cosine_aggregation",),
}
SIZES = {  # of images, and how many
    "cuda": {
        "224x224b1": Sizes(),
        "224x224b32": Sizes(B=32),
        "336x448b1": Sizes(grid=(21, 28)),
        "336x448b8": Sizes(B=8, grid=(21, 28)),
        "672x896b1": Sizes(grid=(42, 56)),
        "1024x2048b1": Sizes(grid=(64, 128)),
    },
    "cpu": {"48x80b1": Sizes(H=2, L=2, grid=(3, 5))},
}


def candidates(kernel: str, device: str) -> list[Tiles]:
    """What is tried: tiles of 8 to 64 products for each of 32 threads in a warp.

    Refocused attention reads where its keys are before it reads them, so that loads run ahead from the fifth stage on,
    and the fourth adds nothing. In the interpreter only the sides make a difference.
    """
    square = kernel in ("key_similarity", "key_affinity")
    sides = [(rows, columns) for rows in (32, 64, 128) for columns in (32, 64, 128) if columns <= rows or not square]
    if device == "cpu":
        return [Tiles(*side, warps=4, stages=1) for side in sides]
    shapes = [(*side, warps) for side in sides for warps in (4, 8) if 8 <= math.prod(side) // (32 * warps) <= 64]
    if torch.version.hip is not None:
        stages: tuple[int, ...] = (1, 2, 3)
    else:
        stages = (1, 2, 3, 5) if kernel == "refocused_attention" else (1, 2, 3, 4)
    return [Tiles(*shape, count) for shape in [*shapes, (128, 128, 16)] for count in stages]


@contextmanager
def using(entries: list[Entry]) -> Iterator[None]:
    """Entries before those of the package, for a while."""
    tiles.use(entries)
    try:
        yield
    finally:
        tiles.use([])


@contextmanager
def launches(**changed: bool) -> Iterator[list[Any]]:
    """The compiled kernels that are launched; none in the interpreter.

    Args:
        changed: arguments of Triton's own launcher; with `warmup` nothing runs.
    """
    from triton.runtime.jit import JITFunction

    found: list[Any] = []
    run = JITFunction.run

    def noting(kernel: Any, *given: Any, **named: Any) -> Any:
        found.append(run(kernel, *given, **named | changed))
        return found[-1]

    JITFunction.run = noting
    try:
        yield found
    finally:
        JITFunction.run = run


def seconds(function: Callable[[], object], device: str) -> float:
    """The median of a call, from graphs of several, so that the host is no part of what is timed."""
    began = time.perf_counter()
    function()
    if device == "cpu":
        return time.perf_counter() - began
    torch.cuda.synchronize()
    call = time.perf_counter() - began  # with the host, and so an upper bound
    calls = max(1, min(50, int(0.01 / call)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    rounds = max(5, min(50, int(0.02 / (time.perf_counter() - began))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return 1e-3 * statistics.median(one.elapsed_time(other) for one, other in pairwise(events)) / calls


def agree(got: object, want: object) -> bool:
    """Whether the tensors of two results are the same but for rounding."""
    pairs = [(a.double(), b.double()) for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True)]
    return all(((a - b).norm() <= TOLERANCE * b.norm()).item() for a, b in pairs)


def entry_of(kernel: str, sizes: Sizes) -> Entry:
    """The launches of a kernel at a size, and those that a table cannot tell from them, with their default tiles."""
    x = torch.empty(0, dtype=sizes.dtype, device=sizes.device)
    dims = None if kernel == "cosine_aggregation" else sizes.D
    default = tiles.choose(kernel, x, sizes.B, sizes.N, dims)
    most = tiles.limit(kernel, sizes.B, sizes.N)
    return Entry(kernel, "half", dims, most, (tiles.architecture(x.device),), default)


def calls_of(kernel: str, sizes: Sizes) -> list[Callable[[], object]]:
    """Its examples; the keys' order is given, as the cut gives it."""
    from .attention import ordered_patches

    found: list[Callable[[], object]] = []
    operations = Operations(launchers())
    for example in EXAMPLES:
        if example.name in TIMED[kernel]:
            inputs: dict[str, Any] = example.inputs(sizes)
            if kernel == "refocused_attention":
                inputs["order"] = ordered_patches(inputs["distraction"], inputs["target"])
            found.append(partial(getattr(operations, example.operation), **inputs))
    return found


def reason(error: Exception) -> str:
    """On a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def compile_one(kernel: str, one: Tiles, names: list[str], device: str) -> str | None:
    """Compile a kernel for all sizes into Triton's cache, and run nothing.

    Returns:
        Why the tiles do not count, or None. The interpreter compiles nothing.
    """
    if device == "cpu":
        return None
    try:
        # Triton prints code that the assembler refuses.
        with torch.inference_mode(), redirect_stdout(None), launches(warmup=True) as compiled:
            for name in names:
                sizes = replace(SIZES[device][name], device=device, seed=None)
                entry = entry_of(kernel, sizes)
                with using([replace(entry, tiles=one)]):
                    for call in calls_of(kernel, sizes):
                        call()
            # To ask for `run` loads the code, which fails if it does not fit, and counts what spills.
            return "spills" if any(each.run and each.n_spills for each in compiled) else None
    except Exception as error:  # of any kind, from any compiler: what fails does not count
        return reason(error)


@dataclass
class Case:
    """A kernel at one size.

    Attributes:
        name: of the size.
        entry: its launches, with their default tiles.
        calls: what is timed.
        device: "cuda" or "cpu".
        want: the results with the default tiles.
        times: seconds of each call, with each tiles that count.
    """

    name: str
    entry: Entry
    calls: list[Callable[[], object]]
    device: str
    want: list[object] = field(init=False)
    times: dict[Tiles, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.want = [call() for call in self.calls]

    def time(self, one: Tiles) -> str:
        """Time tiles, if they count; the default always does.

        Returns:
            Microseconds of each call, or why they do not count.
        """
        with using([replace(self.entry, tiles=one)]):
            try:
                with launches() as compiled:
                    got = [call() for call in self.calls]
                if one != self.entry.tiles:
                    if not agree(got, self.want):
                        return "another result"
                    if any(each.n_spills for each in compiled):
                        return "spills"
                self.times[one] = [seconds(call, self.device) for call in self.calls]
            except Exception as error:  # as above
                return reason(error)
        return " + ".join(f"{1e6 * each:.1f}" for each in self.times[one]) + " us"


def speedup(cases: list[Case], one: Tiles) -> float:
    """Over the default, the geometric mean over calls and sizes."""
    pairs = [pair for case in cases for pair in zip(case.times[case.entry.tiles], case.times[one], strict=True)]
    return statistics.geometric_mean([before / after for before, after in pairs])


def fastest(cases: list[Case]) -> Tiles:
    """Of the tiles that count in all cases."""
    counted = [one for one in cases[0].times if all(one in case.times for case in cases)]
    best = max(counted, key=partial(speedup, cases))
    return best if speedup(cases, best) >= GAIN else cases[0].entry.tiles


def finished(jobs: Jobs, until: float) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles as soon as they are compiled, and why they do not count, which a worker that hangs or dies never says."""
    left, heard = dict(jobs), time.monotonic()
    while left and time.monotonic() < min(until, heard + PATIENCE):
        done = [one for one, job in left.items() if job.ready()]
        for one in done[:1]:
            yield one, left.pop(one).get()
            heard = time.monotonic()
        if not done:
            time.sleep(0.02)
    yield from ((one, "no time was left, or its compilation hangs or died") for one in left)


def measured(kernel: str, names: list[str], device: str, jobs: Jobs, until: float) -> list[Case]:
    """A kernel at each size, with the default tiles and with all that count."""

    def note(size: str, one: Tiles, found: str) -> None:
        print(f"{kernel} | {size} | {one} | {found}", file=sys.stderr, flush=True)

    cases = []
    for name in names:
        sizes = replace(SIZES[device][name], device=device)
        entry = entry_of(kernel, sizes)
        jobs[entry.tiles].wait(max(0.0, min(PATIENCE, until - time.monotonic())))
        try:
            case = Case(name, entry, calls_of(kernel, sizes), device)
        except Exception as error:  # such as too little memory
            note(name, entry.tiles, reason(error))
            continue
        note(name, entry.tiles, f"{case.time(entry.tiles)}, the default")
        if case.times:
            cases.append(case)
    for one, wrong in finished(jobs, until):
        for case in cases:
            if one != case.entry.tiles:
                note(case.name, one, wrong or case.time(one))
    return cases


def workers(device: str) -> Pool:
    """Processes that compile, after the one that times, or for the interpreter a thread."""
    if device == "cpu":
        return ThreadPool(1)
    return get_context("spawn").Pool(min(16, os.cpu_count() or 1), initializer=os.nice, initargs=(10,))


def write(path: Path, entries: list[Entry]) -> None:
    """A table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(tiles.text(entries), "utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m rfclip_kernels.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then, with what is known")
    parser.add_argument("--kernels", help=f"some of {','.join(TIMED)}")
    parser.add_argument("--sizes", help=f"some of {','.join(SIZES['cuda'])}")
    parser.add_argument("--device", choices=SIZES, default="cuda", help='"cuda" is also ROCm')
    given = parser.parse_args(arguments)
    until, device = time.monotonic() + 60 * given.minutes, given.device
    kernels, names = (
        asked.split(",") if asked else list(known)
        for asked, known in ((given.kernels, TIMED), (given.sizes, SIZES[device]))
    )
    if unknown := [*({*kernels} - TIMED.keys()), *({*names} - SIZES[device].keys())]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if missing := obstacle(device):
        print(f"python -m rfclip_kernels.autotune: {missing}", file=sys.stderr)
        return 2
    if device == "cuda":
        gc.freeze()  # some versions of PyTorch collect garbage before each graph, which takes longer than to time it
    entries: list[Entry] = []
    print("entry | size | default | fastest | speedup | fastest at this size | speedup")
    with torch.inference_mode(), workers(device) as pool:
        jobs: dict[str, Jobs] = {}
        for kernel in kernels:
            defaults = [entry_of(kernel, replace(SIZES[device][name], device=device)).tiles for name in names]
            jobs[kernel] = {
                one: pool.apply_async(compile_one, (kernel, one, names, device))
                for one in dict.fromkeys([*defaults, *candidates(kernel, device)])
            }
        for kernel in kernels:
            if time.monotonic() > until:
                print(f"{kernel}: no time was left", file=sys.stderr)
                continue
            found: dict[Entry, list[Case]] = {}
            for case in measured(kernel, names, device, jobs[kernel], until):
                found.setdefault(case.entry, []).append(case)
            for entry, cases in found.items():
                best = fastest(cases)
                entries.append(replace(entry, tiles=best))
                for case in cases:
                    own = fastest([case])
                    row = entry, case.name, entry.tiles, best, f"{speedup([case], best):.2f}", own
                    print(*row, f"{speedup([case], own):.2f}", sep=" | ", flush=True)
            write(given.out, entries)
    if entries:
        print(
            f'{given.out}: {len(entries)} entries; rfclip_kernels.use_tiles("{given.out}") uses them', file=sys.stderr
        )
    return 0


def obstacle(device: str) -> str | None:
    """What is missing to measure on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu":
        return None if interpreted() else "a dry run on the CPU needs Triton's interpreter: set TRITON_INTERPRET=1"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, and nothing runs on a GPU: unset it, or ask for --device cpu"
    return None if torch.cuda.is_available() else "PyTorch finds no GPU; --device cpu is a dry run"


if __name__ == "__main__":
    sys.exit(main())
