"""Fixtures for the whole suite. The session has a cache folder of its own: no test reads what an earlier run left."""

import pytest
import torch
from small_models import small_clip


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_compiler():
    """What earlier tests compiled counts towards the limit of one function's compilations."""
    torch.compiler.reset()


@pytest.fixture
def model():
    return small_clip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder as the current one, for relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
