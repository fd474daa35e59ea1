"""The results of `make gpu`: a line of JSON for each, written when it is known, and all of them as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

FAILED, DROPPED = "failed", "dropped"


@dataclass(frozen=True)
class Line:
    """One result.

    Attributes:
        section: the part of the run.
        case: what was tried.
        outcome: "passed", "measured", "skipped", "dropped" (no time was left) or "failed".
        figures: what was found, by name.
        detail: why it failed or was skipped.
    """

    section: str
    case: str
    outcome: str
    figures: dict[str, object] = field(default_factory=dict)
    detail: str = ""


def append(path: Path, line: Line) -> None:
    """Add a line to a file of lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def read(path: Path) -> list[Line]:
    """The lines of a file; one that a killed process left unfinished is left out."""
    found = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found.append(Line(**json.loads(text)))
        except ValueError:
            continue
    return found


def markdown(titles: dict[str, str], lines: list[Line]) -> str:
    """A heading and a table for each section, in the order of `titles`."""
    counts = Counter(line.outcome for line in lines)
    parts = ["# GPU run\n", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ".\n"]
    for section, title in titles.items():
        found = [line for line in lines if line.section == section]
        if found:
            parts.append(f"## {title}\n\n{_table(_shortened(found))}")
    return "\n".join(parts)


def _shortened(lines: list[Line]) -> list[Line]:
    """Many passed tests of one function as a single line."""
    tests = Counter(line.case.partition("[")[0] for line in lines if line.outcome == "passed" and "::" in line.case)
    kept = [line for line in lines if line.outcome != "passed" or "::" not in line.case]
    section = lines[0].section
    return [Line(section, test, "passed", {"tests": count}) for test, count in tests.items()] + kept


def _table(lines: list[Line]) -> str:
    """A row for each case, or a column for each where that is narrower."""
    names = list(dict.fromkeys(name for line in lines for name in line.figures))
    rows = [["case", *(line.case for line in lines)], ["outcome", *(line.outcome for line in lines)]]
    rows += [[name, *(_cell(line.figures.get(name)) for line in lines)] for name in names]
    if any(line.detail for line in lines):
        rows.append(["detail", *(line.detail for line in lines)])
    if len(names) <= len(lines):
        rows = [list(column) for column in zip(*rows, strict=True)]
    return "\n".join([_row(rows[0]), _row(["---"] * len(rows[0])), *map(_row, rows[1:]), ""])


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
