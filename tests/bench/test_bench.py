"""The benchmarks: one quick run as a whole, and their parts against values worked out by hand."""

# ruff: noqa: E402

import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("triton", reason="Triton is not installed")

from open_clip.transformer import QuickGELU

from bench import end_to_end, kernels, measure, roofline, tables, towers
from bench.__main__ import main
from rfclip.methods import METHODS
from rfclip.ops.dispatch import QUICK_GELUS, backend
from tools.kernel_report.launches import OPS, Shape

SMALL = "ViT-S-32"
ROOT = Path(__file__).parents[2]


def report(**ratios):
    rows = [towers.Memory("a case", name, 1, 2, ratio) for name, ratio in ratios.items()]
    return tables.Report({"gpu": None}, {}, SMALL, "", memory=rows)


def test_a_quick_run_writes_whole_files_and_fails_on_a_regression(tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"ratios": {"tower, 224x224, batch 1, fp32, eager": 0.001}}))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "bench",
        "--quick",
        "--model",
        SMALL,
        "--only",
        "kernels,towers,methods,memory,roofline",
    ]
    done = subprocess.run(
        [*command, "--out", out, "--compare", earlier],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr  # for the planted regression
    assert "regression: tower, 224x224, batch 1, fp32, eager" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "cost.png"]
    assert done.stdout.strip() == (out / "bench.md").read_text("utf-8").strip()
    with Image.open(out / "cost.png") as picture:
        picture.load()

    found = json.loads((out / "bench.json").read_text("utf-8"))
    assert {"cpu", "cores", "ram_gb", "gpu"} <= found["machine"].keys()
    assert {"torch", "triton", "open_clip_torch", "rfclip", "commit", "date"} <= found["versions"].keys()
    assert [row["implementation"] for row in found["towers"]] == ["open_clip", "reference", "eager"]
    eager = found["towers"][-1]
    assert eager["rounds"] == 2 and eager["seconds"] > 0 and eager["error"] < 1e-5
    assert [row["implementation"] for row in found["memory"]] == ["plain", "reference", "eager"]
    assert all(row["peak"] >= row["loaded"] > 10**8 for row in found["memory"])
    rows = [row["implementation"] for row in found["methods"]]
    assert rows[: len(METHODS) + 2] == ["open_clip", *METHODS, "open_clip"]
    in_windows = rows[len(METHODS) + 2 :]
    assert {"clearclip", "clearclip, across windows", "rf-clip, across windows", "resclip, both passes"} < {*in_windows}
    assert all(row["ratio"] > 0 and row["goal"] is None for row in found["methods"])
    assert len(found["ratios"]) == 7 + len(METHODS) + len(in_windows) and found["failures"] == []

    titles = [line for line in done.stdout.splitlines() if line.startswith("## Roofline")]
    assert len(titles) == 2 and all("projected, not measured" in title for title in titles)


def test_comparison():
    earlier = json.loads(report(eager=1.0, reference=2.0).json())
    assert tables.regressions(report(eager=1.0, reference=2.0), earlier) == []
    assert tables.regressions(report(eager=1.09, reference=1.0), earlier) == []
    (line,) = tables.regressions(report(eager=1.11, reference=2.0, another=9.0), earlier)
    assert line == "memory, a case, eager: 1.110, was 1.000"


def test_a_section_that_fails_is_reported_and_the_rest_is_written(tmp_path, monkeypatch, capsys):
    def broken(quick):
        raise RuntimeError("no such kernel")

    projected = roofline.Projection("defocus_mask", "ViT-B/16", "224x224", dict.fromkeys(roofline.GPUS, 1e-6))
    monkeypatch.setattr("bench.__main__.time_kernels", broken)
    monkeypatch.setattr("bench.__main__.project", lambda shapes: [projected])
    assert main(["--quick", "--only", "kernels,roofline", "--out", str(tmp_path)]) == 1
    assert "kernels: RuntimeError: no such kernel" in capsys.readouterr().err
    written = (tmp_path / "bench.md").read_text("utf-8")
    assert "**Failed: kernels: RuntimeError: no such kernel**" in written and "## Roofline of the towers" in written


def test_an_unknown_section_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "towers,cells"])
    assert "--only cells" in capsys.readouterr().err


def test_rounds_alternate_after_a_call_of_each():
    calls = []
    ticks = iter([0, 1, 10, 14, 20, 24, 30, 33, 40, 42, 50, 54])  # a: 1, 3, 2; b: 4, 4, 4
    found = measure.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, now=lambda: next(ticks)
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert found["a"].seconds == (1, 3, 2) and found["a"].median == 2
    assert found["b"].median == 4 and found["b"].spread == (4, 4)


def test_slope():
    assert measure.slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert measure.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_a_fresh_process_starts_with_its_own_peak():
    held = torch.ones(10**8)  # 400 MB here, of which the other process knows nothing
    assert measure.in_fresh_process(measure.peak_bytes) < measure.peak_bytes()
    assert measure.peak_bytes() > held.nbytes


def test_a_process_that_dies_is_a_failure():
    with pytest.raises(BrokenProcessPool):
        measure.in_fresh_process(os._exit, 1)


def test_roofline_of_a_hand_computed_example():
    gpu = roofline.GPU(flops=100e12, bandwidth=1e12, torch="")
    # [64, 128] @ [128, 256]: 2 * 64 * 128 * 256 operations; 2 bytes for each of 8192 + 32768 + 16384 numbers
    work = roofline.Work(4_194_304, 114_688)
    assert work.seconds(gpu) == pytest.approx(114_688e-12)  # its bytes take longer than 41.9 ns
    assert replace(work, moved=1).seconds(gpu) == pytest.approx(41.94304e-9)


def test_roofline_counts_launches():
    (op,) = (op for op in OPS if op.name == "defocus_mask")
    work = roofline.count(op, Shape("ViT-B/16"))
    assert (work.operations, work.moved) == (0, 196 * 4 + 2 * 196)  # a vector in fp32 and a mask read, a mask written


def test_planted_masks_and_twins():
    model = towers.planted(SMALL)
    images = towers.pictures(towers.Case((224, 224), batch=2))
    with torch.inference_mode():
        error, note = towers.check(model, images, towers.Case((224, 224), batch=2))
        other = towers.twin(model)
        assert torch.equal(other.encode_image(images), model.encode_image(images))
        assert torch.allclose(towers.plain_tower(model, images), model.encode_image(images), atol=1e-5)
        assert torch.allclose(towers.sdpa_tower(model, images), model.encode_image(images), atol=1e-5)
    assert error < 1e-5 and "0 % of the masks differ" in note
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        model.visual.positional_embedding[:, towers.MARK] = 0
    with torch.inference_mode(), pytest.raises(AssertionError, match="empty or full"):
        towers.check(model, images, towers.Case((224, 224), batch=2))


def test_the_model_has_openais_activation():
    """Which a kernel computes in one pass: its goals are relative to plain CLIP with the same. The planting works."""
    model, case = towers.planted(towers.MODEL), towers.Case((224, 224))
    activations = [block.mlp.gelu for block in model.visual.transformer.resblocks]
    assert {type(each) for each in activations} == {QuickGELU}
    assert all(backend("triton")._replaces(each, QUICK_GELUS) for each in activations)
    with torch.inference_mode():
        error, note = towers.check(model, towers.pictures(case), case)
    assert error < 1e-5 and "10 % of the patches distract" in note


def test_kernels():
    rows = {row.implementation: row for row in kernels.time_kernels(quick=True)}
    assert rows.keys() == {"eager", "reference"}
    assert rows["reference"].ratio == 1 and rows["eager"].ratio == rows["eager"].seconds / rows["reference"].seconds
    assert all("defocus_mask" in row.what and "224x224" in row.what for row in rows.values())


def test_profile():
    parts = towers.profile(SMALL, towers.Case((224, 224), rounds=2))
    calls = {part.function: part.calls for part in parts}
    assert calls["distraction_mask"] == calls["KeyAverage.add"] == 12 and calls["KeyAverage.gather"] == 1
    assert calls["refocused_attention"] == calls["leading_vectors"] == 10  # nothing distracts in the first block
    assert len({round(part.share / part.seconds, 6) for part in parts}) == 1  # one plain pass is the measure of all
    assert all(part.seconds > 0 and (part.warm is None or part.warm > 0) for part in parts)


def test_end_to_end():
    rows = list(end_to_end.throughput(SMALL, quick=True))  # asserts that the plain loop is the segmenter's
    assert [row.implementation for row in rows] == ["open_clip", "reference", "auto"]
    assert rows[0].ratio == 1 and all(row.images_per_second == 1 / row.seconds for row in rows)
    grown = list(end_to_end.growth(SMALL, quick=True))
    assert [row.unit for row in grown] == ["images in a batch", "pixels", "pixels", "classes", "photographs"]
    assert all(row.slope < 2 for row in grown)
