"""Simulated distraction: over-active dimensions planted into a tower that has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from rfclip.config import RefocusConfig, RegisterConfig
from rfclip.methods.registers import hidden_layers
from rfclip.plugin import installed
from rfclip.towers import Tower, read_tower

INJECTED_DIMS = (5, 37, 70, 101)
INJECTED_UNIT = 7  # the hidden unit of the middle block that fires


def injected(config: RefocusConfig) -> RefocusConfig:
    """The config for injected distraction: its dimensions are those injected."""
    return replace(config, distraction_dims=INJECTED_DIMS)


def injected_registers(model: nn.Module, registers: RegisterConfig | None = None) -> RegisterConfig:
    """The register neurons for injected distraction: the unit that fires; the other fields are those given."""
    neurons = ((_middle(read_tower(model)) + 1, INJECTED_UNIT),)
    return RegisterConfig(neurons) if registers is None else replace(registers, neurons=neurons)


@contextlib.contextmanager
def inject_distraction(model: nn.Module, share: float, *, strength: float = 40.0, seed: int = 0) -> Iterator[None]:
    """Simulate the paper's phenomenon: over-activate a share of the patch tokens in fixed dimensions in mid-network.

    In the middle block, what the MLP adds to the chosen tokens (at the same places in every image of a size) grows in
    `INJECTED_DIMS` by `strength` times the token's standard deviation. It does so as if by a register neuron: hidden
    unit `INJECTED_UNIT` is `strength` at these tokens, and what grows is where it still fires when the MLP's last layer
    reads it. The unit's own activation then takes its place. This is a simulation, not something that the model does by
    itself.

    Args:
        model: a CLIP.
        share: of the patch tokens, in [0, 1].
        strength: in standard deviations.
        seed: which tokens.

    Raises:
        ValueError: share is out of range, the tower is read only, or its MLPs do not show their hidden activations.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"inject={share}: expected a share of the patch tokens, from 0 to 1")
    if not share:
        yield
        return
    tower = read_tower(model)
    tower.check_refocusable("simulated distraction")
    middle = tower.blocks[_middle(tower)]
    activation, linear = hidden_layers(middle)
    stream: list[Tensor] = []
    own: list[Tensor] = []
    fired: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor]) -> None:
        stream[:] = inputs

    def fire(module: nn.Module, inputs: tuple[Tensor], h: Tensor) -> Tensor:
        present = installed(tower)
        prefix = (present.tower if present else tower).prefix  # a register is one more
        tokens = h.shape[1] - prefix
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        chosen = prefix + order[: round(share * tokens)].to(h.device)
        own[:], h = [h[..., INJECTED_UNIT].clone()], h.clone()
        h[:, chosen, INJECTED_UNIT] = strength
        return h

    def read(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        h = inputs[0].clone()
        unit = h[..., INJECTED_UNIT]
        over = unit > strength / 2
        fired[:] = [unit.where(over, 0)]
        h[..., INJECTED_UNIT] = torch.where(over, own.pop(), unit)
        return (h,)

    def over_activate(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        spread = (stream.pop() + output).std(dim=-1)
        output = output.clone()
        output[..., torch.tensor(INJECTED_DIMS, device=output.device)] += (fired.pop() * spread)[..., None]
        return output

    hooks = [
        middle.ln_2.register_forward_pre_hook(remember),
        activation.register_forward_hook(fire),
        linear.register_forward_pre_hook(read),
        middle.mlp[-1].register_forward_hook(over_activate),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _middle(tower: Tower) -> int:
    """The place of the middle block."""
    return (len(tower.blocks) // 2 - 1) % len(tower.blocks)
