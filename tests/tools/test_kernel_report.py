"""The report: what it records, counts and calls a fault, without compiling more than a few kernels."""

# ruff: noqa: E402

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.compiler import ASTSource

import rfclip_kernels
from rfclip_kernels import attention, tiles
from rfclip_kernels.registry import Example
from rfclip_kernels.upsample import launch_average_windows
from tools.kernel_report import report
from tools.kernel_report.launches import OPS, SHAPES, Launch, Shape, cost, record, recording

OP = {op.name: op for op in OPS}

# What the kernels multiply when they run: every tl.dot of the interpreter, on tensors like those of the report.
COUNT_DOTS = """
import json
from collections import Counter
import torch
from triton.runtime.interpreter import InterpreterBuilder
import rfclip_kernels

done = Counter()
create_dot = InterpreterBuilder.create_dot

def counting(self, a, b, *rest):
    done["operations"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
    return create_dot(self, a, b, *rest)

InterpreterBuilder.create_dot = counting
x = torch.randn(12, 1, 12, 37, 32, dtype=torch.float16)
none = torch.zeros(1, 36, dtype=torch.bool)
calls = {
    f"refocused_attention {n}": lambda n=n: rfclip_kernels.refocused_attention(
        x[0], x[1], x[2], none, torch.arange(36)[None] < n, 0.7
    )
    for n in (0, 4, 36)
}
calls["self_attention"] = lambda: rfclip_kernels.self_attention(x[0], x[0], x[1])
calls["proxy_attention"] = lambda: rfclip_kernels.proxy_attention(x, x[0])
calls["key_similarity, first block"] = lambda: rfclip_kernels.key_similarity(x[0])
calls["received_attention"] = lambda: rfclip_kernels.received_attention(x[0], x[1])
counts = {}
for name, call in calls.items():
    done.clear()
    call()
    counts[name] = done["operations"]
print(json.dumps(counts))
"""


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "tensor_memory", "expected"),
    [
        ("sm_80", 168, 0, 8, 0, 8 / 64),  # 21 units a warp, 3 warps a partition: one program of 8
        ("sm_90", 64, 48 * 1024, 4, 0, 16 / 64),  # registers for 8 programs, 228 // 49 = 4 by shared memory
        ("sm_86", 32, 0, 1, 0, 16 / 48),  # the most programs
        ("sm_89", 40, 0, 4, 0, 1.0),  # 5 units: 12 warps a partition
        ("sm_86", 32, 100 * 1024, 4, 0, 0.0),  # a program gets 99 KiB at most
        ("sm_100", 32, 0, 4, 256, 8 / 64),  # half of the tensor memory each
        ("gfx942", 128, 0, 4, 0, 16 / 32),  # 4 waves a SIMD
        ("gfx942", 64, 40 * 1024, 8, 0, 8 / 32),
        ("gfx942", 24, 0, 4, 0, 1.0),
        ("sm_120", 32, 0, 1, 0, 24 / 48),
        ("gfx950", 64, 40 * 1024, 8, 0, 1.0),  # 160 KiB
    ],
)
def test_occupancy(target, registers, shared, warps, tensor_memory, expected):
    assert report.TARGETS[target].occupancy(registers, shared, warps, tensor_memory) == expected


@pytest.mark.parametrize(("target", "precision"), [("sm_80", "tf32x3"), ("gfx950", "ieee")])
def test_the_recorded_launch_is_the_one_that_runs(target, precision, monkeypatch):
    _, launch = record(OP["refocused_attention"], Shape("ViT-B/16"), target).launches
    monkeypatch.setattr(tiles, "architecture", lambda device: target)
    options = tiles.choose("refocused_attention", torch.empty(0, dtype=torch.float16), 1, 196, 64).options
    assert launch.kernel is attention.refocused_attention_kernel
    assert launch.grid == (-(-197 // options["BM"]) * 12,)
    expected = {"H": 12, "T": 197, "beta": 0.7, "D": 64, "stride_qt": 3 * 768, "PRECISION": precision}
    assert {name: launch.arguments[name] for name in expected | options} == expected | options
    assert launch.arguments["order_ptr"].dtype == torch.int32


def test_every_target_is_compiled_with_its_own_tiles(monkeypatch):
    """Whatever is in the table: here tiles that no kernel has, which tell the targets apart."""
    own = {name: tiles.Tiles(16, 16, 2, 1 + place % 6) for place, name in enumerate(report.TARGETS)}
    own["sm_90"] = replace(own["sm_90"], rows=256)
    entries = [tiles.Entry("self_attention", "half", None, None, (name,), one) for name, one in own.items()]
    monkeypatch.setattr(report, "OPS", [OP["self_attention"]])
    tiles.use(entries)
    try:
        found = report.jobs()
    finally:
        tiles.use([])
    place = attention.self_attention_kernel.arg_names.index
    for line, jobs in found.items():
        for job in jobs if line.dtype != "fp32" else []:
            sides = [job.constants[(place(side),)] for side in ("BM", "BN")]
            assert tiles.Tiles(*sides, *(job.options[name] for name in ("num_warps", "num_stages"))) == own[line.target]
    assert {line.target for line in found} == set(own)
    monkeypatch.setattr(report, "SIZES", report.SIZES[:1])
    assert {line.target for line in report.jobs(["sm_90", "gfx942"])} == {"sm_90", "gfx942"}


def test_an_unknown_target_is_refused_before_any_work(capsys):
    with pytest.raises(SystemExit):
        report.main(["--targets", "sm_90,sm_75"])
    assert "--targets sm_75: expected some of sm_80, sm_86, " in capsys.readouterr().err


def test_every_entry_of_the_table_is_compiled():
    """What the report compiles has every head dimension, number of patches, dtype and architecture that tiles can."""
    patches = {Shape("ViT-B/16", size).sizes.N for size in report.SIZES}
    assert {tiles.limit("self_attention", 1, N) for N in patches} == {*tiles.PATCHES, None}
    assert {min(most for most in tiles.DIMS if most >= D) for D in report.HEAD_DIMS} == set(tiles.DIMS)
    assert report.DTYPES.keys() == tiles.DTYPES.keys()
    assert {name for entry in tiles.shipped() for name in entry.architectures} == set(report.TARGETS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_launches_go_to_the_gpu_of_the_tensors(op, monkeypatch):
    current = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *exception):
            current.pop()

    def launched(*arguments, **keywords):
        assert [device.type for device in current[-1:]] == ["cuda"]
        return run(*arguments, **keywords)

    run = Launch.__init__
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(Launch, "__init__", launched)
    assert record(op, Shape("ViT-B/16")).launches


def test_a_launch_is_specialized_as_triton_would():
    _, launch = record(OP["refocused_attention"], Shape("ViT-L/14")).launches
    job = report.specialize(launch, "sm_90")
    place = launch.kernel.arg_names.index
    aligned = [["tt.divisibility", 16]]
    assert job.signature["q_ptr"] == "*fp16" and job.signature["beta"] == "fp32" and job.signature["T"] == "i32"
    assert job.attributes[(place("q_ptr"),)] == job.attributes[(place("stride_qt"),)] == aligned
    assert not job.attributes.get((place("H"),))  # 16 heads, which the kernel asks not to be compiled in
    assert job.constants[(place("stride_qd"),)] == 1


# Kernels whose only quotients are scales and weights: none is compared with what was not divided like it.
NORMALIZE = {
    "affinity_kernel",
    "average_windows_kernel",
    "cut_first_kernel",
    "cut_kernel",
    "cut_next_kernel",
    "cut_round_kernel",
    "key_similarity_kernel",
    "pamr_kernel",
    "proxy_attention_kernel",
    "quick_gelu_kernel",
    "refocused_attention_kernel",
    "row_logsumexp_kernel",
    "self_attention_kernel",
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_fp32_stays_fp32_and_quotients_are_rounded_correctly(op):
    """PyTorch 2.11's Inductor passes floats as fp64; and on NVIDIA Triton's `/` multiplies with a rough reciprocal."""
    for launch in record(op, Shape("ViT-B/16")).launches:
        job = report.specialize(launch, "sm_90")
        signature = {name: "fp64" if kind == "fp32" else kind for name, kind in job.signature.items()}
        source = ASTSource(launch.kernel, signature, job.constants, job.attributes)
        code = triton.compile(source, target=report.TARGETS["sm_90"].gpu, options=job.options).asm["ptx"]
        if "fp64" in signature.values():
            wide = {line.split()[0] for line in code.splitlines() if ".f64" in line}
            assert wide <= {".param", "cvt.rn.f32.f64"}
        assert job.name in NORMALIZE or not re.search(r"div\.(full|approx)", code)


def test_operations_are_those_of_the_interpreter():
    run = [sys.executable, "-c", COUNT_DOTS]
    done = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, counted in json.loads(done.stdout).items():
        op, *target = name.split() if name.startswith("refocused") else [name]
        recorded = record(OP[op], Shape("ViT-B/16", (96, 96), D=32), "sm_80").launches  # the interpreter's
        launches = [launch for launch in recorded if launch.products.tiles is not None]
        expected = sum(launch.operations for launch in launches)
        vectors = sum(  # products with the key of CLS, which are not tl.dot
            launch.products.vectors(a := launch.arguments) * math.prod(launch.grid) * 2 * a["BM"] * a["BD"]
            for launch in launches
        )
        assert vectors > 0
        assert expected[int(target[0]) if target else 0] == counted + vectors, name


def test_bytes_count_each_tensor_once_for_each_launch():
    k, lse, similarity = 12 * 197 * 64 * 2, 12 * 197 * 4, 196 * 196 * 4
    recording = record(OP["key_similarity, later block"], Shape("ViT-B/16"))
    assert recording.least == k + 2 * similarity
    assert recording.moved == (k + lse) + (k + lse + 2 * similarity)


def test_operators_of_pytorch_count_and_views_do_not():
    def steps(x):
        return x[0].transpose(0, 1).float().add_(1).transpose(0, 1)

    recording = record(Example("steps", lambda s: {"x": s.tensor(1, 8, 4)}), Shape("ViT-B/16"), function=steps)
    assert recording.moved == (32 * 2 + 32 * 4) + 2 * 32 * 4
    assert recording.least == 32 * 2 + 32 * 4


@pytest.mark.parametrize(
    ("target", "stages", "kind", "overlap"),
    [
        ("sm_80", 2, "mma.sync", False),
        ("sm_80", 3, "mma.sync", True),
        ("sm_90", 3, "wgmma.mma_async", True),
        ("sm_100", 3, "tcgen05.mma", True),
        ("sm_120", 2, "mma.sync", False),
        ("gfx942", 1, "v_mfma", False),
        ("gfx942", 2, "v_mfma", True),
        ("gfx950", 2, "v_mfma", True),
    ],
)
def test_tensor_cores_and_prefetch(target, stages, kind, overlap):
    (launch,) = record(OP["self_attention"], Shape("ViT-B/16"), target).launches
    options = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": stages}
    outcome = report.compile_job(report.specialize(replace(launch, arguments=launch.arguments | options), target))
    assert not outcome.faults and set(outcome.tensor_cores) == {kind}
    assert (outcome.prefetch > 0) == overlap
    ((*_, shown, ahead, _),) = report.line_rows({report.Line("sweep", "fp16", 64, target): 2 * [outcome]})
    assert (shown, ahead) == (f"{outcome.tensor_cores[kind]} {kind}", outcome.prefetch)


def test_prefetch_is_the_least_of_all_loops_of_products():
    loop = """\
  %a:2 = scf.for %i = %zero to %n step %one iter_args(%b = %c) -> (f32)  : i32 {{
    {}
  }} loc(#loc)
"""
    copy, product, wait = (
        "%t = ttg.async_commit_group tokens %c",
        "%d = tt.dot %q, %k",
        "%w = ttg.async_wait {num = 2 : i32}",
    )
    ahead = loop.format("\n    ".join([wait, product, product, copy, copy]))
    assert report.prefetch(ahead) == 2
    registers = ["%x = amdg.buffer_load %p", product, "%y = amdg.buffer_load %p", "ttg.local_store %x, %s"]
    assert report.prefetch(loop.format("\n    ".join(registers))) == 1
    assert report.prefetch(loop.format("\n    ".join(registers).replace("local_store %x", "local_store %z"))) == 0
    assert report.prefetch(ahead + loop.format("\n    ".join([wait.replace("2", "0"), product, copy]))) == 0
    assert report.prefetch(ahead + loop.format(product)) == 0
    assert report.prefetch(loop.format(copy)) is None


def test_only_the_first_axis_of_a_grid_is_long():
    """The second and the third have at most 65535 programs on NVIDIA."""
    picture, K = (70000, 16), 5000
    with recording() as found:
        logits, names = torch.empty(1, K, 1, 1, device="cuda"), torch.empty(K, dtype=torch.int64, device="cuda")
        launch_average_windows(logits, [(0, 0)], 16, 16, *picture)
        rfclip_kernels.upsample_argmax(logits[0], picture, 1.0, names)
        rfclip_kernels.pamr(torch.empty(2, 3, *picture, device="cuda"), torch.empty(2, 9, *picture, device="cuda"), 1)
        many = torch.empty(70000, 33, device="cuda")
        rfclip_kernels.defocus_mask(many, many > 0, threshold="otsu")
    grids = {launch.kernel.__name__: launch.grid for launch in found.launches}
    assert grids == {
        "average_windows_kernel": (70000 * 1250,),
        "upsample_argmax_kernel": (70000,),
        "pamr_kernel": (2 * 70000,),
        "otsu_kernel": (3 * 70000,),
        "defocus_kernel": (70000,),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.model}-{s.image}")
@pytest.mark.parametrize("op", [op for op in OPS if op.sweep and op.sweep.goal], ids=lambda op: op.name)
def test_goals(op, shape):
    found = cost(op, shape)
    assert not found.missed()
    assert min(found.flash_worst / found.flash, found.least, found.moved) >= 1 - 1e-9


def test_faults_end_in_exit_code_1(monkeypatch, capsys):
    def line(name, op, dtype, D, **changes):
        launches = record(OP[op], Shape("ViT-B/16", dtype=dtype, D=D)).launches
        launch = next(launch for launch in launches if launch.products.tiles is not None)
        job = report.specialize(replace(launch, arguments=launch.arguments | changes), "sm_80")
        return {report.Line(name, "-", D, "sm_80"): [job]}

    sound = line("sound", "received_attention", torch.float16, 32)
    uncounted = {
        report.Line("uncounted", "-", 32, "sm_80"): [replace(job, products="unknown") for job in [*sound.values()][0]]
    }
    bad = line("stripped", "received_attention", torch.float32, 32, PRECISION="ieee", BM=16, BN=16)
    bad |= line("spilling", "refocused_attention", torch.float16, 128, num_warps=1, BM=32, BN=32)
    bad |= line("failing", "received_attention", torch.float16, 32, BM=48)
    monkeypatch.setattr(report, "OPS", [])
    monkeypatch.setattr(report, "FORWARDS", [])
    monkeypatch.setattr(report, "in_its_own_process", lambda: list)
    monkeypatch.setattr(report, "jobs", lambda targets: sound | uncounted | bad)
    assert report.main([]) == 1
    out, err = capsys.readouterr()
    assert "| sound | - | 32 | sm_80 |" in out
    faults = dict(fault.split(" | - | ") for fault in err.splitlines())
    assert set(faults) == {"uncounted", "stripped", "spilling", "failing"}
    assert "its operations are not counted" in faults["uncounted"]
    assert "no tensor cores" in faults["stripped"]
    assert "spills" in faults["spilling"]


def test_summary_gives_a_line_for_each_kernel():
    def outcomes(registers, occupancy):
        return [report.Outcome(registers, tensor_cores={"wgmma": 4}, occupancy=occupancy) for registers in registers]

    compiled = {
        report.Line("sweep", "fp16", 64, "sm_80"): outcomes([100, 128], 0.25),
        report.Line("sweep", "fp16", 64, "sm_90"): outcomes([168], 0.125),
        report.Line("sweep", "fp16", 64, "gfx942"): outcomes([90], 0.5),
        report.Line("cut", "fp32", "-", "sm_80"): [report.Outcome(40, spilled=8, occupancy=1.0)],
    }
    assert report.kernel_rows(compiled) == [
        ("sweep", 4, "90-168", 0, "yes", "12%-25%", "50%"),
        ("cut", 1, "40", 8, "-", "100%", "-"),
    ]
