"""The temporary folder of `rfclip serve`, and those that killed processes left."""

import subprocess
import sys
import tempfile

import pytest

from rfclip.app.folder import LOCK, PREFIX, temporary_folder

LIVE = """
import time
from rfclip.app.folder import temporary_folder
with temporary_folder() as folder:
    (folder / "gradio").mkdir()
    (folder / "gradio" / "upload.png").touch()
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def living(place, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setenv("TEMP", str(place))
    process = subprocess.Popen([sys.executable, "-c", LIVE], stdout=subprocess.PIPE, text=True)
    return process, place / process.stdout.readline().strip()


def test_it_goes_with_its_block(place):
    with temporary_folder() as folder:
        (folder / "gradio").mkdir()
        (folder / "gradio" / "upload.png").touch()
        assert list(place.iterdir()) == [folder]
    assert list(place.iterdir()) == []


def test_leftovers_of_the_dead(place, monkeypatch):
    """Only what was left by a killed process goes: the living keep theirs."""
    (dead, left), (alive, kept) = living(place, monkeypatch), living(place, monkeypatch)
    dead.kill()
    dead.wait()
    assert (left / "gradio" / "upload.png").exists()
    with temporary_folder() as folder:
        assert sorted(place.iterdir()) == sorted([kept, folder])
        assert (kept / "gradio" / "upload.png").exists()
    alive.kill()
    alive.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rules for links and no such signal")
def test_what_others_made(place, tmp_path_factory):
    """A folder without our lock, and links in place of a folder, of a lock or of a file, are not followed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / LOCK).touch()
    (elsewhere / "precious").touch()
    foreign = place / f"{PREFIX}foreign"
    foreign.mkdir()
    (foreign / "precious").touch()
    linked = place / f"{PREFIX}linked"
    linked.symlink_to(elsewhere)
    locked = place / f"{PREFIX}locked"
    locked.mkdir()
    (locked / LOCK).symlink_to(elsewhere / LOCK)
    inside = place / f"{PREFIX}inside"
    inside.mkdir()
    (inside / LOCK).touch()
    (inside / "folder").symlink_to(elsewhere)
    with temporary_folder() as folder:
        assert sorted(place.iterdir()) == sorted([foreign, linked, locked, folder])
    assert (foreign / "precious").exists() and (elsewhere / "precious").exists() and (elsewhere / LOCK).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="another user's folder")
def test_folders_of_other_users(place, monkeypatch):
    left = place / f"{PREFIX}other"
    left.mkdir()
    (left / LOCK).touch()
    import rfclip.app.folder as module

    monkeypatch.setattr(module.os, "geteuid", lambda: left.stat().st_uid + 1)
    with temporary_folder():
        assert left.exists()
