"""Time RF-CLIP beside plain CLIP, and write a report: see `python -m bench --help`."""

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import end_to_end, methods, tables, towers
from bench.kernels import time_kernels
from bench.measure import DEVICE, machine, versions
from bench.roofline import project
from tools.kernel_report.launches import SHAPES

SECTIONS = ("kernels", "towers", "methods", "memory", "end-to-end", "roofline")
HOW = """\
Ratios are of medians over the rounds of one process, in which the implementations take turns after a warm-up call each,
every round starting with a different one, in `inference_mode`. Weights are random, with over-activation planted in a
tenth of the patches, so that in every block from the second on some patches distract and some are defocused; a tower's
images are noise on two textures. A tower is timed once eager (on a GPU, triton) is known to match the reference:
relative error at most 1e-5 in fp32, identical masks. Plain is open_clip's `encode_image`; at sizes that open_clip
refuses, its own blocks on resized position embeddings. Memory is the peak of a fresh process for each line, with the
same imports and the whole model in each."""
ON_DEVICE = """
Times are measured by the device's own events. Towers whose names end in "graph" run as CUDA graphs, and so does every
operation but those of the reference and eager."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}, separated by commas"
    )
    parser.add_argument("--model", default=towers.MODEL, help="an open_clip model; its weights are random")
    parser.add_argument("--quick", action="store_true", help="224x224 and two rounds, as a smoke test")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the results")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="fail if a ratio exceeds that of an earlier run by 10 %%"
    )
    given = parser.parse_args(arguments)
    only = given.only.split(",")
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    earlier = json.loads(given.compare.read_text("utf-8")) if given.compare else None
    logging.disable(logging.WARNING)  # open_clip warns that weights are random
    report = tables.Report(machine(), versions(), given.model, HOW + (ON_DEVICE if DEVICE == "cuda" else ""))
    cases = towers.QUICK_CASES if given.quick else towers.CASES
    if DEVICE == "cuda":
        cases = [case for case in cases if not case.bf16]  # a GPU computes in half precision anyway

    def towers_and_profile() -> None:
        report.towers += log_progress(towers.time_towers(given.model, cases))
        for row in report.towers:
            if row.goal is not None and row.ratio > row.goal:
                (case,) = (case for case in cases if str(case) == row.case)
                report.profile += towers.profile(given.model, case)

    def memory() -> None:
        report.memory += log_progress(towers.measure_memory(given.model, [case for case in cases if not case.bf16]))

    def pictures() -> None:
        report.throughput += log_progress(end_to_end.throughput(given.model, given.quick))
        report.growth += log_progress(end_to_end.growth(given.model, given.quick))
        if not given.quick:
            report.memory += log_progress(end_to_end.large_memory(given.model))

    sections: dict[str, Callable[[], object]] = {
        "kernels": lambda: report.kernels.extend(time_kernels(given.quick)),
        "roofline": lambda: report.roofline.extend(project(SHAPES[:1] if given.quick else SHAPES)),
        "towers": towers_and_profile,
        "methods": lambda: [
            report.methods.extend(log_progress(timed(given.model, given.quick)))
            for timed in (methods.time_methods, methods.time_windows)
        ],
        "memory": memory,
        "end-to-end": pictures,
    }
    for name, run in sections.items():
        if name in only:
            try:
                run()
            except Exception as error:  # of any kind: what the other sections find is worth having
                traceback.print_exc()
                report.broken.append(f"{name}: {type(error).__name__}: {error}")
            tables.write(given.out, report)
    print(report.markdown())
    worse = tables.regressions(report, earlier) if earlier else []
    for line in [*report.failures(), *(f"regression: {line}" for line in worse)]:
        print(line, file=sys.stderr)
    return 1 if worse or report.failures() else 0


def log_progress(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows, each announced as it comes, since a run takes minutes."""
    for row in rows:
        print(f"  {getattr(row, 'key', None) or row.what}", file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
