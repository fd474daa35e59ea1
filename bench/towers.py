"""The image tower, plain and refocused: time in alternating rounds, and peak memory in fresh processes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfclip
from bench.measure import (
    BACKEND,
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    alternate,
    captured,
    in_fresh_process,
    peak_bytes,
    relative_error,
)
from rfclip.ops import cut, operations
from rfclip.ops.eager import KeyAverage
from rfclip.plugin import installed
from rfclip.towers import Tower, read_tower

MODEL = "ViT-B-16-quickgelu"  # with OpenAI's activation, as its weights need it
CONFIG = rfclip.RefocusConfig.preset("ViT-B-16", "openai")
OWN_LAYERS = "the tower's own layers"
PURE = ("distraction_mask", "leading_vectors", "defocus_mask", "refocused_attention", "KeyAverage.gather")
OPERATIONS = ("distraction_mask", "defocus_mask", "refocused_attention", "redistribute_embeddings")
MARK = 11  # a dimension of the residual stream that only the planting below uses


@dataclass(frozen=True)
class Case:
    """Images of one size, and the goal for the ratio to plain CLIP on a CPU."""

    size: tuple[int, int]
    batch: int = 1
    rounds: int = 5
    goal: float | None = None  # for time
    memory_goal: float | None = None  # for peak memory
    limit: int | None = None  # of bytes for "eager", the peak of the whole process
    bf16: bool = False  # autocast
    alone: bool = False  # "eager" only: the others take minutes, or more memory than is available
    slow: bool = False  # on a GPU, where "eager" takes too long, and is left out

    def __str__(self) -> str:
        precision = "bf16 autocast" if self.bf16 else DTYPE_NAME
        return f"{self.size[0]}x{self.size[1]}, batch {self.batch}, {precision}"


CASES = (
    Case((224, 224), rounds=21, goal=1.08),
    Case((224, 224), batch=8, rounds=9, goal=1.08),
    Case((336, 448), rounds=11, goal=1.18),
    Case((672, 896), goal=1.5, memory_goal=1.15),
    Case((1024, 2048), rounds=1, limit=6 * 10**9, alone=True),
    Case((224, 224), rounds=11, bf16=True),
)
QUICK_CASES = (Case((224, 224), rounds=2),)


@dataclass(frozen=True)
class TowerTime:
    """A line of the report; `ratio` is to plain CLIP in the same rounds, `failure` the reason why nothing was timed."""

    case: str
    tokens: int
    implementation: str
    rounds: int = 0
    seconds: float | None = None
    spread: tuple[float, float] | None = None
    ratio: float | None = None
    goal: float | None = None
    error: float | None = None
    note: str = ""
    failure: str = ""
    operations: float = 0.0  # of plain CLIP at this size, to relate to a GPU's peak

    @property
    def key(self) -> str:
        return f"tower, {self.case}, {self.implementation}"


@dataclass(frozen=True)
class Memory:
    """A line of the report: the bytes a fresh process holds with the model loaded, and its peak."""

    case: str
    implementation: str
    loaded: int = 0
    peak: int = 0
    ratio: float | None = None
    goal: float | None = None
    limit: int | None = None
    failure: str = ""

    @property
    def key(self) -> str:
        return f"memory, {self.case}, {self.implementation}"


@dataclass(frozen=True)
class Part:
    """A line of the profile of "eager": all calls of one function in a pass, `share` relative to plain CLIP's pass.

    `warm` is the time of the same calls repeated immediately, before a block's matrices evict their data and code from
    the caches.
    """

    case: str
    function: str
    calls: int
    seconds: float
    share: float
    warm: float | None


def planted(name: str = MODEL) -> nn.Module:
    """An open_clip model with random weights that over-activates a tenth of its patches from the second block on.

    The chosen positions carry a mark in a dimension that no other weight touches. In every block, one unit of the MLP
    fires on it and writes to a distraction dimension: after each repair the over-activation returns, as in a trained
    model.
    """
    torch.manual_seed(0)
    model = open_clip.create_model(name, None).eval()
    visual, dim = model.visual, CONFIG.distraction_dims[0]
    with torch.no_grad():
        strength = 150 * visual.positional_embedding.std()
        for unmarked in (visual.positional_embedding.T, visual.class_embedding, visual.conv1.weight):
            unmarked[MARK] = 0
        visual.positional_embedding[1::10, MARK] = strength
        for block in visual.transformer.resblocks:
            for written in (block.attn.out_proj, block.mlp.c_proj):
                written.weight[MARK] = written.bias[MARK] = 0
            # As broad as attention begins: with the sharp heads of a trained model no cut of noise stands out.
            nn.init.xavier_uniform_(block.attn.in_proj_weight)
            nn.init.zeros_(block.attn.in_proj_bias)
            reads, writes = block.mlp.c_fc, block.mlp.c_proj
            reads.weight[0], reads.weight[0, MARK], reads.bias[0] = 0, 1, -3
            writes.weight[:, 0], writes.weight[dim, 0] = 0, 15
    return model.to(DEVICE, DTYPE)


def twin(model: nn.Module) -> nn.Module:
    """A second model on the same weights, to be refocused differently."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def config_for(model: nn.Module) -> rfclip.RefocusConfig:
    """The preset of ViT-B/16; in a narrower tower, with those of its dimensions that exist."""
    width = model.visual.conv1.out_channels
    return replace(CONFIG, distraction_dims=tuple(dim for dim in CONFIG.distraction_dims if dim < width))


def pictures(case: Case) -> Tensor:
    """Noise on two textures side by side, one of which the graph cut finds: in pure noise no cut stands out."""
    generator = torch.Generator().manual_seed(0)
    side, (height, width) = 16, case.size
    textures = torch.randn(2, 3, side, side, generator=generator)
    right = (torch.arange(width // side) >= 0.4 * width / side).long()
    ground = textures[right].permute(1, 2, 0, 3).flatten(2).repeat(1, height // side, 1)  # [3, height, width]
    images = torch.randn(case.batch, 3, height, width, generator=generator) + ground
    return (images / images.std()).to(DEVICE, DTYPE)


def plain_tower(model: nn.Module, images: Tensor) -> Tensor:
    """`encode_image` at any size: open_clip's own blocks on tokens with resized positions, as `rfclip` embeds them."""
    tower = read_tower(model)
    return tower.pool(model.visual.transformer(tower.embed(tower.patches(images), operations("eager"))))


def sdpa_tower(model: nn.Module, images: Tensor) -> Tensor:
    """The plain tower, with `scaled_dot_product_attention` instead of open_clip's attention modules."""
    tower = read_tower(model)
    ops = operations("eager")
    x = tower.embed(tower.patches(images), ops)
    for block in tower.blocks:
        x = torch.add(*block.finish(x, F.scaled_dot_product_attention(*block.query_key_value(x)), ops))
    return tower.pool(x)


def compiled_tower(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The plain tower with compiled blocks; all blocks share one compilation."""
    model = twin(model)
    for block in model.visual.transformer.resblocks:
        block.compile(dynamic=False)
    return lambda: plain_tower(model, images)


def plain_name(model: nn.Module, case: Case) -> str:
    return "open_clip" if case.size == tuple(model.visual.image_size) else "plain tower"


def plain(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The baseline. At other sizes than its own open_clip refuses, so this bypasses its checks."""
    if tuple(images.shape[2:]) == tuple(model.visual.image_size):
        return lambda: model.encode_image(images)
    return lambda: plain_tower(model, images)


def refocused(model: nn.Module, images: Tensor, backend: str, cuda_graphs: bool = False) -> Callable[[], Tensor]:
    copied = twin(model)
    rfclip.refocus(copied, config_for(copied), backend=backend, cuda_graphs=cuda_graphs)
    return lambda: rfclip.dense_features(copied, images)


def implementations(model: nn.Module, images: Tensor, case: Case) -> dict[str, Callable[[], Tensor]]:
    """What is timed side by side, plain CLIP first. Names that end in "graph" run as CUDA graphs."""
    name, baseline = plain_name(model, case), plain(model, images)
    if BACKEND == "triton":
        # "eager" reads from the device along the way, which a CUDA graph forbids.
        kernels = refocused(model, images, "triton")
        return {
            name: baseline,
            f"{name}, graph": captured(baseline),
            "sdpa, graph": captured(lambda: sdpa_tower(model, images)),
            **({} if case.slow else {"eager": refocused(model, images, "eager")}),
            "triton": kernels,
            "triton, graph": captured(kernels),
            "triton, own graph": refocused(model, images, "triton", cuda_graphs=True),  # as users get it
        }
    if case.alone:
        return {"eager": refocused(model, images, "eager")}
    return {name: baseline} | {backend: refocused(model, images, backend) for backend in ("reference", "eager")}


def features_and_masks(model: nn.Module, images: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Dense features, and the patches that lose attention and that receive it, [., 2, B, N], from the second block on.

    Raises:
        AssertionError: in one of these blocks no patch loses attention, so the block stayed plain.
    """
    masks: list[Tensor] = []
    with rfclip.refocus(model, config_for(model), backend=backend, cuda_graphs=False):
        ops = installed(model).ops
        attend = ops.refocused_attention

        def watched(
            q: Tensor, k: Tensor, v: Tensor, distraction: Tensor, target: Tensor, *rest: Any, **options: Any
        ) -> Tensor:
            masks.append(torch.stack([distraction, target]))
            return attend(q, k, v, distraction, target, *rest, **options)

        with patch.object(ops, "refocused_attention", watched):
            features = rfclip.dense_features(model, images)
    blocks = len(model.visual.transformer.resblocks) - 2  # nothing distracts before the second; the last only reads out
    assert len(masks) >= blocks, f"a block's mask is empty or full: {len(masks)} of {blocks} blocks were refocused"
    return features, torch.stack(masks[-blocks:])


def check(model: nn.Module, images: Tensor, case: Case) -> tuple[float | None, str]:
    """The relative error of the timed backend against the reference, and a note on the case.

    Raises:
        AssertionError: the result is wrong, or the case has nothing to refocus and so does not show what that costs.
    """
    got, masks = features_and_masks(model, images, BACKEND)
    shares = masks.float().mean(dim=(2, 3))
    least, most = shares.amin().item(), shares.amax().item()
    assert least > 0 and most < 1, f"a block's mask is empty or full: shares from {least} to {most}"
    distracting, defocused = (100 * shares.mean(dim=0)).tolist()
    share = f"{distracting:.0f} % of the patches distract, {defocused:.0f} % are defocused"
    if case.alone:
        assert got.isfinite().all(), "the features are not finite"
        return None, f"{share}; not compared with the reference, which takes more memory than is available"
    want, wanted_masks = features_and_masks(model, images[:2], "reference")  # the others would take long
    error = relative_error(got[:2], want)
    differing = (masks[:, :, :2] != wanted_masks).float().mean().item()
    low = case.bf16 or DTYPE is not torch.float32  # rounding may move a token or two over a threshold
    assert error < (5e-2 if low else 1e-5), f"relative error {error:.1e}"
    assert low or not differing, f"{100 * differing:.2g} % of the masks differ from the reference's"
    return error, f"{share}; {100 * differing:.2g} % of the masks differ from the reference's"


def tower_size(tower: Tower, images: Tensor) -> tuple[int, float]:
    """Tokens T of an image, and the floating-point operations of the plain tower's matrix products but the readout."""
    gh, gw = tower.grid(images)
    tokens, width = gh * gw + tower.prefix, tower.width
    blocks = len(tower.blocks) * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)
    return tokens, blocks + 2.0 * gh * gw * tower.conv.weight.numel()


@torch.inference_mode()
def time_towers(name: str, cases: Iterable[Case]) -> Iterator[TowerTime]:
    """Check each case before timing it."""
    model = planted(name)
    for case in cases:
        images = pictures(case)
        tokens, operations = tower_size(read_tower(model), images)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case.bf16):
            try:
                error, note = check(model, images, case)
            except AssertionError as failure:
                yield TowerTime(str(case), tokens, "eager", failure=str(failure))
                continue
            found = alternate(implementations(model, images, case), case.rounds)
        baseline = found.get(plain_name(model, case))
        for implementation, times in found.items():
            ours = implementation == BACKEND
            yield TowerTime(
                str(case),
                tokens,
                implementation,
                case.rounds,
                times.median,
                times.spread,
                times.median / baseline.median if baseline else None,
                case.goal if ours and name == MODEL and DEVICE == "cpu" else None,
                error if ours else None,
                note if ours else "",
                operations=case.batch * operations,
            )


@torch.inference_mode()
def profile(name: str, case: Case) -> list[Part]:
    """Where a pass through the refocused tower spends its time on a CPU, in rounds alternating with plain CLIP's."""
    model, images = planted(name), pictures(case)
    run_plain, model = plain(model, images), twin(model)
    rfclip.refocus(model, config_for(model), backend="eager")
    method = installed(model)
    spent: dict[str, list[float]] = {}
    repeated: dict[str, list[float]] = {}

    def watch(stack: ExitStack, owner: object, function: str, label: str) -> None:
        original = getattr(owner, function)

        def watched(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = original(*arguments, **named)
            spent.setdefault(label, []).append(time.perf_counter() - began)
            if label in PURE:
                began = time.perf_counter()
                original(*arguments, **named)
                repeated.setdefault(label, []).append(time.perf_counter() - began)
            return found

        stack.enter_context(patch.object(owner, function, watched))

    def watch_all(stack: ExitStack) -> None:
        for function in ("patches", "embed", "readout"):
            watch(stack, method.tower, function, OWN_LAYERS)
        for block in method.tower.blocks:
            watch(stack, block.ln_1, "forward", OWN_LAYERS)
            for function in ("heads_of", "key_value"):
                watch(stack, block, function, OWN_LAYERS)
            watch(stack, block, "project" if block is method.tower.blocks[-1] else "finish", OWN_LAYERS)
        for function in OPERATIONS:
            watch(stack, method.ops, function, function)
        for function in ("add", "gather"):
            watch(stack, KeyAverage, function, f"KeyAverage.{function}")
        watch(stack, cut, "leading_vectors", "leading_vectors")

    rounds = []

    def run() -> None:
        spent.clear(), repeated.clear()
        rfclip.dense_features(model, images)
        rounds.append({label: (len(times), sum(times), sum(repeated.get(label, ()))) for label, times in spent.items()})

    with ExitStack() as stack:
        watch_all(stack)
        plain_seconds = alternate({"plain": run_plain, "eager": run}, case.rounds)["plain"].median
    parts = []
    for label, (calls, *_) in rounds[0].items():
        seconds, warm = np.median([found[label][1:] for found in rounds[1:]], axis=0).tolist()
        share = seconds / plain_seconds
        parts.append(Part(str(case), label, calls, seconds, share, warm if label in PURE else None))
    return sorted(parts, key=lambda part: -part.seconds)


def measure_memory(name: str, cases: Iterable[Case]) -> Iterator[Memory]:
    """The peak of each implementation in a fresh process; all of them import and load the same."""
    for case in cases:
        baseline = None
        for implementation in ("eager",) if case.alone else ("plain", "reference", "eager"):
            held = implementation == "eager" and name == MODEL and DEVICE == "cpu"
            goal, limit = (case.memory_goal, case.limit) if held else (None, None)
            try:
                loaded, peak = in_fresh_process(one_call, name, case, implementation)
            except BrokenProcessPool:
                yield Memory(str(case), implementation, goal=goal, limit=limit, failure="killed")
                continue
            baseline = peak if implementation == "plain" else baseline
            ratio = peak / baseline if baseline else None
            yield Memory(str(case), implementation, loaded, peak, ratio, goal, limit)


@torch.inference_mode()
def one_call(name: str, case: Case, implementation: str) -> tuple[int, int]:
    """Peak bytes before and after one call of an implementation."""
    model, images = planted(name), pictures(case)
    run = plain(model, images) if implementation == "plain" else refocused(model, images, implementation)
    loaded = peak_bytes()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case.bf16):
        run()
    return loaded, peak_bytes()
