"""Fixtures for the whole suite. The session has a cache folder of its own: no test reads what an earlier run left."""

import copy

import open_clip
import pytest
import torch
from small_models import small_clip

from rfclip.towers.loading import tiny_folder


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def bundled_model_read_once():
    """Every load of the bundled model but the first is a copy, and its tokenizer, which has no state, the same.

    Models in other folders, and those of other processes, are read as ever.
    """
    create, find, tiny, known = open_clip.create_model, open_clip.get_tokenizer, f"local-dir:{tiny_folder()}", {}

    def create_model(name, *arguments, **options):
        if name != tiny or arguments:
            return create(name, *arguments, **options)
        key = str(sorted(options.items()))
        if key not in known:
            known[key] = create(name, **options)
        return copy.deepcopy(known[key])

    def get_tokenizer(name, **options):
        if name != tiny or options:
            return find(name, **options)
        if tiny not in known:
            known[tiny] = find(name)
        return known[tiny]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "create_model", create_model)
        patch.setattr(open_clip, "get_tokenizer", get_tokenizer)
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
