"""The packages form layers: nothing imports what is above it, and the kernels import nothing of rfclip."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [  # lowest first, as in docs/extending.md
    ("rfclip_kernels",),
    ("rfclip", "rfclip.config", "rfclip.extras", "rfclip.files", "rfclip.outputs", "rfclip.presets", "rfclip.tiny")
    + ("rfclip.images", "rfclip.formats"),
    ("rfclip.datasets",),
    ("rfclip.ops", "rfclip.reference"),
    ("rfclip.towers",),
    ("rfclip.graphs",),
    ("rfclip.methods",),
    ("rfclip.plugin", "rfclip.calibration", "rfclip.registers", "rfclip.simulated_distraction"),
    ("rfclip.segment",),
    ("rfclip.explanation",),
    ("rfclip.scoring",),
    ("rfclip.app", "rfclip.__main__"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer(module):
    """The rank of a module, and the name that it is listed by."""
    parts = module.split(".")
    names = [".".join(parts[: n + 1]) for n in range(len(parts))]
    known = [name for name in names if name in RANK and (name != "rfclip" or len(parts) == 1 or names[1] not in RANK)]
    return RANK[known[-1]], known[-1]


def imports(path):
    """The modules that a file imports when it runs, lazily or not; imports for type checkers do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relocatable = path.parent == ROOT / "rfclip_kernels"
            own = node.level or (node.module or "").startswith("rfclip_kernels")
            assert node.level == (relocatable and bool(own)), f"{path}: from {'.' * node.level}{node.module}"
            parts = ["rfclip_kernels"] * node.level + [node.module] * bool(node.module)
            yield from (".".join([*parts, alias.name]) for alias in node.names)


FILES = [path for package in ("rfclip", "rfclip_kernels") for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_imports_what_is_above_it(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    rank, _ = layer(module)
    if module == "rfclip":
        return  # its public names are loaded on first use
    for imported in imports(path):
        if imported.split(".")[0] in ("rfclip", "rfclip_kernels"):
            other, name = layer(imported)
            assert other <= rank, f"{module} imports {imported}, and {name} is above it"
