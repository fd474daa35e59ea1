"""Every kernel on the example inputs that the report and the benchmarks use, for every dtype, with any prefix."""

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, check, dtypes, inside_nan, pretended_compilation

import rfclip_kernels
from rfclip import reference
from rfclip_kernels import autotune, tiles
from rfclip_kernels.registry import EXAMPLES, KERNELS, Sizes

SIZES = {"B": 2, "H": 2, "L": 2, "grid": (3, 7), "names": 7, "patch": 3, "iterations": 2, "device": DEVICE}
HEADS = [example for example in EXAMPLES if example.sweep]
every_example = pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if example.module], ids=lambda example: example.name
)


LISTED = sorted({(each.kernel, each.dtype, each.tiles.rows, each.tiles.columns) for each in tiles.shipped()})


def compare(example, sizes, dtype, padded=inside_nan):
    """Run the kernel on inputs that lie within NaN, and the reference on the same values in float64."""
    inputs = example.inputs(sizes)
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    want = getattr(reference, example.operation)(**exact)
    given = {
        name: padded(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    got = getattr(rfclip_kernels, example.operation)(**given)
    if isinstance(want, tuple):
        for one, other in zip(got, want, strict=True):  # vectors that only help the next layer are left out
            compare_results(one[:, : other.shape[1]], other, dtype)
    else:
        compare_results(got, want, dtype)


def compare_results(got, want, dtype):
    if want.is_floating_point():
        check(got, want, got.dtype) if got.dtype == dtype else check_scores(got, want, dtype)
    else:
        assert got.dtype == want.dtype
        assert (got == want).double().mean() > 0.99  # a label or a mask may tip over by rounding
        assert len(got.unique()) > 1


def check_scores(got, want, dtype):
    """Scores are float32 whatever the dtype of the inputs, and an affinity is float16."""
    assert got.dtype in (torch.float32, torch.float16)
    check(got.to(dtype) if dtype != torch.float32 else got, want, dtype)


@every_example
@dtypes
def test_every_kernel(example, dtype):
    compare(example, Sizes(D=32, dtype=dtype, **SIZES), dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter does not compile for what addresses are divisible by")
@every_example
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_aligned_inputs(example, dtype):
    """As a tower has them, and as the memory checks of `make gpu` run them, which find these kernels compiled."""
    compare(example, Sizes(D=32, dtype=dtype, **SIZES), dtype, padded=torch.clone)


@pytest.mark.parametrize("example", HEADS, ids=lambda example: example.name)
@pytest.mark.parametrize(("prefix", "D"), [(0, 80), (2, 32), (5, 80)])
def test_a_prefix(example, prefix, D):
    """Without a class token, and with registers."""
    compare(example, Sizes(D=D, prefix=prefix, dtype=torch.float32, **SIZES), torch.float32)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("chosen", ["none", "one", "all"])
def test_targets_in_the_prefix(prefix, chosen):
    (example,) = (example for example in EXAMPLES if example.operation == "refocused_attention")
    inputs = example.inputs(Sizes(D=32, prefix=prefix, dtype=torch.float32, **SIZES))
    given = torch.zeros(2, prefix, dtype=torch.bool, device=DEVICE)
    given[:, {"none": slice(0, 0), "one": slice(prefix - 1, prefix), "all": slice(None)}[chosen]] = True
    for patches in (inputs["target"], torch.zeros_like(inputs["target"])):
        inputs["target"] = torch.cat([given, patches], dim=1)
        exact = {name: value.double() if name in "qkv" else value for name, value in inputs.items()}
        want = reference.refocused_attention(**exact)
        check(rfclip_kernels.refocused_attention(**inputs), want, torch.float32)


@pytest.mark.parametrize("listed", LISTED, ids=lambda listed: "{}-{}-{}x{}".format(*listed))
def test_tiles_of_the_table(listed):
    """Of any GPU, over more patches than a tile has, whose number is odd."""
    kernel, kind, rows, columns = listed
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    chosen = tiles.Tiles(rows, columns, warps=4, stages=1)
    architecture = tiles.architecture(torch.empty(0, device=DEVICE).device)
    with autotune.using([tiles.Entry(kernel, kind, None, None, (architecture,), chosen)]):
        for example in EXAMPLES:
            if example.name in autotune.TIMED[kernel]:
                compare(example, Sizes(D=24, dtype=dtype, **SIZES | {"B": 1, "grid": (9, 17)}), dtype)


@pytest.mark.skipif(DEVICE != "cpu", reason="a measurement takes minutes")
def test_a_dry_run_of_the_measurement(tmp_path, capsys):
    out = tmp_path / "new" / "tiles.json"
    assert autotune.main(["--device", "cpu", "--out", str(out)]) == 0
    try:
        found = rfclip_kernels.use_tiles(out)
    finally:
        tiles.use([])
    names = [f"{kernel} half D<=64 patches<=256" for kernel in autotune.TIMED if kernel != "cosine_aggregation"]
    assert found == {"sm_80": [*names, "cosine_aggregation half patches<=256"]}
    printed = capsys.readouterr()
    heads, *lines = (line.split(" | ") for line in printed.out.splitlines())
    assert heads == ["entry", "size", "default", "fastest", "speedup", "fastest at this size", "speedup"]
    assert [name for name, *_ in lines] == found["sm_80"]
    for _, size, default, fastest, faster, own, _ in lines:
        assert size == "48x80b1" and fastest == own
        assert float(faster) == 1 if fastest == default else float(faster) >= 1.02
    log = [line.split(" | ") for line in printed.err.splitlines()[:-1]]
    tried = {kernel: [line for line in log if line[0] == kernel] for kernel in autotune.TIMED}
    assert sum(map(len, tried.values())) == len(log)
    for kernel, found in tried.items():
        assert len(found) >= len(autotune.candidates(kernel, "cpu")) and all(" us" in line[-1] for line in found)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.skipif(DEVICE != "cpu", reason="it asks for the interpreter")
def test_the_same_measurement_without_time(tmp_path, capsys):
    out = tmp_path / "tiles.json"
    arguments = ["--device", "cpu", "--out", str(out), "--minutes", "0", "--kernels", "row_logsumexp,key_affinity"]
    assert autotune.main(arguments) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 and not out.exists()
    assert printed.err.splitlines() == ["row_logsumexp: no time was left", "key_affinity: no time was left"]
    with pytest.raises(SystemExit):
        autotune.main([*arguments[:-1], "row_logsumexp,key_cosine"])
    assert "unknown: key_cosine" in capsys.readouterr().err


def test_what_fails_or_is_wrong_does_not_count(monkeypatch):
    sizes = Sizes(H=1, grid=(3, 5), device=DEVICE)
    entry = autotune.entry_of("key_affinity", sizes)
    odd, wrong, right = (tiles.Tiles(rows, rows, 4, 1) for rows in (48, 64, 16))
    agree = autotune.agree
    monkeypatch.setattr(autotune, "agree", lambda got, want: tiles._used[0].tiles != wrong and agree(got, want))
    monkeypatch.setattr(autotune, "seconds", lambda function, device: 1e-6)
    case = autotune.Case("48x80b1", entry, autotune.calls_of(entry.kernel, sizes), DEVICE)
    said = [case.time(one) for one in (entry.tiles, odd, wrong, right)]
    assert said[0] == said[3] == "1.0 us" and "Error" in said[1] and said[2] == "another result"
    assert case.times == {entry.tiles: [1e-6], right: [1e-6]}


def test_the_fastest_by_more_than_noise():
    default, one, two, three = (tiles.Tiles(32, 32, 4, stages) for stages in (1, 2, 3, 4))
    entry = tiles.Entry("self_attention", "half", 64, 256, ("sm_90",), default)
    small, large = (autotune.Case(name, entry, [], DEVICE) for name in ("small", "large"))
    small.times = {default: [1.0, 1.0], one: [0.5, 1.0], two: [0.99, 0.99], three: [0.1, 0.1]}
    large.times = {default: [10.0, 10.0], one: [10.0, 10.0], two: [9.9, 9.9]}  # the last one failed there
    assert autotune.speedup([small, large], one) == pytest.approx(2**0.25)
    assert autotune.fastest([small, large]) == one
    assert autotune.fastest([large]) == default
    assert autotune.fastest([small]) == three


@pytest.mark.skipif(DEVICE != "cpu", reason="the same without a GPU")
def test_workers_that_fail_hang_or_die(monkeypatch):
    monkeypatch.setattr(autotune, "PATIENCE", 1)
    every = {rows: tiles.Tiles(rows, 32, 4, 1) for rows in (16, 32, 64, 256, 128)}
    with autotune.workers("cuda") as pool:
        jobs = {one: pool.apply_async(pretended_compilation, (one,)) for one in every.values()}
        for rows in (16, 32, 256):  # the last by another process than the one that 64 ends
            jobs[every[rows]].wait(120)
        found = dict(autotune.finished(jobs, float("inf")))
    never = "no time was left, or its compilation hangs or died"
    assert found == {every[16]: None, every[32]: "spills", every[64]: never, every[128]: never, every[256]: None}


def test_every_kernel_has_an_example():
    assert set(KERNELS) == set(rfclip_kernels.__all__) == set(rfclip_kernels.launchers())
    assert set(autotune.TIMED) == set(tiles.KERNELS)
    assert set(TOLERANCE) == {torch.float32, torch.float16, torch.bfloat16}
