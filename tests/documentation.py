"""The pages that people read on GitHub, and the Python in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def run_page(page):
    """Execute a page's Python, one block after another, and return the names that it leaves."""
    names = {}
    text = page.read_text("utf-8")
    for found in PYTHON.finditer(text):
        lines_before = text[: found.start(1)].count("\n")
        exec(compile("\n" * lines_before + found[1], name_of(page), "exec"), names)
    return names
