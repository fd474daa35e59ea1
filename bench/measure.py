"""Clocks, alternating rounds, peak memory in fresh processes, and a description of the machine."""

from __future__ import annotations

import logging
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Result = TypeVar("Result")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # PyTorch calls ROCm devices so, too
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
# What is measured: the kernels, in Triton's interpreter if that is asked for, or else fast PyTorch.
BACKEND = "triton" if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "eager"
DTYPE_NAME = {torch.float16: "fp16", torch.float32: "fp32"}[DTYPE]


class DeviceClock:
    """Seconds on the device's own timeline, summed from call to call, since an event's float32 loses precision."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last = torch.cuda.Event(enable_timing=True)
        self.last.record()

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        self.seconds += self.last.elapsed_time(now) / 1000
        self.last = now
        return self.seconds


def clock() -> Callable[[], float]:
    """The clock of `DEVICE`, in seconds."""
    return DeviceClock() if DEVICE == "cuda" else time.perf_counter


def captured(function: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """Calls of a function as one CUDA graph, so that the host is no part of what is timed.

    A CPU has no graphs, and calls it once.
    """
    if DEVICE == "cpu":
        return function
    function()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def relative_error(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> float:
    """The root mean square of the difference relative to that of `want`; of several results, the largest.

    Of the vectors of `defocused_tokens`, of which a backend may have more than the reference, those that both have.
    """
    if isinstance(got, tuple):
        return max(relative_error(one[:, : other.shape[1]], other) for one, other in zip(got, want, strict=True))
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        low, high = np.quantile(self.seconds, (0.2, 0.8))
        return float(low), float(high)


def alternate(
    functions: Mapping[str, Callable[[], object]], rounds: int, now: Callable[[], float] | None = None
) -> dict[str, Times]:
    """Time the functions in turn, round by round, after a warm-up call each, so that a slow minute hits all of them.

    Each round starts one function later, since whatever ran before leaves traces in the caches and the allocator.
    """
    now = now or clock()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    order = deque(functions.items())
    for _ in range(rounds):
        for name, function in order:
            began = now()
            function()
            seconds[name].append(now() - began)
        order.rotate(-1)
    return {name: Times(tuple(found)) for name, found in seconds.items()}


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of the fit seconds = c * size ** p: 1 if cost grows linearly."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What a module's function returns in a process of its own.

    Raises:
        BrokenProcessPool: the process was killed, most likely because memory ran out.
    """
    quiet = (logging.WARNING,)  # open_clip warns that weights are random
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=logging.disable, initargs=quiet) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes() -> int:
    """The most memory that this process has held: on the device, or resident on the host.

    On Linux from the kernel's VmHWM: `ru_maxrss` of a fresh process starts at the size of the one that started it.
    """
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, object]:
    """The machine this runs on."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions(*more: str) -> dict[str, str]:
    """What ran: packages, `more` of them, and the commit, marked if files differ from it."""
    found = {"python": platform.python_version(), "date": datetime.now().astimezone().isoformat(timespec="seconds")}
    for package in ("torch", "triton", "open_clip_torch", "rfclip", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        found["commit"] = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "not in a git repository"
    return found
