"""What works where Triton, the optional parts of torchvision, or the extras of this package are not installed."""

import sys

import pytest
from commands import refused, run, state
from distributions import BASE, modules_beyond, run_without
from helpers import needs_triton
from miniatures import scene
from packaging.requirements import Requirement

import rfclip
from rfclip.towers.loading import tiny_folder

SCENE = str(tiny_folder() / "scene.png")
OPTIONAL_PARTS_OF_TORCHVISION = {"image", "image_stable", "gdown", "scipy"}  # the first two: its codecs, by release

USE = f"""
import torch
from typer.testing import CliRunner
import rfclip, rfclip_kernels
from rfclip.app.cli import app

def run(expected, *arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == expected, result.output
    return " ".join(result.output.split())

run(0, "segment", {SCENE!r}, "--classes", "tiger, mushroom, grass, sky")
model = rfclip.load_model()
with rfclip.refocus(model):
    assert rfclip.dense_features(model, torch.zeros(1, 3, 112, 112)).shape == (1, 128, 14, 14)
"""

WITHOUT_TRITON = """
ASKED = ("--classes", "dog", "--model", "rfclip-tiny")
from rfclip import reference
from rfclip.ops import choose

assert choose("auto", torch.device("cpu"), torch.float32).backend == "eager"
for device in ("cpu", "cuda"):
    try:
        choose("triton", torch.device(device), torch.float16)
    except ValueError as error:
        assert 'backend="triton": Triton is not installed; use backend="eager", or "auto"' in str(error), error
    else:
        raise AssertionError("not refused")
assert "Triton is not installed" in run(2, "segment", "scene.png", *ASKED, "--backend", "triton")
assert "eager: Triton is not installed" in run(0, "info")
try:
    rfclip_kernels.refocused_attention
except ModuleNotFoundError as error:
    assert error.name == "triton", error
else:
    raise AssertionError("not refused")
"""

KERNELS = """
import torch, rfclip_kernels
assert "triton" not in sys.modules
assert rfclip_kernels.launchers().keys() == set(rfclip_kernels.__all__)
for name in rfclip_kernels.__all__:
    assert callable(getattr(rfclip_kernels, name)), name
assert "triton" in sys.modules and "rfclip" not in sys.modules
"""


def test_without_triton(tmp_path):
    scene(1).save(tmp_path / "scene.png")
    run_without({"triton"}, USE + WITHOUT_TRITON, cwd=tmp_path)


def test_without_the_optional_parts_of_torchvision(tmp_path):
    run_without(OPTIONAL_PARTS_OF_TORCHVISION, USE, "-W", "error::UserWarning", cwd=tmp_path)


def test_without_extras(tmp_path):
    """With nothing but what the dependencies of this package bring."""
    code = USE + f"run(0, 'calibrate', {SCENE!r})\nrun(0, 'methods')\nrun(0, 'models')"
    run_without(modules_beyond(BASE), code, cwd=tmp_path)


@needs_triton
def test_the_kernels_need_torch_and_triton_only(tmp_path):
    needs = [Requirement("torch"), Requirement("triton")]
    run_without(modules_beyond(needs), KERNELS, cwd=tmp_path)


EVALUATE, EXPLAIN, SERVE = ["evaluate", "scenes"], ["explain", "a.png"], ["serve"]
SEGMENT = ["segment", "a.png", "--classes", "cat"]
NEEDS = [
    ("matplotlib", "evaluate", EVALUATE),
    ("torchmetrics", "evaluate", EVALUATE),
    ("torchmetrics", "evaluate", ["ablate", "4"]),
    ("matplotlib", "explain", EXPLAIN),
    ("matplotlib", "serve", SERVE),
    ("gradio", "serve", SERVE),
    ("pyarrow", "parquet", [*SEGMENT, "--format", "parquet"]),
    ("ray", "ray", [*SEGMENT, "--engine", "ray"]),
    ("ray", "ray", [*EVALUATE, "--engine", "ray"]),
    ("transformers", "transformers", [*SEGMENT, "--model", "transformers:openai/clip-vit-base-patch16"]),
    (
        "transformers",
        "transformers",
        [*SEGMENT, "--model", "ViT-L-14-CLIPA", "--pretrained", "datacomp1b"],
    ),
    ("rasterio", "geo", [*SEGMENT, "--scale", "1"]),
    ("av", "video", ["segment", "camera:0", "--classes", "cat"]),
    ("pycocotools", "prepare", ["prepare", "context", "--root", "data"]),
]


@pytest.mark.parametrize("package, extra, command", NEEDS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_missing_extra_is_named_before_any_work(folder, monkeypatch, package, extra, command):
    def load_model(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(rfclip.towers.open_clip.open_clip, "create_model", load_model)
    scene(1).save("a.png")
    before = state(folder)
    refused(run(*command), package, f'pip install "rfclip[{extra}]"')
    assert state(folder) == before
