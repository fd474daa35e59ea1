"""What is declared in pyproject.toml, what distributions need, and a program for which some packages are missing."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
OPTIONAL = PYPROJECT["project"]["optional-dependencies"]
BASE = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
EXTRAS = {extra: [Requirement(text) for text in texts] for extra, texts in OPTIONAL.items()}

HIDE = """
import sys
from importlib.machinery import FileFinder

hidden, find = set(sys.argv.pop().split(",")), FileFinder.find_spec

def find_spec(self, name, target=None):
    return None if name.partition(".")[0] in hidden else find(self, name, target)

FileFinder.find_spec = find_spec
"""


def closure(requirements):
    """The names of the distributions that these bring, as far as they are installed."""
    found, todo = set(), [(each.name, extra) for each in requirements for extra in ("", *each.extras)]
    while todo:
        name, extra = todo.pop()
        if (name := canonicalize_name(name), extra) in found:
            continue
        found.add((name, extra))
        try:
            texts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for each in map(Requirement, texts):
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                todo += [(each.name, wanted) for wanted in ("", *each.extras)]
    return {name for name, _ in found}


def modules_beyond(requirements):
    """The importable names of everything installed that these do not bring, except this project's."""
    brought = closure(requirements)
    names = metadata.packages_distributions().items()
    others = {name for name, owners in names if not brought & set(map(canonicalize_name, owners))}
    return others - {"rfclip", "rfclip_kernels"}


def run_without(hidden, code, *options, cwd=None):
    """Run code in a process where no import finds the hidden packages; `options` are Python's. It prints "done"."""
    command = [sys.executable, *options, "-c", f"{HIDE}\n{code}\nprint('done')", ",".join(hidden)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
