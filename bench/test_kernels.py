"""Each operation on each backend, and PyTorch's own attention where that can express it.

`pytest bench/test_kernels.py` runs it, on the example inputs of `rfclip_kernels.registry`; a case is timed once its
result is known to be right. "attention" is plain attention of the same sizes: what refocusing is measured against, not
another way to compute it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from bench.measure import DEVICE, DTYPE
from rfclip.ops.dispatch import backend
from rfclip_kernels.registry import EXAMPLES, Sizes

GRIDS = {"224x224": (14, 14), "336x448": (21, 28)}  # of ViT-B/16
NAMES, PATCH = 60, 8  # fewer class names and a smaller picture than the report counts, to take seconds
BY_NAME = {example.name: example for example in EXAMPLES}
BACKENDS = ("triton", "eager", "reference")


def sdpa_with_bias(i, grid):
    (gh, gw), bias = grid, i["bias"]
    row, column = torch.arange(gh * gw, device=DEVICE) // gw, torch.arange(gh * gw, device=DEVICE) % gw
    matrix = bias[row[:, None] - row + gh - 1, column[:, None] - column + gw - 1]
    matrix = F.pad(matrix, (i["prefix"], 0, i["prefix"], 0)).to(DTYPE)
    return lambda: F.scaled_dot_product_attention(i["u"], i["u"], i["v"], attn_mask=matrix)


def flex(i, grid, score_mod=None):
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(i["u"], i["u"], i["v"], score_mod=score_mod)


def flex_with_bias(i, grid):
    (gh, gw), bias, prefix = grid, i["bias"], i["prefix"]

    def offset_bias(score, batch, head, query, key):
        a, b = (query - prefix).clamp(min=0), (key - prefix).clamp(min=0)
        added = bias[a // gw - b // gw + gh - 1, a % gw - b % gw + gw - 1]
        return score + torch.where((query >= prefix) & (key >= prefix), added, 0.0)

    return flex(i, grid, offset_bias)


def sdpa_layers(i, grid):
    keys, v, prefix = i["keys"], i["v"], i["prefix"]
    patches_only = torch.cat([torch.zeros_like(v[:, :, :prefix]), v[:, :, prefix:]], dim=2)
    sweeps = lambda: sum(F.scaled_dot_product_attention(k, k, patches_only) for k in keys) / len(keys)  # noqa: E731
    return lambda: sweeps()[:, :, prefix:]


# What PyTorch itself has for the same result, or for plain attention of the same sizes.
PEERS = {
    ("refocused_attention", "attention"): lambda i, grid: (
        lambda: F.scaled_dot_product_attention(i["q"], i["k"], i["v"])
    ),
    ("proxy_attention", "sdpa"): sdpa_layers,
    ("self_attention", "sdpa"): lambda i, grid: lambda: F.scaled_dot_product_attention(i["u"], i["u"], i["v"]),
    ("self_attention", "flex_attention"): flex,
    ("self_attention, bias", "sdpa"): sdpa_with_bias,
    ("self_attention, bias", "flex_attention"): flex_with_bias,
}
CASES = [
    *((name, how) for name, example in BY_NAME.items() if example.module for how in BACKENDS),
    *PEERS,
]


@pytest.fixture(params=GRIDS)
def size(request):
    return request.param


@pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{name}-{how}".replace(" ", "_") for name, how in CASES])
def test_kernel(timed, size, name, how):
    if how == "triton" and DEVICE == "cpu":
        pytest.skip("no GPU: the interpreter's time says nothing about a kernel's")
    example, grid = BY_NAME[name], GRIDS[size]
    inputs = example.inputs(Sizes(grid=grid, dtype=DTYPE, device=DEVICE, names=NAMES, patch=PATCH))

    def on(backend_name):
        operation = getattr(backend(backend_name), example.operation)
        return lambda: operation(**inputs | ({"inplace": False} if "inplace" in inputs else {}))

    function = on(how) if how in BACKENDS else PEERS[name, how](inputs, grid)
    if how not in ("attention", "reference"):
        got, want = function().float(), on("reference")().float()
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < {torch.float32: 1e-4, torch.float16: 1e-2}[DTYPE]
    # The reference and "eager" read from the device, and windows have their corners on the host: none can be captured.
    graph = how not in ("reference", "eager") and name != "average_windows"
    timed(function, f"{name}, ViT-B/16 at {size}", graph=graph)
