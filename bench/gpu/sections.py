"""The sections of `make gpu`: each yields its cases one after another, and every case becomes a line when it ends.

python -m bench.gpu.sections SECTION LINES UNTIL
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rfclip
from bench import end_to_end, roofline, towers
from bench.gpu.lines import DROPPED, FAILED, Line, append
from bench.measure import BACKEND, DEVICE, DTYPE, alternate, captured, relative_error, versions
from bench.operations import BACKENDS, BY_NAME, CASES, capturable, prepare
from bench.towers import Case
from rfclip.plugin import installed
from rfclip.towers.loading import tiny_folder
from rfclip_kernels.registry import Sizes
from tools.kernel_report.forward import FORWARDS
from tools.kernel_report.launches import Shape

Figures = dict[str, object]


class Rows(dict[str, Figures]):
    """What a case that gives several lines returns, by the end of their names."""


Cases = Iterator[tuple[str, Callable[[], Figures | Rows]]]  # each named, and run when its turn comes
ROOT = Path(__file__).parents[2]
ON_GPU = DEVICE == "cuda"
TINY = f"local-dir:{tiny_folder()}"
MODEL = towers.MODEL if ON_GPU else TINY
PEAK = roofline.peak_of(torch.cuda.get_device_name()) if ON_GPU else None
CALLS = 10 if ON_GPU else 1  # of an operation in one CUDA graph
PACKAGES = ("numpy", "timm", "transformers", "torchvision", "pytest")
if ON_GPU:
    SMALL, LARGE = Case((224, 224), rounds=50), Case((1024, 2048), rounds=5, alone=True, slow=True)
    MIDDLE: list[Case] = [
        Case((224, 224), 8, 20),
        Case((224, 224), 32, 20, slow=True),
        Case((336, 448), 8, 20, slow=True),
        Case((672, 896), rounds=20, slow=True),
    ]
    GRIDS = {"224x224": Sizes(grid=(14, 14), dtype=DTYPE, device=DEVICE, names=60, patch=8)}
    GRIDS["336x448"] = replace(GRIDS["224x224"], grid=(21, 28))
else:
    SMALL, LARGE, MIDDLE = Case((32, 32), rounds=1), Case((32, 48), rounds=1, alone=True), []
    GRIDS = {"24x40": Sizes(H=2, L=2, D=32, grid=(3, 5), dtype=DTYPE, names=7, patch=2, iterations=2)}


GOALS = {(each.shape.size, each.batch): each.time for each in FORWARDS if each.shape.model == "ViT-B/16"}
planted = cache(towers.planted)  # one for all cases of a section: none changes it


class Skip(Exception):
    """A case that cannot run here."""


def here() -> Cases:
    """The GPU, the driver, the clocks and the versions."""
    yield "device", device
    yield "clocks", clocks
    yield "versions", lambda: versions(*PACKAGES)
    yield "host", lambda: {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def device() -> Figures:
    if not ON_GPU:
        if BACKEND != "triton":
            raise RuntimeError("PyTorch sees no CUDA or ROCm device here: run `make gpu DEVICE=cpu` for a dry run")
        return {"name": "no GPU: a dry run on the CPU, which says nothing about speed"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory GB": round(found.total_memory / 1e9, 1),
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }


def clocks() -> Figures:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise Skip("nvidia-smi is not here")
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"
    command = [tool, f"--query-gpu={asked}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return dict(zip(asked.split(","), found.split(", "), strict=True))


# Correctness


class Recorder:
    """A pytest plugin that writes a line for every test, and stops the run when its time is up."""

    def __init__(self, lines: Path, until: float) -> None:
        self.lines, self.until = lines, until

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/kernels/")
        if report.failed:
            last = str(report.longrepr).strip().splitlines()[-1:]
            append(self.lines, Line("tests", name, FAILED, detail=f"{report.when}: {' '.join(last)}"))
        elif report.skipped:
            append(self.lines, Line("tests", name, "skipped", detail=str(report.longrepr[2])))
        elif report.when == "call":
            append(self.lines, Line("tests", name, "passed", {"seconds": round(report.duration, 2)}))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if time.time() > self.until:
            raise pytest.exit.Exception("no time was left", returncode=0)


def tests(lines: Path, until: float) -> None:
    """The tests of `tests/kernels` on the device, on several processes since most of their time is the compiler's."""
    processes = min(16, os.cpu_count() or 1) if ON_GPU else 0
    only = [] if ON_GPU else ["-k", "guards"]  # `make test` runs all of them in the interpreter
    options = ["-q", "-W", "default::UserWarning", "-p", "no:cacheprovider", "--numprocesses", str(processes)]
    code = pytest.main([str(ROOT / "tests/kernels"), *options, *only], plugins=[Recorder(lines, until)])
    if time.time() > until:
        append(lines, Line("tests", "the rest", DROPPED, detail="no time was left"))
    elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        append(lines, Line("tests", "pytest", FAILED, detail=f"exit code {code}"))


def tower() -> Cases:
    """Dense features and masks of a whole tower, relative to the reference in float64."""
    model, images = copy.deepcopy(planted(MODEL)).double(), towers.pictures(SMALL).double()
    wanted: list[tuple[Tensor, Tensor]] = []

    def compare(dtype: torch.dtype, backend: str) -> Figures:
        if not wanted:
            wanted.append(towers.features_and_masks(model, images, "reference"))
        want, want_masks = wanted[0]
        got, masks = towers.features_and_masks(copy.deepcopy(model).to(dtype), images.to(dtype), backend)
        error = relative_error(got, want)
        differing = (masks != want_masks).double().mean().item()
        found: Figures = {"relative error": error, "share of masks that differ": differing}
        if dtype == torch.float32:
            assert error <= 1e-5 and not differing, found
        assert error <= 1.5 * errors.setdefault(dtype, error), found  # the reference in this dtype comes first
        return found

    errors: dict[torch.dtype, float] = {}
    yield f"{SMALL.size}, fp32, kernels", partial(compare, torch.float32, "triton")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for backend in ("reference", "triton"):
            yield f"{SMALL.size}, {name}, {backend}", partial(compare, dtype, backend)


def operations(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every operation that has a kernel, on small example inputs."""
    sizes = Sizes(B=2, H=2, L=2, D=32, grid=(3, 7), dtype=dtype, device=DEVICE, names=7, patch=3, iterations=2)
    for name, example in BY_NAME.items():
        if example.module:
            yield name, prepare(name, "triton", sizes)


def graphs() -> Cases:
    """A graph replayed on other values gives what a direct call on them gives."""
    model, case = towers.twin(planted(MODEL)), [SMALL, *MIDDLE][-1]
    rfclip.refocus(model, towers.config_for(model), backend=BACKEND)
    first, second = towers.pictures(case), towers.pictures(case).flip(-1).contiguous()

    def replay() -> Figures:
        want, images, kept = rfclip.dense_features(model, second), first.clone(), []
        run = captured(lambda: kept.append(rfclip.dense_features(model, images)))
        images.copy_(second)
        run()
        error = relative_error(kept[-1], want)
        assert error <= 1e-3, error
        return {"relative error": error}

    def again(function: Callable[[], Tensor]) -> Figures:
        want, kept = function(), []
        run = captured(lambda: kept.append(function()))
        run()
        # Some operations return several tensors.
        assert all(torch.equal(*pair) for pair in zip(tree_leaves(kept[-1]), tree_leaves(want), strict=True))
        return {"equal to the bit": True}

    yield f"the tower at {case}", replay
    yield f"the tower's own graph at {case}", partial(own_graph, case)
    for name, function in operations(DTYPE):
        yield name, partial(again, function)


def own_graph(case: Case) -> Figures:
    """The graphs that `rfclip.refocus` keeps, beside the same weights without: on new values, and on new weights."""
    model = copy.deepcopy(planted(MODEL))
    plain, weight = towers.twin(model), model.visual.transformer.resblocks[1].mlp.c_proj.weight
    rfclip.refocus(plain, towers.config_for(model), backend=BACKEND, cuda_graphs=False)
    handle = rfclip.refocus(model, towers.config_for(model), backend=BACKEND)
    graphs = installed(model).graphs
    first = towers.pictures(case)
    second, errors = first.flip(-1).contiguous(), []

    def held() -> list[object]:
        found = list(graphs._recordings.values())
        assert len(found) == ON_GPU and None not in found, f"graphs: {found}"
        return found

    def compare(*batches: Tensor) -> list[Tensor]:
        """The results, once all of them are there, since none may be overwritten by a later one."""
        wanted = [rfclip.dense_features(plain, images) for images in batches]
        found = [rfclip.dense_features(model, images) for images in batches]
        errors.extend(map(relative_error, found, wanted))
        assert errors[-1] <= 1e-3, errors
        return wanted

    def on_a_stream(images: Tensor) -> list[Tensor]:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext():
            found = [rfclip.dense_features(model, images) for _ in range(CALLS)]
            if ON_GPU:
                torch.cuda.current_stream().synchronize()
        return found

    before, _ = compare(first, second)
    kept = held()
    weight.mul_(1.5)
    (after,) = compare(first)
    assert relative_error(after, before) > 1e-3, "the changed weight does not matter"
    assert not ON_GPU or held()[0] is kept[0], "the graph did not stay"
    weight.data = weight / 2
    compare(second)
    assert not ON_GPU or held()[0] is not kept[0], "a graph of the old weight stayed"
    wanted = compare(first, second)
    if ON_GPU:
        torch.cuda.synchronize()
    with ThreadPoolExecutor(2 if ON_GPU else 1) as pool:  # Triton's interpreter takes one thread
        for results, want in zip(pool.map(on_a_stream, (first, second)), wanted, strict=True):
            errors.extend(relative_error(found, want) for found in results)
    assert max(errors) <= 1e-3, errors
    handle.remove()
    return {"largest relative error": max(errors)}


def compiled() -> Cases:
    """A refocused tower through torch.compile: with Inductor on a GPU, traced to single operators on a CPU.

    Of three blocks, which say what more of them do: the first has nothing to refocus, the last only reads out.
    """
    model, images = towers.twin(planted(TINY)), towers.pictures(Case((32, 32)))
    del model.visual.transformer.resblocks[3:]
    backend = "inductor" if ON_GPU else "aot_eager"
    # Interpreted kernels cannot be compiled.
    rfclip.refocus(model, towers.config_for(model), backend="triton" if ON_GPU else "eager")

    def run() -> Figures:
        want = rfclip.dense_features(model, images)
        began = time.perf_counter()
        got = torch.compile(rfclip.dense_features, fullgraph=True, backend=backend)(model, images)
        error = relative_error(got, want)
        assert error <= (1e-4 if torch.float32 == DTYPE else 2e-2), error
        return {"relative error": error, "seconds to compile": round(time.perf_counter() - began, 1)}

    yield f"three blocks of the bundled model at 32x32, {backend}, one graph", run


# Speed


def launches() -> Cases:
    """Kernels that one pass launches, and how long the host takes to launch them."""
    model, images = planted(MODEL), towers.pictures(SMALL)
    for name, run in (
        ("plain CLIP", towers.plain(model, images)),
        ("RF-CLIP on the kernels", towers.refocused(model, images, BACKEND)),
    ):
        yield f"{name}, {SMALL}", partial(_launches, run)


def _launches(run: Callable[[], object]) -> Figures:
    run()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * ON_GPU
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if ON_GPU:
            torch.cuda.synchronize()
    events = profile.events()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    own = [event for event in kernels if not event.name.lower().startswith(("memcpy", "memset"))]
    host = []
    for _ in range(20 if ON_GPU else 1):
        if ON_GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        host.append(time.perf_counter() - began)
    figures: Figures = {"operators": sum(event.name.startswith(("aten::", "rfclip_kernels::")) for event in events)}
    if ON_GPU:
        figures |= {
            "kernels": len(own),
            "copies": len(kernels) - len(own),
            "ms on the device": sum(event.device_time for event in kernels) / 1000,
        }
    return figures | {"ms on the host": 1000 * statistics.median(host)}


def where() -> Cases:
    """The time of every kernel of a forward, plain and refocused, at the shapes that have a goal."""
    model = planted(MODEL)
    for case in [case for case in (SMALL, *MIDDLE, LARGE) if (case.size, case.batch) in GOALS or not ON_GPU]:
        yield f"{case}, plain", partial(_where, model, case, "plain")
        yield f"{case}, refocused", partial(_where, model, case, "refocused")


def _where(model: nn.Module, case: Case, which: str) -> Rows:
    """A line for each kernel, the one that takes the most time first; on a CPU, for each operator."""
    images = towers.pictures(case)
    run = towers.plain(model, images) if which == "plain" else towers.refocused(model, images, BACKEND)
    forwards = 5 if ON_GPU else 1
    run()  # compiles
    kind = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        for _ in range(forwards):
            run()
        if ON_GPU:
            torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if not ON_GPU:
            spent[event.name].append(event.self_cpu_time_total)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            spent[shortened(event.name)].append(event.device_time)
    total = sum(map(sum, spent.values()))
    rows, other = Rows(), []
    for name, times in sorted(spent.items(), key=lambda each: -sum(each[1])):
        if sum(times) >= 0.01 * total:
            rows[name] = _spent(times, forwards)
        else:
            other += times
    return Rows(rows | {"other": _spent(other, forwards), "all": _spent(sum(spent.values(), []), forwards)})


def _spent(times: list[float], forwards: int) -> Figures:
    each = sum(times) / len(times) if times else 0.0
    return {"launches": len(times) / forwards, "µs a launch": each, "µs a forward": sum(times) / forwards}


def shortened(name: str) -> str:
    """A kernel's name without its namespaces and arguments, cut off."""
    name = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::|\w+::", "", name)
    return name.partition("(")[0].strip()[:60]


def time_case(case: Case) -> Figures:
    """Milliseconds of every implementation in alternating rounds."""
    model, images = planted(MODEL), towers.pictures(case)
    error, note = towers.check(model, images, case)
    runs = towers.implementations(model, images, case)
    times = alternate(runs, case.rounds)
    plain = next(iter(runs))
    figures: Figures = {f"{name}, ms": 1000 * found.median for name, found in times.items()}
    figures |= {
        "triton over plain": times["triton"].median / times[plain].median,
        "graph over graph": times["triton, graph"].median / times[f"{plain}, graph"].median,
        "relative error": error,
    }
    if goal := GOALS.get((case.size, case.batch)):
        met = figures["graph over graph"] <= goal
        figures["goal, graph over graph"] = f"at most {goal}: {'met' if met else 'MISSED'}"
    if PEAK:
        _, flops = towers.tower_size(towers.read_tower(model), images)
        figures["plain graph, share of peak"] = case.batch * flops / times[f"{plain}, graph"].median / PEAK.flops
    return figures | {"masks": note}


def time_compiled(case: Case) -> Figures:
    """Plain CLIP with its blocks compiled by Inductor, beside itself."""
    model, images = planted(MODEL), towers.pictures(case)
    runs = {"plain": towers.plain(model, images), "compiled": towers.compiled_tower(model, images)}
    times = alternate({name: captured(run) for name, run in runs.items()}, case.rounds)
    return {f"{name}, graph, ms": 1000 * found.median for name, found in times.items()}


def time_towers() -> Cases:
    """From one small picture to a large one; with compiled blocks, these two."""
    for case in [SMALL, *MIDDLE]:
        yield str(case), partial(time_case, case)
    for case in dict.fromkeys((SMALL, [SMALL, *MIDDLE][-1])):
        yield f"{case}, compiled blocks", partial(time_compiled, case)


def large() -> Cases:
    """The one size that may take long."""
    yield str(LARGE), partial(time_case, LARGE)


def time_kernels() -> Cases:
    """Each operation by every implementation, once it is right; the share is of the time that the roofline allows.

    On a larger grid, by the kernel and PyTorch's own attention alone.
    """
    for place, (size, sizes) in enumerate(GRIDS.items()):
        for name, example in BY_NAME.items():
            if example.module:
                hows = [how for case, how in CASES if case == name]
                flex = ["triton", "flex_attention"] if "flex_attention" in hows and ON_GPU and not place else []
                left_out = ("flex_attention", "eager", "reference")[: 3 if place else 1]
                hows = [how for how in hows if how not in left_out]
                yield f"{name}, {size}", partial(_time_kernel, name, hows, sizes, size)
                if flex:  # apart, since it is compiled
                    yield f"{name}, {size}, flex_attention", partial(_time_kernel, name, flex, sizes, size)


def _time_kernel(name: str, hows: list[str], sizes: Sizes, size: str) -> Figures:
    want = prepare(name, "reference", sizes)()
    runs = {how: prepare(name, how, sizes) for how in hows}
    error = relative_error(runs["triton"](), want)
    assert error < (1e-4 if torch.float32 == DTYPE else 1e-2), error
    for how in [how for how in runs if how not in BACKENDS]:
        try:
            runs[how]()
        except Exception as reason:  # of any kind: it is not this package that fails
            if len(runs) == 2:
                raise Skip(f"{how} fails: {type(reason).__name__}: {str(reason)[:300]}") from reason
            del runs[how]
    graphs = {how: captured(run, CALLS) for how, run in runs.items() if capturable(name, how)}
    times = alternate(runs | graphs, 20 if ON_GPU else 1)
    figures: Figures = {
        f"{how}, µs": 1e6 * found.median / (CALLS if how in graphs else 1) for how, found in times.items()
    }
    figures["relative error"] = error
    # The report counts a larger picture and more names than are timed here, so pixels have no share.
    if PEAK and BY_NAME[name].batched and name != "pamr":
        shape = Shape("ViT-B/16", tuple(map(int, size.split("x"))))
        least = roofline.count(BY_NAME[name], shape).seconds(PEAK)
        figures["share of the roofline"] = least / (times["triton"].median / CALLS)
    return figures


def pictures() -> Cases:
    """Photographs to labels, beside plain CLIP in a plainly written loop."""
    yield "photographs of 336 pixels", _pictures


def _pictures() -> Figures:
    rows = end_to_end.throughput(towers.MODEL if ON_GPU else "ViT-S-32", quick=not ON_GPU)
    return {f"{row.implementation}, pictures per second": row.images_per_second for row in rows}


# Sanitizers


def sanitized(tool: str) -> Cases:
    """Every operation on one small case under compute-sanitizer, in a process of its own."""
    yield "every operation on small tensors", partial(_sanitized, tool)


def _sanitized(tool: str) -> Figures:
    program = shutil.which("compute-sanitizer")
    small = [sys.executable, "-m", "bench.gpu.sections", "small"]
    if not ON_GPU and tool == "memcheck":
        subprocess.run(small, check=True, cwd=ROOT)  # its code runs, at least
    if not ON_GPU:
        raise Skip("no GPU")
    if program is None:
        raise Skip("compute-sanitizer is not here")
    # PyTorch's allocator would hide an access beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "9", *small]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = [line for line in done.stdout.splitlines() if line.startswith("=========")][-1:]
    assert done.returncode == 0, f"exit code {done.returncode}: {' '.join(summary) or done.stderr[-500:]}"
    return {"summary": " ".join(summary).strip("= ")}


def small() -> None:
    """One call of every operation."""
    for dtype in (torch.float32, torch.float16) if ON_GPU else (torch.float32,):
        for _, function in operations(dtype):
            function()
    if ON_GPU:
        torch.cuda.synchronize()


SECTIONS: dict[str, Callable[[], Cases]] = {
    "here": here,
    "tower": tower,
    "towers": time_towers,
    "large": large,
    "where": where,
    "launches": launches,
    "graphs": graphs,
    "compile": compiled,
    "kernels": time_kernels,
    "pictures": pictures,
    "memcheck": partial(sanitized, "memcheck"),
    "racecheck": partial(sanitized, "racecheck"),
}
MEASURED = ("here", "towers", "large", "where", "launches", "kernels", "pictures")


@torch.inference_mode()
def run(section: str, lines: Path, until: float) -> None:
    """Write a line for every case of a section."""
    for case, function in SECTIONS[section]():
        if time.time() > until:
            append(lines, Line(section, case, DROPPED, detail="no time was left"))
            continue
        try:
            found = function()
            rows = {f"{case}: {name}": row for name, row in found.items()} if isinstance(found, Rows) else {case: found}
            outcome = "measured" if section in MEASURED else "passed"
            lines_of_case = [Line(section, name, outcome, figures) for name, figures in rows.items()]
        except Skip as reason:
            lines_of_case = [Line(section, case, "skipped", detail=str(reason))]
        except Exception as error:  # of any kind: it is what this case has to tell
            traceback.print_exc()
            lines_of_case = [Line(section, case, FAILED, detail=f"{type(error).__name__}: {str(error)[:300]}")]
        for line in lines_of_case:
            append(lines, line)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # open_clip warns that weights are random
    if sys.argv[1] == "small":
        small()
    elif sys.argv[1] == "tests":
        tests(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        run(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
