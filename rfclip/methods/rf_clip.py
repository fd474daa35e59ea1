"""RF-CLIP, and its special cases: plain CLIP (z = F[L]) and the paper's two baselines.

"kk" is z = O(SS(k) v), without the rows and columns of the prefix, not renormalized [D]; "kk-mean" takes the mean of
all blocks' SS(k).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.methods.base import Method
from rfclip.ops.key_average import KeyAverage
from rfclip.towers import Block


class LastBlock(NamedTuple):
    """The input of the last block after its repair [B, T, d], that block's q (if wanted), k and v, and the average."""

    x: Tensor
    q: Tensor | None
    k: Tensor
    v: Tensor
    average: KeyAverage


class RFCLIP(Method):
    """RF-CLIP in every form that its config allows. Steps are those of docs/method.md."""

    def last(self, patches: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """With every block refocused; the last one then runs unchanged."""
        x, q, k, v, _ = self._run(patches)
        return x, (q, k, v)

    def tokens(self, patches: Tensor) -> Tensor:
        """The last block's values gathered by the proxy attention [P 14]: step 6."""
        proxy, last, prefix = self.config.proxy, self.tower.blocks[-1], self.tower.prefix
        x, q, k, v, average = self._run(
            patches, gathers=proxy == "kk-mean", last_query=proxy not in ("kk", "kk-mean", "vv")
        )
        if proxy == "none":
            return last.finish(x, F.scaled_dot_product_attention(q, k, v))[:, prefix:]
        if proxy == "qk":  # like the others without the rows and columns of the prefix, not renormalized [D]
            patches_only = torch.cat([torch.zeros_like(v[:, :, :prefix]), v[:, :, prefix:]], dim=2)
            gathered = F.scaled_dot_product_attention(q, k, patches_only)[:, :, prefix:]
        elif proxy == "kk-mean":
            gathered = average.gather(v)
        else:
            gathered = self.ops.proxy_attention({"kk": k, "qq": q, "vv": v}[proxy][None], v, prefix=prefix)
        return last.project(gathered)

    def _run(self, patches: Tensor, gathers: bool = False, last_query: bool = True) -> LastBlock:
        """All blocks except the last one's attention; the average can `gather` if asked to."""
        config, ops, blocks, prefix = self.config, self.ops, self.tower.blocks, self.tower.prefix
        grid = patches.shape[2], patches.shape[3]
        x = self.tower.embed(patches)
        refocused = range(1, len(blocks) + 1) if config.layers is None else config.layers
        refocused = refocused if config.distraction_dims else ()
        cut = config.beta > 0 and config.target == "defocused"
        # The similarity is averaged over the blocks up to this one.
        averaged = min(max(refocused, default=0), len(blocks) - 1) if cut and config.similarity == "kk-mean" else 0
        average = ops.key_average(layers=len(blocks), similar=averaged, gathers=gathers, prefix=prefix)
        fiedler = None
        for number, block in enumerate(blocks, 1):
            distraction = None
            if number in refocused:
                distraction = self._locate(block, x, number)
                if _known_empty(distraction):
                    distraction = None
                else:
                    x = self._repair(x, distraction, grid)
            q, k, v = block.query_key_value(x, query=last_query or number < len(blocks))
            if number <= averaged or gathers:
                average.add(k)
            if number == len(blocks):
                self.observe(number, x, q, k, distraction, None, None)
                break
            target = None
            if distraction is None or config.beta == 0:
                attended = F.scaled_dot_product_attention(q, k, v)
            else:
                if cut:
                    similarity = average.similarity
                    if config.similarity != "kk-mean":
                        similarity = ops.key_similarity({"kk": k, "qq": q, "vv": v}[config.similarity], prefix=prefix)
                    fiedler = ops.fiedler_vector(similarity, fiedler)
                target = self._target(distraction, fiedler)
                attended = ops.refocused_attention(q, k, v, distraction, target, config.beta, prefix=prefix)
            self.observe(number, x, q, k, distraction, fiedler if cut and target is not None else None, target)
            x = block.finish(x, attended)
        return LastBlock(x, q, k, v, average)

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

    def _target(self, distraction: Tensor, fiedler: Tensor | None) -> Tensor:
        """The tokens that receive the budget, bool [B, N] over patches or [B, T] over all tokens."""
        target, prefix = self.config.target, self.tower.prefix
        if target == "defocused":
            return self.ops.defocus_mask(fiedler, threshold=self.config.cut_threshold) & ~distraction
        if target == "non-distraction":
            return ~distraction
        patches = torch.zeros_like(distraction) if target == "cls" else ~distraction
        return F.pad(patches, (prefix, 0), value=True)

    def observe(
        self,
        number: int,
        x: Tensor,
        q: Tensor | None,
        k: Tensor,
        distraction: Tensor | None,
        fiedler: Tensor | None,
        target: Tensor | None,
    ) -> None:
        """Called for every block with its repaired input and what was found there; explanations override it."""


def _known_empty(mask: Tensor) -> bool:
    """Whether the mask is known to be empty, so that the block stays plain; looked up on a CPU only, where it is free.

    On a device the host would have to wait for the answer.
    """
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any()
