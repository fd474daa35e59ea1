"""The table of tiles: what is read, which entry a launch uses, and what a bad file is told."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from helpers import needs_triton

import rfclip_kernels
from rfclip_kernels import tiles
from rfclip_kernels.tiles import Entry, Tiles

GOOD = {
    "kernel": "self_attention",
    "dtype": "half",
    "dims": 64,
    "patches": None,
    "architectures": ["sm_90"],
    "rows": 128,
    "columns": 32,
    "warps": 4,
    "stages": 4,
}
pytestmark = pytest.mark.usefixtures("forgotten")


@pytest.fixture
def forgotten():
    yield
    tiles.use([])


def table(*entries, **changes):
    return {"format": "rfclip tiles 1", "entries": list(entries)} | changes


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "tiles.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return path

    return write


def chosen(architecture, *, kernel="self_attention", dtype="half", dims=64, patches=None):
    return tiles._chosen(kernel, dtype, dims, patches, architecture)


def test_the_package_has_tiles_for_every_launch():
    architectures = {name for entry in tiles.shipped() for name in entry.architectures}
    for kernel, dtype, dims, patches, name in product(
        tiles.KERNELS, ("half", "fp32"), tiles.DIMS, (*tiles.PATCHES, None), architectures
    ):
        dims = None if kernel == "cosine_aggregation" else dims
        assert chosen(name, kernel=kernel, dtype=dtype, dims=dims, patches=patches).stages > 1, "nothing runs ahead"


def test_no_two_entries_of_the_package_are_for_the_same():
    places = [
        (each.kernel, each.dtype, each.dims, each.patches, name)
        for each in tiles.shipped()
        for name in each.architectures
    ]
    assert len(places) == len(set(places))


def test_the_lowest_limits_that_hold():
    one, two, three, four = (Tiles(16, 16, 1, stages) for stages in (1, 2, 3, 4))
    tiles.use(
        [
            Entry("self_attention", "half", None, None, ("sm_90",), one),
            Entry("self_attention", "half", 64, None, ("sm_90",), two),
            Entry("self_attention", "half", 64, 1024, ("sm_90",), three),
            Entry("self_attention", "half", None, 256, ("sm_90", "gfx942"), four),
        ]
    )
    assert chosen("sm_90", dims=128) == one
    assert chosen("sm_90", dims=64) == chosen("sm_90", dims=32) == chosen("sm_90", patches=4096) == two
    assert chosen("sm_90", dims=64, patches=1024) == three
    assert chosen("sm_90", dims=64, patches=256) == chosen("gfx942", dims=80, patches=256) == four


def test_what_a_launch_asks_for(monkeypatch):
    asked = []
    monkeypatch.setattr(tiles, "_chosen", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(tiles, "architecture", lambda device: f"sm_{device.type}")
    x = torch.empty(0, dtype=torch.bfloat16)
    for kernel, images, patches in [("self_attention", 2, 128), ("self_attention", 2, 129), ("key_affinity", 9, 256)]:
        tiles.choose(kernel, x, images, patches, 80)
    tiles.choose("cosine_aggregation", x.float(), 1, 5000)
    assert asked == [
        ("self_attention", "half", 80, 256, "sm_cpu"),
        ("self_attention", "half", 80, 1024, "sm_cpu"),
        ("key_affinity", "half", 80, 256, "sm_cpu"),
        ("cosine_aggregation", "fp32", None, None, "sm_cpu"),
    ]


@pytest.mark.parametrize(
    ("architecture", "like"),
    [
        ("sm_89", "sm_89"),
        ("sm_87", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_75", "sm_80"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx950"),
        ("gfx1100", "gfx950"),
    ],
)
def test_gpus_that_are_not_in_the_table(architecture, like):
    assert tiles.nearest(architecture) == like
    assert chosen(architecture) == chosen(like)


@needs_triton
def test_the_architecture(monkeypatch):
    tiles.architecture.cache_clear()
    assert tiles.architecture(torch.device("cuda", 0)) == ("sm_80" if torch.version.hip is None else "gfx942")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, device.index))
    monkeypatch.setattr(torch.version, "hip", None)
    assert tiles.architecture(torch.device("cuda", 1)) == "sm_121"
    tiles.architecture.cache_clear()


def test_a_file_comes_first_for_what_it_has(file):
    before, own = chosen("sm_90"), Tiles(128, 32, 4, 4)
    assert before != own
    path = file(table(GOOD, GOOD | {"patches": 256, "architectures": ["sm_90", "gfx942"], "kernel": "key_affinity"}))
    assert rfclip_kernels.use_tiles(path) == {
        "sm_90": ["self_attention half D<=64", "key_affinity half D<=64 patches<=256"],
        "gfx942": ["key_affinity half D<=64 patches<=256"],
    }
    assert chosen("sm_90") == chosen("sm_90", dims=32) == own
    assert chosen("sm_100") != own and chosen("sm_90", dims=128) != own and chosen("sm_90", dtype="fp32") != own
    assert rfclip_kernels.use_tiles(file(table())) == {}
    assert chosen("sm_90") == before


def test_what_is_written_can_be_read(file):
    assert tiles.read(file(tiles.text(tiles.shipped()))) == tiles.shipped()
    assert tiles.SHIPPED.read_text("utf-8") == tiles.text(tiles.shipped())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tiles", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", 'expected {"format": "rfclip tiles 1", "entries": [...]}, got []'),
        (table(format="rfclip tiles 2"), 'got {"format": "rfclip tiles 2"'),
        (table(entries={}), "expected"),
        (table(GOOD, 3), "entry 1: expected an object with kernel, dtype, dims"),
        (table({name: value for name, value in GOOD.items() if name != "warps"}), "entry 0: expected an object with"),
        (table(GOOD | {"more": 1}), "entry 0: expected an object with"),
        (table(GOOD | {"kernel": "flash_attention"}), 'kernel must be one of ["row_logsumexp"'),
        (table(GOOD | {"dtype": "fp16"}), 'dtype must be one of ["half", "fp32"], got "fp16"'),
        (table(GOOD | {"dims": 80}), "dims must be one of [32, 64, 128, null], got 80"),
        (table(GOOD | {"patches": 500}), "patches must be one of [256, 1024, 4096, null], got 500"),
        (table(GOOD | {"rows": 48}), "rows must be one of [16, 32, 64, 128, 256], got 48"),
        (table(GOOD | {"rows": 64.0}), "rows must be one of [16, 32, 64, 128, 256], got 64.0"),
        (table(GOOD | {"columns": "64"}), 'columns must be one of [16, 32, 64, 128, 256], got "64"'),
        (table(GOOD | {"warps": True}), "warps must be one of [1, 2, 4, 8, 16], got true"),
        (table(GOOD | {"stages": 0}), "stages must be one of"),
        (table(GOOD | {"architectures": "sm_90"}), 'architectures must be a list such as ["sm_90", "gfx942"]'),
        (table(GOOD | {"architectures": ["H100"]}), "architectures must be a list"),
        (table(GOOD | {"kernel": "key_affinity", "rows": 16}), "columns must not exceed rows, got 32 and 16"),
    ],
)
def test_bad_files(content, message, file):
    before = chosen("sm_90")
    path = file(content)
    with pytest.raises(ValueError) as caught:
        rfclip_kernels.use_tiles(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert chosen("sm_90") == before


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        rfclip_kernels.use_tiles(tmp_path / "tiles.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "PyTorch finds no GPU; --device cpu is a dry run"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 is set"),
        (["--device", "cpu"], {}, "set TRITON_INTERPRET=1"),
    ],
)
@needs_triton
def test_a_measurement_without_a_gpu(arguments, variables, message, tmp_path):
    command = [sys.executable, "-m", "rfclip_kernels.autotune", "--out", str(tmp_path / "tiles.json"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
