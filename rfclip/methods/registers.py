"""Test-time registers: one more token takes the activations that would make outliers of patches."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfclip.config import RegisterConfig
from rfclip.methods.base import Method
from rfclip.methods.registry import METHODS, MethodCard
from rfclip.towers import Block, Tower


class Registers(Method):
    """Another method's last block on a tower with one more token, the register, and moved activations.

    The register is a zero token before ln_pre. In a block b with register neurons J_b, activations h [T + 1, 4d] of the
    MLP change: h[register, J_b] becomes m_b, the entry of h[:, J_b] of the largest magnitude over all tokens, and
    h[patches, J_b] becomes 0; CLS keeps its own. m_b is one number for all of J_b, as the authors' code has it [D], or
    with `per_neuron` one for each. The register is among the keys of ordinary attention, and is treated as CLS is where
    the last block leaves CLS out. Without neurons there is no register [D].

    Args:
        registers: the neurons, and the method whose last block it is.

    Raises:
        ValueError: a neuron is not in the tower, the readout is not a method that can be one, or as `Method`.
    """

    def __init__(self, card: MethodCard, tower: Tower, config: None, backend: str, registers: RegisterConfig) -> None:
        super().__init__(card, RegisterTower(tower, registers) if registers.neurons else tower, config, backend)
        self.registers = registers
        self._readout = check_readout(registers.readout)(self.tower, None, backend)

    def stream(self, patches: Tensor) -> Tensor:
        return self._readout.stream(patches)

    def tokens(self, patches: Tensor) -> Tensor:
        return self._readout.tokens(patches)


def check_readout(name: str) -> MethodCard:
    """The method whose last block can be that of "registers": one that needs neither settings nor pictures.

    Raises:
        ValueError: the name is of no such method.
    """
    names = [each for each, card in METHODS.items() if not (card.configured or card.registers or card.sees_images)]
    if name not in names:
        raise ValueError(f"readout={name!r}: expected one of {', '.join(names)}")
    return METHODS[name]


class RegisterTower(Tower):
    """A tower with a register behind the prefix and moved activations, on the same modules and weights.

    Raises:
        ValueError: the tower has no such neuron.
    """

    def __init__(self, tower: Tower, registers: RegisterConfig) -> None:
        vars(self).update(vars(tower))
        self.plain, self.prefix, self.blocks = tower, tower.prefix + 1, [*tower.blocks]
        units: dict[int, list[int]] = {}
        for number, unit in registers.neurons:
            if number > len(tower.blocks) or unit >= (width := hidden_width(tower.blocks[number - 1])):
                has = f"{width} hidden units" if number <= len(tower.blocks) else f"{len(tower.blocks)} blocks"
                raise ValueError(f"neurons: unit {unit} of block {number} does not exist: this tower has {has}")
            units.setdefault(number, []).append(unit)
        for number, chosen in units.items():
            moved = MovedActivations(chosen, tower.prefix, registers.per_neuron)
            self.blocks[number - 1] = with_hidden(tower.blocks[number - 1], moved)

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        prefix, position = self.plain._embeddings()
        zero = torch.zeros_like(prefix[:1])
        return torch.cat([prefix, zero]), torch.cat(
            [position[: self.plain.prefix], zero.to(position.dtype), position[self.plain.prefix :]]
        )

    def readout(self, tokens: Tensor) -> Tensor:
        return self.plain.readout(tokens)

    def images(self, *args: object, **kwargs: object) -> Tensor:
        return self.plain.images(*args, **kwargs)

    def pool(self, x: Tensor) -> object:
        """Of the tokens without the register."""
        return self.plain.pool(torch.cat([x[:, : self.plain.prefix], x[:, self.prefix :]], dim=1))


class MovedActivations(nn.Module):
    """Hidden activations [B, T, e] of an MLP with those of some units moved from patches to the register.

    Args:
        units: J_b.
        register: the place of the register, behind which patches begin.
        per_neuron: whether each unit has an m_b of its own.
    """

    def __init__(self, units: Sequence[int], register: int, per_neuron: bool) -> None:
        super().__init__()
        self.units, self.register, self.per_neuron = tuple(units), register, per_neuron

    def forward(self, h: Tensor) -> Tensor:
        chosen = torch.stack([h[..., unit] for unit in self.units], dim=-1)  # [B, T, J]: no index to upload
        each = chosen if self.per_neuron else chosen.flatten(1)[..., None]
        largest = each.gather(1, each.abs().argmax(dim=1, keepdim=True)).expand(-1, -1, len(self.units))
        h = h.clone() if h.requires_grad else h
        for n, unit in enumerate(self.units):
            h[:, self.register, unit] = largest[:, 0, n]
            h[:, self.register + 1 :, unit] = 0
        return h


def with_hidden(block: Block, module: nn.Module) -> Block:
    """A block, its modules shared, whose hidden activations pass through one more module, [B, T, e] to [B, T, e]."""
    changed, place = copy.copy(block), block.mlp.index(hidden_layers(block)[1])
    changed.mlp = [*block.mlp[:place], module, *block.mlp[place:]]
    return changed


def hidden_width(block: Block) -> int:
    """e, the hidden units of a block's MLP."""
    return hidden_layers(block)[1].in_features


def hidden_layers(block: Block) -> tuple[nn.Module, nn.Linear]:
    """The layer of a block's MLP that makes the hidden activations [B, T, e], and the one that reads them.

    Raises:
        ValueError: the MLP does not show them.
    """
    linears = [module for module in block.mlp if isinstance(module, nn.Linear)]
    if len(linears) < 2:
        kinds = ", ".join(type(module).__name__ for module in block.mlp)
        raise ValueError(
            f"registers: the hidden activations of this tower's MLPs ({kinds}) cannot be seen: expected two linear "
            "layers and an activation between them"
        )
    return block.mlp[block.mlp.index(linears[-1]) - 1], linears[-1]
