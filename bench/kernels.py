"""Single operations: runs `test_kernels.py` under pytest-benchmark in a process of its own, and collects the times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KernelTime:
    """A line of the report; `ratio` is to the reference's median in the same group, if that was timed."""

    what: str
    implementation: str
    seconds: float
    ratio: float | None


def time_kernels(quick: bool = False) -> Iterator[KernelTime]:
    """Every operation on every backend that runs here, and PyTorch's own equivalent if there is one.

    Raises:
        RuntimeError: a result was wrong, or pytest failed for another reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "kernels.json")
        tests = Path(__file__).parent / "test_kernels.py"
        only = ["-k", "224x224 and defocus_mask"] if quick else []
        command = [sys.executable, "-m", "pytest", str(tests), "-q", f"--benchmark-json={found}", *only]
        # Variables set by a surrounding pytest would turn the timing off.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(command, cwd=tests.parent.parent, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        records = json.loads(found.read_text("utf-8"))["benchmarks"]
    medians = {(r["group"], r["name"].removesuffix("]").rpartition("-")[2]): r["stats"]["median"] for r in records}
    for (what, implementation), seconds in sorted(medians.items()):
        reference = medians.get((what, "reference"))
        yield KernelTime(what, implementation, seconds, seconds / reference if reference else None)
