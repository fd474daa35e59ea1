"""Simulated distraction: over-active dimensions planted into a tower that has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from rfclip.config import RefocusConfig
from rfclip.towers import read_tower

INJECTED_DIMS = (5, 37, 70, 101)


def injected(config: RefocusConfig) -> RefocusConfig:
    """The config for injected distraction: its dimensions are those injected."""
    return replace(config, distraction_dims=INJECTED_DIMS)


@contextlib.contextmanager
def inject_distraction(model: nn.Module, share: float, *, strength: float = 40.0, seed: int = 0) -> Iterator[None]:
    """Simulate the paper's phenomenon: over-activate a share of the patch tokens in fixed dimensions in mid-network.

    In the middle block, what the MLP adds to the chosen tokens (at the same places in every image of a size) grows in
    `INJECTED_DIMS` by `strength` times the token's standard deviation. This is a simulation, not something that the
    model does by itself.

    Args:
        model: a CLIP.
        share: of the patch tokens, in [0, 1].
        strength: in standard deviations.
        seed: which tokens.

    Raises:
        ValueError: share is out of range, or the tower is read only.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"inject={share}: expected a share of the patch tokens, from 0 to 1")
    if not share:
        yield
        return
    tower = read_tower(model)
    tower.check_refocusable("simulated distraction")
    middle = tower.blocks[len(tower.blocks) // 2 - 1]
    stream: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor]) -> None:
        stream[:] = inputs

    def over_activate(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        tokens = output.shape[1] - tower.prefix
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        chosen = tower.prefix + order[: round(share * tokens)].to(output.device)
        before = stream.pop()
        if not len(chosen):
            return output
        spread = (before + output)[:, chosen].std(dim=-1, keepdim=True)
        dims = torch.tensor(INJECTED_DIMS, device=output.device)
        output = output.clone()
        output[:, chosen[:, None], dims] += strength * spread
        return output

    hooks = middle.ln_2.register_forward_pre_hook(remember), middle.mlp[-1].register_forward_hook(over_activate)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
