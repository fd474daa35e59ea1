"""Test and time the kernels on a CUDA or ROCm GPU, without a network and without installing anything.

python -m bench.gpu [--device cpu] [--minutes 9.5] [--out build/gpu] [--wheels gpu-bundle] [--only SECTION,...]

Every section runs in a process of its own, so that one that dies takes nothing else with it. Each result is a line in
OUT/lines.jsonl as soon as it is known; OUT/report.md has all of them as tables, and is printed at the end, to be pasted
into an issue. A failure is a line, and the rest goes on. What does not fit into the time is dropped: the last sections.
The exit code is 1 if anything failed. With --device cpu the same code runs on tiny shapes, with the kernels in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from bench.gpu.lines import DROPPED, FAILED, Line, append, markdown, read

ROOT = Path(__file__).parents[2]
GRACE = 15  # seconds for a section to stop by itself
# Titles, and the most seconds that each may take; all but "here" make the most of what is left.
SECTIONS = {
    "here": ("What is here", 60),
    "tests": ("Kernel tests against float64", 150),
    "tower": ("The tower against the reference", 40),
    "towers": ("Towers beside plain CLIP", 90),
    "large": ("The largest picture", 45),
    "where": ("Where a forward spends its time on the device", 60),
    "launches": ("Launches and host time", 30),
    "graphs": ("CUDA graphs: captured, then replayed on new values", 45),
    "compile": ("torch.compile", 60),
    "kernels": ("Kernels beside PyTorch's attention, the reference and the roofline", 75),
    "pictures": ("Pictures per second, end to end", 40),
    "memcheck": ("compute-sanitizer memcheck", 60),
    "racecheck": ("compute-sanitizer racecheck", 60),
}
TITLES = {name: title for name, (title, _) in SECTIONS.items()}


def main(arguments: list[str] | None = None) -> int:
    started = time.time()
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help='"cuda" is also ROCm')
    parser.add_argument("--minutes", type=float, default=9.5, help="the time for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder for the results")
    parser.add_argument("--wheels", type=Path, default=ROOT / "gpu-bundle", help="folder of wheels to use if missing")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    given = parser.parse_args(arguments)
    only = given.only.split(",")
    if unknown := set(only) - SECTIONS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "lines.jsonl"
    lines.unlink(missing_ok=True)
    environment = child_environment(given.device, out, unpack(given.wheels, out / "site"))
    deadline = started + 60 * given.minutes
    for section, (title, most) in SECTIONS.items():
        if section not in only:
            continue
        print(f"{time.time() - started:4.0f} s  {title}", file=sys.stderr, flush=True)
        run_section(section, min(time.time() + most, deadline), lines, environment)
        (out / "report.md").write_text(markdown(TITLES, read(lines)), "utf-8")
        if section == "here" and any(line.outcome == FAILED for line in read(lines)):
            break
    print((out / "report.md").read_text("utf-8"))
    failed = [line for line in read(lines) if line.outcome == FAILED]
    for line in failed:
        print(f"failed: {line.section}: {line.case}: {line.detail}", file=sys.stderr)
    print(f"{time.time() - started:.0f} s; {out / 'report.md'} can be pasted into an issue", file=sys.stderr)
    return 1 if failed else 0


def unpack(wheels: Path, site: Path) -> Path:
    """The folder of wheels whose packages this Python lacks, unpacked."""
    site.mkdir(exist_ok=True)
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.partition("-")[0])
        except importlib.metadata.PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    return site


def child_environment(device: str, out: Path, site: Path) -> dict[str, str]:
    """The environment of a section: the checkout, the unpacked wheels, and caches in `out`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
        "TRITON_CACHE_DIR": str(out / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor"),
    }
    # Variables set by a surrounding pytest would reach the tests.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    if device == "cpu":
        return environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return environment


def run_section(section: str, until: float, lines: Path, environment: dict[str, str]) -> None:
    """Run a section in a process of its own until it ends or its time is up, and say so if it dies."""
    if time.time() > until:
        append(lines, Line(section, "all", DROPPED, detail="no time was left"))
        return
    command = [sys.executable, "-m", "bench.gpu.sections", section, str(lines), str(until)]
    log = lines.parent / f"{section}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(until - time.time() + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
            append(lines, Line(section, "the rest", DROPPED, detail=f"stopped {GRACE} s after its time was up"))
            return
    if code:
        last = " ".join(log.read_text("utf-8", "replace").strip().splitlines()[-1:])
        append(lines, Line(section, "its process", FAILED, detail=f"exit code {code}: {last}"))


if __name__ == "__main__":
    sys.exit(main())
