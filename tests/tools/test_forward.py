"""The count of whole forwards: what is launched is what the tower's equations and the operations say."""

# ruff: noqa: E402

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tools.kernel_report import report
from tools.kernel_report.forward import GPUS, MOST, Assumptions, count
from tools.kernel_report.launches import Shape, Step, record, recording, tensor_bytes

T, d, L = 197, 768, 12


@pytest.fixture(scope="module")
def forward():
    return count(Shape("ViT-B/16"), 2)


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
        "layer_norm_kernel": 2 * L - 1,
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


def test_more_launches_than_allowed_are_a_fault(monkeypatch, capsys):
    monkeypatch.setattr(report, "compile_all", lambda jobs: {})
    monkeypatch.setattr(report, "jobs", dict)
    monkeypatch.setattr(report, "OPS", [])
    monkeypatch.setattr(report, "FORWARDS", [(Shape("ViT-B/16"), 1)])
    assert report.main(["--launch", "5"]) == 0
    out = capsys.readouterr().out
    assert "| ViT-B/16 | 224x224 | 1 | 162 | " in out and "5.0 us more" in out and "projected, not measured" in out
    monkeypatch.setitem(MOST, ("ViT-B/16", True), 100)
    assert report.main(["--summary"]) == 1
    assert "ViT-B/16 | 224x224 | batch 1: " in capsys.readouterr().err


def test_operations_are_recorded_as_before():
    from tools.kernel_report.launches import OPS

    (op,) = (op for op in OPS if op.name == "refocused_attention")
    found = record(op, Shape("ViT-B/16"))
    assert found.moved == sum(step.moved for step in found.steps)
    assert [step.name for step in found.steps if step.triton] == ["order_kernel", "refocused_attention_kernel"]
