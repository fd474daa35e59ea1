"""The count of whole forwards: what is launched is what the tower's equations and the operations say."""

# ruff: noqa: E402

import ast
import subprocess
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tools.kernel_report import report
from tools.kernel_report.forward import FORWARDS, GPUS, Assumptions, Forward, Goal, compare
from tools.kernel_report.launches import Shape, Step, record, recording, tensor_bytes

T, d, L = 197, 768, 12


@pytest.fixture(scope="module")
def forward():
    return compare(Goal(Shape("ViT-B/16"), 2, launches=150), [1, 2])


def test_plain_clip(forward):
    """Linear layers, attention and the patch convolution, of two images; and what is in between."""
    linear = 2 * 2 * T * d * (3 * d + d + 4 * d + 4 * d) * L
    attention, convolution, projection = 4 * 2 * T**2 * d * L, 2 * 2 * 196 * d * (3 * 16 * 16), 2 * 2 * d * 512
    assert sum(step.operations for step in forward.plain) == linear + attention + convolution + projection
    names = Counter(step.name for step in forward.plain)
    assert names["scaled_dot_product_attention"] == L and names["aten::sigmoid"] == L  # QuickGELU
    assert names["aten::native_layer_norm"] == 2 * L + 2
    assert not any(step.triton for step in forward.plain)


def test_rf_clip(forward):
    names = Counter(step.name for step in forward.refocused if step.triton)
    assert names == {
        "layer_norm_kernel": 2 * L,  # of the blocks and in front of them, but for the last one's second
        "quick_gelu_kernel": L - 1,
        "row_logsumexp_kernel": L,
        "key_similarity_kernel": L - 1,
        "cut_kernel": L - 1,
        "refocused_attention_kernel": L - 1,
        "proxy_attention_kernel": 1,
    }
    assert forward.launches == (sum(names.values()), len(forward.refocused) - sum(names.values()))
    # Of the last block only its keys, its values, and the output projection of its patches.
    linear = 2 * 2 * T * d * 12 * d * (L - 1) + 2 * 2 * T * d * 2 * d + 2 * 2 * 196 * d * d
    dense = 2 * 2 * 196 * d * 3 * 16 * 16 + 2 * 2 * 196 * d * 512
    assert sum(step.operations for step in forward.refocused if not step.triton) == linear + dense


def test_the_time_of_steps():
    steps = [Step("product", False, 989.5e12, 1), Step("copy", False, 0, 3350 * 10**9 // 2)]
    assert Assumptions().seconds(steps, graph=False) == pytest.approx(1.5 + 6e-6)
    assert Assumptions(peak=0.5, bandwidth=0.25, graph_launch=2).seconds(steps, graph=True) == pytest.approx(4 + 4e-6)
    assert set(GPUS) >= {Assumptions().gpu}


def test_an_expanded_tensor_is_read_once():
    with recording():
        weight = torch.empty(5, 7, device="cuda", dtype=torch.float16)
        assert tensor_bytes([weight, weight.expand(3, 5, 7), weight[:0]]) == 2 * 5 * 7 * 2


def test_passes_over_the_similarity(forward):
    """The first block writes W in fp16, the others read it, too; up to 256 patches the cut reads it once."""
    W = 2 * 2 * 196 * 196
    written = [step.similarity for step in forward.refocused if step.name == "key_similarity_kernel"]
    assert written == [W] + [2 * W] * (L - 2)
    assert [step.similarity for step in forward.refocused if step.name == "cut_kernel"] == [W] * (L - 1)
    assert forward.passes == 1.5
    (large,) = (goal for goal in FORWARDS if goal.shape.size == (672, 896))
    assert compare(large, []).passes == 0.5 + 15 / 2  # the first block, which takes 15 products; the others, four


def test_torch_compile_keeps_the_libraries(forward):
    assert [step for step in forward.compiled if step.operations] == [step for step in forward.plain if step.operations]
    assert [step.moved for step in forward.compiled if not step.operations] == [1, 2]


def test_goals():
    goal, steps = Goal(Shape("ViT-B/16"), 1, launches=2, time=1.5), [Step("a", False, 0, 0)]
    assert Forward(goal, steps, [], steps).missed(Assumptions()) == []
    slow = [Step("b", True, 0, 0, similarity=4 * 196**2 * 9), *2 * steps]
    assert Forward(goal, steps, [], slow).missed(Assumptions()) == [
        "3 launches, at most 2 allowed",
        "9.0 passes over the similarity, at most 8 allowed",
        "3.00 of plain CLIP's projected time, at most 1.5 allowed",
    ]


def test_a_missed_goal_is_a_fault(monkeypatch, capsys):
    monkeypatch.setattr(report, "compile_all", lambda jobs: {})
    monkeypatch.setattr(report, "jobs", lambda targets: {})
    monkeypatch.setattr(report, "OPS", [])
    monkeypatch.setattr(report, "in_its_own_process", lambda: lambda: [[1]])
    monkeypatch.setattr(report, "FORWARDS", [Goal(Shape("ViT-B/16"), 1, launches=150, time=1.05)])
    assert report.main(["--launch", "5"]) == 0
    out = capsys.readouterr().out
    assert "| ViT-B/16 | 224x224 | 1 | 162 | " in out and "5.0 us more" in out and "projected, not measured" in out
    monkeypatch.setattr(report, "FORWARDS", [Goal(Shape("ViT-B/16"), 1, launches=100)])
    assert report.main(["--summary"]) == 1
    assert "ViT-B/16 | 224x224 | batch 1: " in capsys.readouterr().err


def test_what_inductor_makes_of_plain_clip(monkeypatch):
    """Fewer launches than without it; it runs in a process of its own, on one forward."""
    code = (
        "from tools.kernel_report import inductor; inductor.FORWARDS = inductor.FORWARDS[:1]; "
        "print(inductor.generated_kernels())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (kernels,) = ast.literal_eval(done.stdout)
    assert L < len(kernels) < 162 - 4 * L - L  # plain CLIP's launches less products and attention
    assert all(moved > 0 for moved in kernels)


def test_operations_are_recorded_as_before():
    from tools.kernel_report.launches import OPS

    (op,) = (op for op in OPS if op.name == "refocused_attention")
    found = record(op, Shape("ViT-B/16"))
    assert found.moved == sum(step.moved for step in found.steps)
    assert [step.name for step in found.steps if step.triton] == ["order_kernel", "refocused_attention_kernel"]
