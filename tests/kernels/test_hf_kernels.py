"""The layout for Hugging Face's `kernels`, loaded by it without a network, next to the package itself."""

import json
from pathlib import Path

import pytest
import torch
from kernel_cases import check, masks, randn

import rfclip_kernels
from rfclip import reference
from tools.hf_kernels import BACKENDS, SOURCE, VERSION, lay_out

kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "rfclip-kernels"
    lay_out(folder)
    lay_out(folder)  # again, over what is there
    return folder


@pytest.fixture
def here(folder):
    """What is loaded: the repository, from which `kernels` chooses a variant, if PyTorch is built for a GPU."""
    return folder if torch.version.cuda or torch.version.hip else folder / "build/torch-cuda"


def test_it_is_loaded_under_a_name_of_its_own(folder, here, monkeypatch):
    kernel = kernels.get_local_kernel(here)
    assert kernel is not rfclip_kernels and Path(kernel.__file__).is_relative_to(folder)
    assert kernel.__all__ == rfclip_kernels.__all__ and set(kernel.__all__) < set(dir(kernel))
    (loaded,) = (each for each in kernels.get_loaded_kernels() if each.module is kernel)
    assert loaded.metadata.id == kernel.__name__ and loaded.metadata.version == VERSION
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/rfclip-kernels={here}")
    assert kernels.get_kernel("someone/rfclip-kernels", version=VERSION) is kernel


def test_its_operators_do_not_replace_those_of_the_package(here):
    B, H, T, D = 2, 2, 12, 16
    q, k, v = (randn(B, H, T, D, seed=seed) for seed in range(3))
    given = (*masks(B, T - 1, "overlapping"), 0.7)
    want = reference.refocused_attention(q.double(), k.double(), v.double(), *given)
    for package in (rfclip_kernels, kernels.get_local_kernel(here), rfclip_kernels):
        check(package.refocused_attention(q, k, v, *given), want, torch.float32)
        assert hasattr(getattr(torch.ops, package.__name__), "refocused_attention")
        with pytest.raises(ValueError, match="float64"):
            package.quick_gelu(q.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_in_a_variant(tmp_path, backend):
    """Of a layout of its own: whoever loads one leaves compiled files in it."""
    folder = tmp_path / "rfclip-kernels"
    lay_out(folder)
    variant = folder / f"build/torch-{backend}"
    assert {path.name for path in folder.iterdir()} == {"README.md", "build"}
    kept = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert {path.name for path in variant.iterdir()} == kept | {"metadata.json"}
    metadata = json.loads((variant / "metadata.json").read_text("utf-8"))
    assert metadata["backend"] == {"type": backend} and backend in metadata["id"]
