"""Each kernel against its reference, and against PyTorch's own attention where that can express it.

`pytest bench/test_kernels.py` runs it; a case is timed after its result was found right. "attention" is plain attention
of the same sizes: what refocusing is measured against, not another way to do it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from bench.measure import DEVICE, DTYPE
from rfclip import reference
from rfclip.backends import functions

H, D, L = 12, 64, 12  # ViT-B/16
GRIDS = {"224x224": (14, 14), "336x448": (21, 28)}
DIMS = (4, 162, 189, 326, 429, 474, 633, 713)


class Inputs:
    """Random inputs of the functions for one image on a patch grid, with a tenth of the tokens over-active."""

    def __init__(self, grid):
        generator = torch.Generator(DEVICE).manual_seed(0)
        N = grid[0] * grid[1]

        def randn(*shape, dtype=DTYPE):
            return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

        self.grid = grid
        self.q, self.k, self.v = randn(1, N + 1, 3, H, D).permute(2, 0, 3, 1, 4).unbind()
        self.keys = randn(L, 1, H, N + 1, D)
        self.v_without_cls = torch.cat([torch.zeros_like(self.v[:, :, :1]), self.v[:, :, 1:]], dim=2)
        self.x = randn(1, N, H * D)
        self.x[:, ::10, DIMS[0]] += 40
        self.distraction = torch.arange(N, device=DEVICE)[None] % 10 == 0
        self.target = (torch.arange(N, device=DEVICE)[None] % 2 == 1) & ~self.distraction
        halves = torch.arange(N, device=DEVICE) < N // 3
        near = 2.0 * (halves[:, None] == halves) + randn(1, N, N, dtype=torch.float32) / 2
        self.similarity = near.softmax(dim=-1)
        self.bias = randn(2 * grid[0] - 1, 2 * grid[1] - 1, dtype=torch.float32)
        self.image, self.mask = randn(1, 3, 8 * grid[0], 8 * grid[1]), randn(1, 21, 8 * grid[0], 8 * grid[1])
        self.logits = randn(60, 4 * grid[0], 4 * grid[1], dtype=torch.float32)
        self.names = torch.arange(60, device=DEVICE) // 3
        self.windows = randn(9, 60, 14, 14)
        self.corners = [(top, left) for top in (0, 112, 224) for left in (0, 112, 224)]


# How each function is called, on the backend `f`.
CALLS = {
    "distraction_scores": lambda f, i: f.distraction_scores(i.x, DIMS),
    "distraction_mask": lambda f, i: f.distraction_mask(i.x, DIMS),
    "redistribute_embeddings": lambda f, i: f.redistribute_embeddings(i.x, i.distraction, DIMS, i.grid),
    "received_attention": lambda f, i: f.received_attention(i.q, i.k),
    "key_similarity": lambda f, i: f.key_similarity(i.k, i.similarity, 3),
    "fiedler_vector": lambda f, i: f.fiedler_vector(i.similarity),
    "defocus_mask": lambda f, i: f.defocus_mask(i.similarity[:, 0]),
    "refocused_attention": lambda f, i: f.refocused_attention(i.q, i.k, i.v, i.distraction, i.target, 0.7),
    "proxy_attention": lambda f, i: f.proxy_attention(i.keys, i.v),
    "self_attention": lambda f, i: f.self_attention(i.k, i.v),
    "self_attention with bias": lambda f, i: f.self_attention(i.k, i.v, i.bias),
    "average_windows": lambda f, i: f.average_windows(i.windows, i.corners, 224, (448, 448)),
    "upsample_argmax": lambda f, i: f.upsample_argmax(i.logits, (480, 640), 40.0, i.names),
    "pamr": lambda f, i: f.pamr(i.image, i.mask),
}


def sdpa_with_bias(i):
    gh, gw = i.grid
    row, column = torch.arange(gh * gw, device=DEVICE) // gw, torch.arange(gh * gw, device=DEVICE) % gw
    matrix = i.bias[row[:, None] - row + gh - 1, column[:, None] - column + gw - 1]
    matrix = F.pad(matrix, (1, 0, 1, 0)).to(DTYPE)
    return lambda: F.scaled_dot_product_attention(i.k, i.k, i.v, attn_mask=matrix)


def flex(i, score_mod=None):
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(i.k, i.k, i.v, score_mod=score_mod)


def flex_with_bias(i):
    (gh, gw), bias = i.grid, i.bias

    def offset_bias(score, batch, head, query, key):
        a, b = (query - 1).clamp(min=0), (key - 1).clamp(min=0)
        added = bias[a // gw - b // gw + gh - 1, a % gw - b % gw + gw - 1]
        return score + torch.where((query > 0) & (key > 0), added, 0.0)

    return flex(i, offset_bias)


def sdpa_layers(i):
    sweeps = lambda: sum(F.scaled_dot_product_attention(k, k, i.v_without_cls) for k in i.keys) / L  # noqa: E731
    return lambda: sweeps()[:, :, 1:]


# What PyTorch itself has for the same result, or for plain attention of the same sizes.
PEERS = {
    ("refocused_attention", "attention"): lambda i: lambda: F.scaled_dot_product_attention(i.q, i.k, i.v),
    ("proxy_attention", "sdpa"): sdpa_layers,
    ("self_attention", "sdpa"): lambda i: lambda: F.scaled_dot_product_attention(i.k, i.k, i.v),
    ("self_attention", "flex_attention"): flex,
    ("self_attention with bias", "sdpa"): sdpa_with_bias,
    ("self_attention with bias", "flex_attention"): flex_with_bias,
}
CASES = [(name, how) for name in CALLS for how in ("triton", "eager", "reference")] + list(PEERS)


@pytest.fixture(scope="module", params=GRIDS)
def inputs(request):
    return request.param, Inputs(GRIDS[request.param])


@pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{name}-{how}".replace(" ", "_") for name, how in CASES])
def test_kernel(timed, inputs, name, how):
    size, i = inputs
    if how == "triton" and DEVICE == "cpu":
        pytest.skip("no GPU: the interpreter's time says nothing about a kernel's")
    if how in ("triton", "eager", "reference"):
        function = lambda: CALLS[name](functions(how), i)  # noqa: E731
    else:
        function = PEERS[name, how](i)
    if how not in ("attention", "reference"):
        got, want = function().float(), CALLS[name](reference, i).float()
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < {torch.float32: 1e-4, torch.float16: 1e-2}[DTYPE]
    # The reference and "eager" read from the device, and windows have their corners on the host: none can be captured.
    graph = how not in ("reference", "eager") and name != "average_windows"
    timed(function, f"{name}, ViT-B/16 at {size}", graph=graph)
