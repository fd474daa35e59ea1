"""Simulated distraction: over-active dimensions planted into a tower that has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfclip.config import RefocusConfig, RegisterConfig
from rfclip.methods.registers import hidden_layers
from rfclip.ops import operations
from rfclip.plugin import installed
from rfclip.tiny.scenes import make_scene
from rfclip.towers import Tower, read_tower
from rfclip.towers.preprocess import Preprocess

INJECTED_DIMS = (5, 37, 70, 101)
INJECTED_UNIT = 7  # the hidden unit of the middle block that fires
LEANING_STREAM, LEANING_SCENES = 6, 4  # the scenes that the mean query is taken from


def injected(config: RefocusConfig) -> RefocusConfig:
    """The config for injected distraction: its dimensions are those injected."""
    return replace(config, distraction_dims=INJECTED_DIMS)


def injected_registers(model: nn.Module, registers: RegisterConfig | None = None) -> RegisterConfig:
    """The register neurons for injected distraction: the unit that fires; the other fields are those given."""
    neurons = ((_middle(read_tower(model)) + 1, INJECTED_UNIT),)
    return RegisterConfig(neurons) if registers is None else replace(registers, neurons=neurons)


@contextlib.contextmanager
def inject_distraction(
    model: nn.Module, share: float, *, strength: float = 25.0, attraction: float = 0.5, seed: int = 0
) -> Iterator[None]:
    """Simulate the paper's phenomenon: over-activate a share of the patch tokens in fixed dimensions in mid-network.

    In the middle block, what the MLP adds to the chosen tokens (at the same places in every image of a size) grows in
    `INJECTED_DIMS` by `strength` times the token's standard deviation. It does so as if by a register neuron: hidden
    unit `INJECTED_UNIT` is `strength` at these tokens, and what grows is where it still fires when the MLP's last layer
    reads it. The unit's own activation then takes its place.

    Distraction tokens draw attention [P fig. 4]. In later blocks their keys therefore lean towards the mean query of a
    few scenes, by `attraction` times the mean norm of a key, in each head. To that end the key weights of
    `INJECTED_DIMS` change in place until the end.

    This is a simulation, not something that the model does by itself.

    Args:
        model: a CLIP.
        share: of the patch tokens, in [0, 1].
        strength: in standard deviations.
        attraction: in mean norms of a key; 0 leaves the keys alone.
        seed: which tokens.

    Raises:
        ValueError: share is out of range, the tower is read only, its MLPs do not show their hidden activations, or the
            layers that make its keys do more than multiply and add.
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
        prefix = (present.tower if present and not leaning else tower).prefix  # a register is one more
        chosen = prefix + _chosen(h.shape[1] - prefix, share, seed).to(h.device)
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
    leaning, before = bool(attraction), list[tuple[Tensor, Tensor]]()
    try:
        if attraction:
            _lean_keys(tower, share, seed, attraction, before)
            leaning = False
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for weight, value in before:
                weight[:, INJECTED_DIMS] = value


def _chosen(tokens: int, share: float, seed: int) -> Tensor:
    """The places among the patch tokens that are over-activated."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[: round(share * tokens)]


@torch.no_grad()
def _lean_keys(tower: Tower, share: float, seed: int, attraction: float, before: list[tuple[Tensor, Tensor]]) -> None:
    """Change the key weights of the blocks after the middle one; `before` takes each with the columns it had."""
    scenes = [make_scene((LEANING_STREAM, number)).picture() for number in range(LEANING_SCENES)]
    preprocess, ops = Preprocess.of(tower), operations("reference")
    images = torch.stack([preprocess(scene) for scene in scenes]).to(tower.weight.device, tower.weight.dtype)
    x = tower.embed(tower.patches(images), ops)
    patches = slice(tower.prefix, None)
    chosen = _chosen(x.shape[1] - tower.prefix, share, seed).to(x.device)
    for number, block in enumerate(tower.blocks):
        y = block.ln_1(x)
        q, k, v = block.heads_of(y)
        if number > _middle(tower) and len(chosen):
            linears = block.linears()
            if linears is None:
                raise ValueError(
                    f"simulated distraction changes key weights, and the layers of block {number + 1} do more than "
                    "multiply and add: merge adapters into the weights, or pass attraction=0"
                )
            _, weight, _ = (rows for weight, _ in linears for rows in weight.split(tower.width))
            length = k[:, :, patches].norm(dim=-1).mean(dim=(0, 2))
            direction = F.normalize(q[:, :, patches].mean(dim=(0, 2)), dim=-1)
            active = y[:, tower.prefix + chosen][..., INJECTED_DIMS].mean(dim=(0, 1))
            lean = attraction * (length[:, None] * direction).flatten()
            before.append((weight, weight[:, INJECTED_DIMS].clone()))
            weight[:, INJECTED_DIMS] += torch.outer(lean, active / active.square().sum())
            q, k, v = block.heads_of(y)
        x = torch.add(*block.finish(x, F.scaled_dot_product_attention(q, k, v), ops))


def _middle(tower: Tower) -> int:
    """The place of the middle block."""
    return (len(tower.blocks) // 2 - 1) % len(tower.blocks)
