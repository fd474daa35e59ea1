"""Measure which tiles are the fastest on the GPU that is here, for `rfclip_kernels.use_tiles`.

python -m rfclip_kernels.autotune --out tiles.json [--device cpu]

Every kernel that multiplies matrices runs in fp16 on the registry's examples at the sizes of ViT-B/16 for 224x224,
batch 1 and 32, 336x448 and 672x896, with each candidate. One counts if it compiles, does not spill, and gives the
default's result. The exit code is 2 where there is nothing to measure on. With --device cpu the same code runs in
Triton's interpreter on tiny sizes, and its times mean nothing.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import rfclip_kernels
from rfclip_kernels import tiles
from rfclip_kernels.launch import interpreted
from rfclip_kernels.registry import EXAMPLES, Sizes
from rfclip_kernels.tiles import Entry, Tiles

TOLERANCE = 2e-3  # of the root mean square: four roundings of fp16
TIMED = {
    "row_logsumexp": ("key_normalizers",),
    "key_similarity": ("key_similarity, first block",),
    "key_affinity": ("key_affinity, first block",),
    "received_attention": ("received_attention",),
    "refocused_attention": ("refocused_attention",),
    "self_attention": ("self_attention", "self_attention, bias", "proxy_attention"),
    "proxy_attention": ("proxy_attention, known normalizers",),
    "cosine_aggregation": ("cosine_aggregation",),
}
SIZES = {
    "cuda": {
        "224x224": Sizes(),
        "224x224, batch 32": Sizes(B=32),
        "336x448": Sizes(grid=(21, 28)),
        "672x896": Sizes(grid=(42, 56)),
    },
    "cpu": {"48x80": Sizes(H=2, L=2, grid=(3, 5))},
}


def candidates(device: str) -> list[Tiles]:
    """What is tried: tiles of 1024 to 16384 products, 8 to 64 for each of 32 threads in a warp.

    In the interpreter only their sides make a difference.
    """
    sides = [(rows, columns) for rows in (32, 64, 128) for columns in (32, 64, 128) if columns <= rows]
    if device == "cpu":
        return [Tiles(*side, warps=4, stages=1) for side in sides]
    shapes = [(*side, warps) for side in sides for warps in (4, 8, 16) if 8 <= math.prod(side) // (32 * warps) <= 64]
    stages = (2, 3, 5) if torch.version.hip is None else (1, 2, 3)
    return [Tiles(*shape, count) for shape in shapes for count in stages]


@contextmanager
def using(entries: list[Entry]) -> Iterator[None]:
    """Entries before those of the package, for a while."""
    tiles.use(entries)
    try:
        yield
    finally:
        tiles.use([])


@contextmanager
def launches() -> Iterator[list[Any]]:
    """The compiled kernels that are launched; none in the interpreter."""
    from triton.runtime.jit import JITFunction

    found: list[Any] = []
    run = JITFunction.run

    def noting(kernel: Any, *given: Any, **named: Any) -> Any:
        found.append(run(kernel, *given, **named))
        return found[-1]

    JITFunction.run = noting
    try:
        yield found
    finally:
        JITFunction.run = run


def seconds(function: Callable[[], object], device: str) -> float:
    """The median of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(function, return_mode="median")
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def agree(got: object, want: object) -> bool:
    """Whether the tensors of two results are the same but for rounding."""
    pairs = [(a.double(), b.double()) for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True)]
    return all(((a - b).norm() <= TOLERANCE * b.norm()).item() for a, b in pairs)


def times(entry: Entry, examples: tuple[str, ...], sizes: Sizes, tried: list[Tiles]) -> dict[Tiles, float]:
    """Seconds of all the examples, with the entry's own tiles, which are the default, and with each that counts."""
    calls = [
        partial(getattr(rfclip_kernels, example.operation), **example.inputs(sizes))
        for example in EXAMPLES
        if example.name in examples
    ]
    want = [call() for call in calls]
    found = {}
    for one in dict.fromkeys([entry.tiles, *tried]):
        with using([replace(entry, tiles=one)]):
            try:
                with launches() as compiled:
                    got = [call() for call in calls]
                if one == entry.tiles or (agree(got, want) and not any(each.n_spills for each in compiled)):
                    found[one] = sum(seconds(call, sizes.device) for call in calls)
            except Exception as error:  # of any kind, from any compiler: what fails does not count
                print(f"{entry}: {one}: {type(error).__name__}", file=sys.stderr)
    return found


def measured(device: str, tried: list[Tiles]) -> Iterator[tuple[Entry, Tiles, float]]:
    """For every kernel and number of patches: an entry with the fastest tiles, the default ones, and the speedup."""
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    architectures = (tiles.architecture(place),)
    for kernel, examples in TIMED.items():
        dims = None if kernel == "cosine_aggregation" else Sizes.D
        found: dict[Entry, list[dict[Tiles, float]]] = {}
        for name, sizes in SIZES[device].items():
            print(f"{kernel}: {name}", file=sys.stderr, flush=True)
            default = tiles.choose(kernel, torch.empty(0, dtype=sizes.dtype, device=place), sizes.B, sizes.N, dims)
            entry = Entry(kernel, "half", dims, tiles.limit(kernel, sizes.B, sizes.N), architectures, default)
            found.setdefault(entry, []).append(times(entry, examples, replace(sizes, device=device), tried))
        for entry, counted in found.items():
            total = {
                one: sum(each[one] for each in counted) for one in counted[0] if all(one in each for each in counted)
            }
            best = min(total, key=total.__getitem__)
            yield replace(entry, tiles=best), entry.tiles, total[entry.tiles] / total[best]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m rfclip_kernels.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--device", choices=SIZES, default="cuda", help='"cuda" is also ROCm')
    given = parser.parse_args(arguments)
    if missing := obstacle(given.device):
        print(f"python -m rfclip_kernels.autotune: {missing}", file=sys.stderr)
        return 2
    entries = []
    print("entry | default | fastest | speedup")
    with torch.inference_mode():
        for entry, default, speedup in measured(given.device, candidates(given.device)):
            print(f"{entry} | {default} | {entry.tiles} | {speedup:.2f}", flush=True)
            entries.append(entry)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    part = given.out.with_name(f"{given.out.name}.{os.getpid()}.part")
    part.write_text(tiles.text(entries), "utf-8")
    part.replace(given.out)
    print(f'{given.out}: {len(entries)} entries; rfclip_kernels.use_tiles("{given.out}") uses them', file=sys.stderr)
    return 0


def obstacle(device: str) -> str | None:
    """What is missing to measure on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu":
        return None if interpreted() else "a dry run on the CPU needs Triton's interpreter: set TRITON_INTERPRET=1"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, and nothing runs on a GPU: unset it, or ask for --device cpu"
    return None if torch.cuda.is_available() else "PyTorch finds no GPU; --device cpu is a dry run"


if __name__ == "__main__":
    sys.exit(main())
