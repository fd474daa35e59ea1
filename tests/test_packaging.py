"""What pyproject.toml declares agrees with the code: the packages imported, the extras named, the files installed."""

import ast
import sys
from fnmatch import fnmatch

from distributions import BASE, EXTRAS, PYPROJECT, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages
from test_layers import FILES, imports

PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
FOR_USERS = {extra: needs for extra, needs in EXTRAS.items() if extra not in ("all", "dev", "test")}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "pillow_jxl": "pillow-jxl-plugin",
    "sklearn": "scikit-learn",
}  # of modules that have another name
BROUGHT = {"triton", "fastapi", "starlette", "uvicorn"}  # by torch, where it runs; by Gradio, whose server they are


def distribution(module):
    """The distribution that a module belongs to; None for Python's own and this project's."""
    top = module.partition(".")[0]
    if top in ("rfclip", "rfclip_kernels") or top in sys.stdlib_module_names:
        return None
    return canonicalize_name(DISTRIBUTIONS.get(top, top))


def names(requirements):
    return {canonicalize_name(each.name) for each in requirements}


def test_what_is_imported_is_declared_and_nothing_else():
    found = {distribution(module) for path in FILES for module in imports(path)} - {None} - BROUGHT
    assert found == names(BASE).union(*map(names, FOR_USERS.values()))


def test_a_missing_package_is_reported_with_an_extra_that_installs_it():
    named = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                extra, *packages = (argument.value for argument in node.args[1:])
                assert set(map(distribution, packages)) <= names(FOR_USERS[extra]), path
                named |= {(extra, distribution(package)) for package in packages}
    assert named == {(extra, name) for extra, needs in FOR_USERS.items() for name in names(needs)}


def test_all_is_all():
    (every,) = EXTRAS["all"]
    assert every.name == PROJECT["name"] and every.extras == FOR_USERS.keys()
    assert Requirement("rfclip[all,test]") in EXTRAS["dev"]


def test_every_file_is_installed():
    packages = find_packages(ROOT, include=SETUPTOOLS["packages"]["find"]["include"])
    folders = {ROOT / package.replace(".", "/"): package for package in packages}
    kept = [path for top in ("rfclip", "rfclip_kernels") for path in (ROOT / top).rglob("*") if path.is_file()]
    for path in kept:
        if path.suffix == ".pyc":
            continue
        inside = next(folder for folder in path.parents if folder in folders)
        if path.suffix == ".py":
            assert inside == path.parent, f"{path.parent} is not a package"
        else:
            patterns = SETUPTOOLS["package-data"][folders[inside]]
            assert any(fnmatch(path.relative_to(inside).as_posix(), pattern) for pattern in patterns), path
    assert {ROOT / "rfclip/py.typed", ROOT / "rfclip_kernels/py.typed"} <= set(kept)
    assert all((ROOT / path).is_file() for path in (PROJECT["readme"], *PROJECT["license-files"]))
