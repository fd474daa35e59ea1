"""Windows' rules, imposed on Linux: a file that the process holds stays where it is, and not every name is legal."""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import refused, run, segment
from helpers import linux_only
from miniatures import scene

import rfclip
from rfclip.app.cli import common
from rfclip.segment.classes import parse_classes
from rfclip.segment.job import Job

DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def legal(name):
    """Whether a file or a folder may have this name."""
    plain = not set(name) & set('<>:"/\\|?*') and min(map(ord, name)) >= 32
    return plain and name[-1] not in " ." and name.partition(".")[0].rstrip().casefold() not in DEVICES


def held():
    """The files that this process has open or mapped."""
    opened = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)}
    mapped = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text("utf-8").splitlines())
    return opened | {fields[5] for fields in mapped if len(fields) == 6}


@pytest.fixture
def windows(folder, monkeypatch):
    """An empty folder as the current one, where these rules hold while the test runs and names are checked after it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the rules are imposed by way of /proc")
    if sys.version_info < (3, 11):
        pytest.skip("pathlib has held on to the system's own functions")

    def impose(function):
        def obedient(*paths, **options):
            beside = options.get("dir_fd")
            at = os.getcwd() if beside is None else os.readlink(f"/proc/self/fd/{beside}")
            for path in (os.path.realpath(os.path.join(at, os.fspath(path))) for path in paths):
                if path in held():
                    raise PermissionError(13, "the process cannot access the file because it is being used", path)
            return function(*paths, **options)

        return obedient

    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, impose(getattr(os, name)))
    yield folder
    for parent, folders, files in os.walk(folder):
        assert [name for name in folders + files if not legal(name)] == []
        assert max(Counter(map(str.casefold, folders + files)).values(), default=1) == 1, parent


def done(result):
    assert result.exit_code == 0, result.output
    return result


def test_the_rules(windows):
    Path("a").write_text("a")
    Path("b").write_text("b")
    with open("a"):
        for act in (lambda: os.replace("b", "a"), lambda: Path("a").rename("c"), Path("a").unlink):
            with pytest.raises(PermissionError):
                act()
    os.replace("b", "a")
    with open("a"), pytest.raises(PermissionError):
        shutil.rmtree(windows)
    for name in ("con", "Aux.png", "com1.tar.gz", "a.", "a ", "a:b", "a?", "a\n"):
        assert not legal(name)
    for name in ("console.png", ".lock", "a b.png", "com10", "ä.png"):
        assert legal(name)


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_segment(windows, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    Path("pictures").mkdir()
    for number, name in enumerate(("a.png", "b.v2.jpg", "c .png", "d..png")):
        scene(number).save(Path("pictures", name))
        told = done(segment("pictures", "--format", format)).stderr
        assert "1 segmented" in told and ("skipped" in told) == bool(number)
    assert "4 segmented" in done(segment("pictures", "--format", format, "--overwrite")).stderr


def test_evaluate(windows):
    pytest.importorskip("torchmetrics")
    for options in ([], ["--overwrite"]):
        done(run("evaluate", "scenes", "--limit", 1, "--method", "kk", "--sheet", "sheet.png", *options))
        Path("sheet.png").unlink()


def test_calibrate(windows):
    scene(1).save("a.png")
    for options in ([], ["--overwrite"]):
        done(run("calibrate", "a.png", "--out", "found/dims.json", *options))


def test_explain(windows):
    pytest.importorskip("matplotlib")
    for name in ("a .png", "b..png"):
        scene(1).save(name)
        done(run("explain", name, "--layers", "2"))
    done(run("explain", "a .png", "--layers", "2", "--overwrite"))
    os.unlink("a .png")
    os.unlink("b..png")
    assert sorted(os.listdir("rfclip-explained")) == ["a", "b"]


def test_the_text_cache_can_be_removed(windows):
    for _ in range(2):  # written, then read
        with rfclip.Segmenter(cache="text") as segmenter:
            segmenter.text_embeddings(("cat",))
            assert len(os.listdir("text")) == 1
    shutil.rmtree("text")


@pytest.mark.parametrize("system, same", [("linux", False), ("darwin", True), ("win32", True)])
def test_names_that_differ_in_case(folder, monkeypatch, system, same):
    for path in ("one/a.png", "two/A.png", "three/A.jpg"):
        Path(path).parent.mkdir()
        Path(path).touch()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", system)
        found, _ = common.find_images(["one", "three"])
        assert [str(result) for _, result in found] == (["a.png", "A.jpg"] if same else ["a", "A"])
        assert common.distinct(found) == (found, [])
        found, _ = common.find_images(["one", "two"])
        whole, clashing = common.distinct(found)
        assert (len(whole), len(clashing)) == ((0, 2) if same else (2, 0))


@linux_only
def test_a_drives_colon(folder):
    """In the names of models and weights that the page shows."""
    path = Path("C:/weights/mine.safetensors")
    path.parent.mkdir(parents=True)
    path.touch()
    assert Job("ViT-B-16", str(path)).shown == ("ViT-B-16", "mine.safetensors")
    assert Job("local-dir:C:/weights").shown == ("local-dir:weights", None)
    assert Job("hf-hub:somebody/model").shown == ("hf-hub:somebody/model", None)


def test_no_such_drive(folder, monkeypatch):
    scene(1).save("a.png")
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "a.png")
    refused(segment("a.png", "--out", "Z:/out"), "--out Z:/out: there is no such drive")


def test_a_path_with_either_separator_is_no_class(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    for path in ("./lists/names", ".\\lists\\names", "../names", "..\\names"):
        with pytest.raises(ValueError, match="there is no file"):
            parse_classes(path)
