"""What pyproject.toml declares agrees with the code: the packages imported, the extras named, the files built."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from distributions import BASE, EXTRAS, PYPROJECT, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_layers import FILES, imports

PROJECT = PYPROJECT["project"]
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


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A copy of the checkout, committed and tagged as version 1.2.3."""
    copy = tmp_path_factory.mktemp("released") / "rfclip"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__"))
    (copy / "rfclip/tiny/open_clip_model.safetensors").write_bytes(b"")  # which takes long to compress
    for command in ("init", "add --all", "commit --message all", "tag v1.2.3"):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *author, *command.split()], cwd=copy, check=True, capture_output=True)
    return copy


def test_what_is_built(released, tmp_path):
    """Both distributions have every file, the version is that of the tag, and PyPI will show the README."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, released]
    subprocess.run(command, check=True, capture_output=True)
    wheel, source = tmp_path / "rfclip-1.2.3-py3-none-any.whl", tmp_path / "rfclip-1.2.3.tar.gz"
    assert set(tmp_path.iterdir()) == {wheel, source}
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, source], check=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=released, check=True, capture_output=True, text=True).stdout
    every, generated = set(tracked.splitlines()), {"rfclip/_version.py"}
    with tarfile.open(source) as archive:
        found = {each.name.partition("/")[2] for each in archive if each.isfile()}
    assert {name for name in found if ".egg-info/" not in name} == every | generated | {"PKG-INFO", "setup.cfg"}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert found == {name for name in every if name.startswith(("rfclip/", "rfclip_kernels/"))} | generated
        assert b"__version__ = version = '1.2.3'" in archive.read("rfclip/_version.py")
    assert {"rfclip/py.typed", "rfclip_kernels/py.typed"} < every
    assert {"README.md", *PROJECT["license-files"]} < every


def test_pypi_shows_the_pictures(released, tmp_path):
    """With an address, no link of the description is relative, and each leads to a file there."""
    project = released / "pyproject.toml"
    address = "https://example.org/somebody/rfclip"
    before = project.read_text()
    project.write_text(before.replace("Paper = ", f'Source = "{address}"\nPaper = ', 1))
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=released, check=True, capture_output=True)
    project.write_text(before)
    shown = (tmp_path / "rfclip.egg-info/PKG-INFO").read_text()
    readme = (ROOT / "README.md").read_text()
    relative = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert len(relative) > 10 and "](docs/" not in shown and "](rfclip/" not in shown
    for path in relative:
        kind = "raw" if path.endswith(".png") else "blob"
        assert f"]({address}/{kind}/HEAD/{path}" in shown and (ROOT / path).is_file()


def test_a_checkout_without_tags_or_git_has_a_version(released):
    """It installs as well, with the version that the package states where it was never installed."""

    def version():
        command = [sys.executable, "-m", "setuptools_scm"]
        return subprocess.run(command, cwd=released, check=True, capture_output=True, text=True).stdout.strip()

    subprocess.run(["git", "tag", "--delete", "v1.2.3"], cwd=released, check=True, capture_output=True)
    assert re.fullmatch(r"0\.dev1\+g[0-9a-f]+", version())
    (released / ".git").rename(released / "elsewhere")
    (released / "rfclip/_version.py").unlink()
    shutil.rmtree(released / "rfclip.egg-info")
    code = "import rfclip; print(rfclip.__file__, rfclip.__version__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=released, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(released / "rfclip/__init__.py"), version()]
    assert version() == "0.dev0"
