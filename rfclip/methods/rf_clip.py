"""RF-CLIP, and its special cases: plain CLIP (z = F[L]) and the paper's two baselines.

"kk" is z = O(SS(k) v), without the rows and columns of the prefix, not renormalized [D]; "kk-mean" takes the mean of
all blocks' SS(k).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.config import RefocusConfig
from rfclip.methods.base import QKV, LastBlock, Method, Sweep
from rfclip.ops.key_average import KeyAverage
from rfclip.towers import Block


class Observed(NamedTuple):
    """A block's number, from 1, its repaired input, queries and keys, and what was found there."""

    number: int
    x: Tensor
    q: Tensor
    k: Tensor
    distraction: Tensor | None
    fiedler: Tensor | None
    target: Tensor | None


class RFCLIP(Method):
    """RF-CLIP in every form that its config allows. Steps are those of docs/method.md."""

    config: RefocusConfig

    def last(self, patches: Tensor) -> tuple[Tensor, QKV]:
        """With every block refocused; the last one then runs unchanged."""
        x, y, qkv, distraction, _ = self._run(patches)
        q, k, v = qkv or self.tower.blocks_on(patches.shape[2:])[-1].heads_of(y)
        self.observe(Observed(len(self.tower.blocks), x, q, k, distraction, None, None))
        return x, (q, k, v)

    @property
    def crosses(self) -> bool:  # type: ignore[override]  # it depends on the config
        return self.config.proxy in ("qq", "kk", "vv", "kk-mean")

    def last_block(self, patches: Tensor) -> LastBlock:
        """What `tokens` computes with fewer passes: the rows and columns of the prefix count as 0."""
        proxy, last, prefix = self.config.proxy, self.tower.blocks_on(patches.shape[2:])[-1], self.tower.prefix
        keys: list[Tensor] = []
        x, y, qkv, _, _ = self._run(patches, keys=keys)
        q, k, v = qkv or last.heads_of(y)
        if proxy == "none":
            return LastBlock([Sweep(q, k)], v, partial(self.finished, x))
        pairs = {"qk": [(q, k)], "qq": [(q, q)], "kk": [(k, k)], "vv": [(v, v)]}
        chosen = [(each, each) for each in (*keys, k)] if proxy == "kk-mean" else pairs[proxy]
        v = torch.cat([torch.zeros_like(v[:, :, :prefix]), v[:, :, prefix:]], dim=2)
        return LastBlock([Sweep(one, other, 1 / len(chosen)) for one, other in chosen], v, last.project)

    def tokens(self, patches: Tensor) -> Tensor:
        """The last block's values gathered by the proxy attention [P 14]: step 6."""
        proxy, last, prefix = self.config.proxy, self.tower.blocks_on(patches.shape[2:])[-1], self.tower.prefix
        if proxy == "none":
            return self.stream(patches)[:, prefix:]
        _, y, qkv, _, average = self._run(patches, gathers=proxy == "kk-mean")
        if proxy == "qk":  # like the others without the rows and columns of the prefix, not renormalized [D]
            q, k, v = qkv or last.heads_of(y)
            patches_only = torch.cat([torch.zeros_like(v[:, :, :prefix]), v[:, :, prefix:]], dim=2)
            gathered = F.scaled_dot_product_attention(q, k, patches_only)[:, :, prefix:]
        elif proxy == "qq":
            q, _, v = qkv or last.heads_of(y)
            gathered = self.ops.proxy_attention(q[None], v, prefix=prefix)
        else:
            k, v = qkv[1:] if qkv else last.key_value(y)
            if proxy == "kk-mean":
                average.add(k)
                gathered = average.gather(v)
            else:
                gathered = self.ops.proxy_attention({"kk": k, "vv": v}[proxy][None], v, prefix=prefix)
        return last.project(gathered)

    def _run(
        self, patches: Tensor, gathers: bool = False, keys: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, QKV | None, Tensor | None, KeyAverage]:
        """What `_enter` returns for the last block, and the average of the keys before it.

        The average can `gather` if asked to, once the last keys are added. Keys of earlier blocks are added to `keys`.
        """
        config, ops, prefix = self.config, self.ops, self.tower.prefix
        grid = patches.shape[2], patches.shape[3]
        blocks = self.tower.blocks_on(grid)
        x, branch = self.tower.embed(patches, ops), None
        refocused = range(1, len(blocks) + 1) if config.layers is None else config.layers
        refocused = refocused if config.distraction_dims else ()
        cut = config.beta > 0 and config.target == "defocused"
        # The similarity is averaged over the blocks up to this one.
        averaged = min(max(refocused, default=0), len(blocks) - 1) if cut and config.similarity == "kk-mean" else 0
        average = ops.key_average(layers=len(blocks), similar=averaged, gathers=gathers, prefix=prefix)
        start: Tensor | None = None
        for number, block in enumerate(blocks, 1):
            if number in refocused:
                x, y, qkv, distraction = self._enter(block, x, branch, number, grid)
            else:
                (x, y), qkv, distraction = ops.add_norm(block.ln_1, x, branch), None, None
            if number == len(blocks):
                break
            q, k, v = qkv or block.heads_of(y)
            if number <= averaged or gathers:
                average.add(k)
            if keys is not None:
                keys.append(k)
            fiedler = target = order = None
            if distraction is None or config.beta == 0:
                attended = F.scaled_dot_product_attention(q, k, v)
            else:
                if cut and config.similarity == "kk-mean":
                    fiedler, target, order = average.cut(distraction, config.cut_threshold)
                elif cut:
                    similarity = ops.key_similarity({"kk": k, "qq": q, "vv": v}[config.similarity], prefix=prefix)
                    fiedler = start = ops.fiedler_vector(similarity, start)
                    target = ops.defocus_mask(fiedler, distraction, threshold=config.cut_threshold)
                else:
                    target = self._other_target(distraction)
                attended = ops.refocused_attention(
                    q, k, v, distraction, target, config.beta, prefix=prefix, order=order
                )
            self.observe(Observed(number, x, q, k, distraction, fiedler, target))
            x, branch = block.finish(x, attended, ops)
        return x, y, qkv, distraction, average

    def _enter(
        self, block: Block, x: Tensor, branch: Tensor | None, number: int, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, QKV | None, Tensor | None]:
        """A block's repaired input x + branch and its norm [B, T, d]; its q, k and v; and T_dis, bool [B, N].

        q, k and v are None where they are not known yet, and T_dis is None if it is known to be empty.
        """
        config, ops, prefix = self.config, self.ops, self.tower.prefix
        norm: Any = block.ln_1
        tau, tau_attn = config.thresholds(x.shape[2], x.shape[1] - prefix)
        fused = config.tokens == "distraction" and config.embedding == "redistribute" and ops.fuses(norm)
        if fused and tau_attn is None:
            given = (x, branch, norm.weight, norm.bias, config.distraction_dims, tau, grid)
            more = {"eps": norm.eps, "shifted": config.shifted, "size": config.neighbourhood, "prefix": prefix}
            x, y, distraction = ops.repaired_layer_norm(*given, **more)
            return x, y, None, distraction
        linears = block.linears() if fused else None
        if tau_attn is not None and linears is not None:
            return self._enter_jointly(block, linears, x, branch, tau, tau_attn, grid)
        x = x if branch is None else x + branch
        distraction = self._locate(block, x, number)
        if _known_empty(distraction):
            return x, norm(x), None, None
        x = self._repair(x, distraction, grid)
        return x, norm(x), None, distraction

    def _enter_jointly(
        self,
        block: Block,
        linears: list[tuple[Tensor, Tensor | None]],
        x: Tensor,
        branch: Tensor | None,
        tau: float,
        tau_attn: float,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor, QKV, Tensor]:
        """`_enter` with one projection, of which only the rows of distraction tokens are computed again."""
        config, ops, prefix = self.config, self.ops, self.tower.prefix
        norm: Any = block.ln_1
        dims, affine, eps = config.distraction_dims, (norm.weight, norm.bias), norm.eps
        x, y, candidates, before = ops.candidate_layer_norm(
            x, branch, *affine, dims, tau, eps=eps, shifted=config.shifted, prefix=prefix
        )
        outputs = [F.linear(y, weight, bias) for weight, bias in linears]
        q, k, v = block.heads_in(outputs)
        given = (x, y, before, candidates, q, k, *affine, dims, tau_attn, grid)
        size = config.neighbourhood
        x, y, distraction = ops.joint_repair(*given, eps=eps, size=size, prefix=prefix, inplace=True)
        for (weight, bias), out in zip(linears, outputs, strict=True):  # which q, k and v are views of
            ops.project_tokens(y, distraction, weight, bias, out, prefix=prefix, inplace=True)
        return x, y, (q, k, v), distraction

    def _locate(self, block: Block, x: Tensor, number: int) -> Tensor:
        """T_dis, bool [B, N], from the input of a block [B, T, d]: steps 1 and 2."""
        config, prefix = self.config, self.tower.prefix
        patches = x[:, prefix:]
        tau, tau_attn = config.thresholds(patches.shape[2], patches.shape[1])
        mask = self.ops.distraction_mask(patches, config.distraction_dims, tau, shifted=config.shifted)
        if tau_attn is not None:
            q, k, _ = block.query_key_value(x)
            mask = mask & (self.ops.received_attention(q, k, prefix=prefix) > tau_attn)
        if config.tokens == "random":
            # As many tokens of each image, in the same order, so that an image's result depends on no other [D].
            if isinstance(patches.shape[1], torch.SymInt):
                raise ValueError('tokens="random" draws for one number of patches: export it at a fixed image size')
            generator = torch.Generator().manual_seed(number)
            rank = torch.randperm(patches.shape[1], generator=generator).to(x.device)
            mask = rank < mask.sum(dim=1, keepdim=True)
        return mask

    def _repair(self, x: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Step 3, or its variant of table 1, on the input of a block [B, T, d], which may be overwritten."""
        config, ops, prefix = self.config, self.ops, self.tower.prefix
        patches = x[:, prefix:]
        if config.embedding == "none":
            return x
        if config.embedding == "redistribute":
            size, inplace = config.neighbourhood, not x.requires_grad
            repaired = ops.redistribute_embeddings(
                patches, mask, config.distraction_dims, grid, size=size, inplace=inplace
            )
            if inplace:
                return x
        elif config.embedding == "clamp":
            tau, _ = config.thresholds(patches.shape[2], patches.shape[1])
            repaired = ops.clamp_embeddings(patches, mask, config.distraction_dims, tau, shifted=config.shifted)
        else:
            repaired = ops.filter_embeddings(patches, mask, grid, size=config.neighbourhood, statistic=config.embedding)
        return torch.cat([x[:, :prefix], repaired], dim=1)

    def _other_target(self, distraction: Tensor) -> Tensor:
        """Who else receives the budget, bool [B, N] over patches or [B, T] over all tokens: the paper's table 6."""
        target, prefix = self.config.target, self.tower.prefix
        if target == "non-distraction":
            return ~distraction
        patches = torch.zeros_like(distraction) if target == "cls" else ~distraction
        return F.pad(patches, (prefix, 0), value=True)

    def observe(self, seen: Observed) -> None:
        """Called once for a block; explanations override it.

        This happens to every block except a last one whose attention a proxy replaces.
        """


def _known_empty(mask: Tensor) -> bool:
    """Whether the mask is known to be empty, so that the block stays plain; looked up on a CPU only, where it is free.

    On a device the host would have to wait for the answer.
    """
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any()
