"""Single operations to time: on each backend, and by PyTorch's own attention where that can express them.

The inputs are those of `rfclip_kernels.registry`. "attention" is plain attention of the same sizes: what refocusing is
measured against, not another way to compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.measure import DEVICE
from rfclip.ops.dispatch import backend
from rfclip_kernels.registry import EXAMPLES, Sizes

BY_NAME = {example.name: example for example in EXAMPLES}
BACKENDS = ("triton", "eager", "reference")
Grid = tuple[int, int]
Run = Callable[[], Tensor]


def sdpa_with_bias(i: dict[str, Any], grid: Grid) -> Run:
    (gh, gw), bias = grid, i["bias"]
    row, column = torch.arange(gh * gw, device=DEVICE) // gw, torch.arange(gh * gw, device=DEVICE) % gw
    matrix = bias[row[:, None] - row + gh - 1, column[:, None] - column + gw - 1]
    matrix = F.pad(matrix, (i["prefix"], 0, i["prefix"], 0)).to(i["q"].dtype)
    return lambda: F.scaled_dot_product_attention(i["q"], i["k"], i["v"], attn_mask=matrix)


def flex(i: dict[str, Any], grid: Grid, score_mod: Callable | None = None) -> Run:
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(i["q"], i["k"], i["v"], score_mod=score_mod)


def flex_with_bias(i: dict[str, Any], grid: Grid) -> Run:
    (gh, gw), bias, prefix = grid, i["bias"], i["prefix"]

    def offset_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        a, b = (query - prefix).clamp(min=0), (key - prefix).clamp(min=0)
        added = bias[a // gw - b // gw + gh - 1, a % gw - b % gw + gw - 1]
        return score + torch.where((query >= prefix) & (key >= prefix), added, 0.0)

    return flex(i, grid, offset_bias)


def sdpa_layers(i: dict[str, Any], grid: Grid) -> Run:
    keys, v, prefix = i["keys"], i["v"], i["prefix"]
    patches_only = torch.cat([torch.zeros_like(v[:, :, :prefix]), v[:, :, prefix:]], dim=2)

    def sweeps() -> Tensor:
        total = reduce(torch.add, (F.scaled_dot_product_attention(k, k, patches_only) for k in keys))
        return (total / len(keys))[:, :, prefix:]

    return sweeps


def sdpa(query: str, key: str) -> Callable[[dict[str, Any], Grid], Run]:
    return lambda i, grid: lambda: F.scaled_dot_product_attention(i[query], i[key], i["v"])


# What PyTorch itself has for the same result, or for plain attention of the same sizes.
PEERS: dict[tuple[str, str], Callable[[dict[str, Any], Grid], Run]] = {
    ("refocused_attention", "attention"): sdpa("q", "k"),
    ("proxy_attention", "sdpa"): sdpa_layers,
    ("self_attention", "sdpa"): sdpa("q", "k"),
    ("self_attention", "flex_attention"): flex,
    ("self_attention, bias", "sdpa"): sdpa_with_bias,
    ("self_attention, bias", "flex_attention"): flex_with_bias,
}
CASES = [*((name, how) for name, example in BY_NAME.items() if example.module for how in BACKENDS), *PEERS]


def prepare(name: str, how: str, sizes: Sizes) -> Run:
    """An operation on its example inputs, on a backend or by a peer; equal sizes give equal inputs."""
    example = BY_NAME[name]
    inputs = example.inputs(replace(sizes))  # whose random values start anew
    if how not in BACKENDS:
        return PEERS[name, how](inputs, sizes.grid)
    operation = getattr(backend(how), example.operation)
    return lambda: operation(**inputs | ({"inplace": False} if "inplace" in inputs else {}))


def capturable(name: str, how: str) -> bool:
    """Whether a CUDA graph can capture it: the reference and "eager" read from the device."""
    return how not in ("reference", "eager")
