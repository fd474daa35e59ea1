"""What the code that RF-CLIP's authors released computes, and how its evaluation decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.config import RefocusConfig
from rfclip.extras import require
from rfclip.methods.base import Method
from rfclip.methods.rule import Rule
from rfclip.ops.key_average import KeyAverage


class Released(Method):
    """What the code that RF-CLIP's authors released computes by default, where it departs from the paper.

    Patches with a weight over tau / d in D_dis become 0.6 x + 0.4 times the mean of their 3 x 3 square, zeros beyond
    the border, after every block. With g the mean of F[1..L] and W the cosines of its patches, without entries under
    0.4, the last block's k and v are those of F[L-1] and of g, patches multiplied by W: z is the mean over both of
    O(A v), A the mean over blocks of SS(k) without the rows and columns of the prefix. Of the config, only D_dis and
    tau are read.
    """

    config: RefocusConfig

    def stream(self, patches: Tensor) -> Tensor:
        x, *_ = self._run(patches)
        return x

    def tokens(self, patches: Tensor) -> Tensor:
        return self._tokens_and_stream(patches)[0]

    def dense_and_image(self, patches: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.tower.check_ready()
        z, x = self._tokens_and_stream(patches)
        return self.embeddings(z, patches.shape[2:]), self.tower.readout(x[:, 0])

    def _tokens_and_stream(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """O is linear, and so is A v in v: earlier blocks' SS(k) gather the mean of both v, O projects that of A v."""
        prefix, L = self.tower.prefix, len(self.tower.blocks)
        earlier = self.ops.key_average(layers=L - 1, similar=0, gathers=True, prefix=prefix)
        x, before, guide = self._run(patches, earlier)
        both = torch.cat([before, guide], dim=-1)  # [B, T, 2 d]
        aggregated = self.ops.cosine_aggregation(guide[:, prefix:], both[:, prefix:], 0.4)
        both = torch.cat([both[:, :prefix], aggregated], dim=1).unflatten(-1, (2, -1)).movedim(2, 0)
        last = self.tower.blocks[-1]
        k, v = last.key_value(last.ln_1(both.flatten(0, 1)))  # [2 B, H, T, D]
        gathered = self.ops.proxy_attention(k[None], v, prefix=prefix)
        v, gathered = (u.unflatten(0, both.shape[:2]).mean(dim=0) for u in (v, gathered))
        if L > 1:
            gathered = torch.lerp(earlier.gather(v), gathered, 1 / L)
        return last.project(gathered), x

    def _run(self, patches: Tensor, earlier: KeyAverage | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """F[L], F[L-1], and the mean of F[1..L]; the keys of all blocks but the last are added to `earlier`."""
        grid, blocks = (patches.shape[2], patches.shape[3]), self.tower.blocks
        x = self.tower.embed(patches, self.ops)
        total = torch.zeros_like(x)
        for number, block in enumerate(blocks, 1):
            before = x
            q, k, v = block.query_key_value(x)
            if earlier is not None and number < len(blocks):
                earlier.add(k)
            x = torch.add(*block.finish(x, F.scaled_dot_product_attention(q, k, v), self.ops))
            x = self._denoised(x, grid)
            total += x
        return x, before, total / len(blocks)

    def _denoised(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """In place if no gradient is recorded."""
        prefix, inplace = self.tower.prefix, not x.requires_grad
        patches = x[:, prefix:]
        tau, _ = self.config.thresholds(patches.shape[2], patches.shape[1])
        mask = self.ops.distraction_mask(patches, self.config.distraction_dims, tau)
        blended = self.ops.blend_embeddings(patches, mask, grid, inplace=inplace)
        return x if inplace else torch.cat([x[:, :prefix], blended], dim=1)


class AdjustedNames(Rule):
    """Names are moved towards what each window shows of them, and the picture as a whole has a say.

    With g the image embedding of the picture and t_c that of name c, sim[c] = <g, t_c>. In each window and each cluster
    of names, the name i with the largest sim becomes t'_i = normalize((1 - shift) t_i + shift m), where m is the
    normalized mean of the two patches nearest to t_i; others stay as they are. Then

        logits[p, c] = (1 - share) <patch p, t'_c> + share sim[c]

    Clusters are those of complete linkage on the distances 1 - <t_a, t_b>, cut at `distance`. The paper does not name
    this step; the authors' code has it.
    """

    image: ClassVar[Literal["picture", "window"] | None] = "picture"

    def __init__(self, share: float, shift: float, distance: float) -> None:
        require("the protocol of the method released", "evaluate", "scipy")
        self.share, self.shift, self.distance = share, shift, distance

    def knows(self, text: Tensor, embed: Callable[[tuple[str, ...]], Tensor], background: Tensor) -> Tensor:
        """The cluster of each name, int64 [K], from 0."""
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        if len(text) < 2:
            return torch.zeros(len(text), dtype=torch.int64)
        distances = (1 - text.double() @ text.double().T).clamp(min=0).fill_diagonal_(0)
        tree = linkage(squareform(distances.numpy(), checks=False), "complete")
        return torch.from_numpy(fcluster(tree, self.distance, "distance").astype("int64")) - 1

    def window(self, patches: Tensor, image: Tensor | None, text: Tensor, known: Tensor | None) -> Tensor:
        assert image is not None and known is not None
        tokens = patches.flatten(2).mT  # [B, N, C]
        sim = image @ text.T  # [B, K]
        clusters = torch.arange(int(known.max()) + 1, device=known.device)
        members = sim[:, None].where(known == clusters[:, None], -torch.inf)  # [B, clusters, K]
        chosen = members.argmax(dim=-1)  # [B, clusters]
        names = text[chosen]
        nearest = (names @ tokens.mT).topk(min(2, tokens.shape[1]), dim=-1).indices  # [B, clusters, 2]
        batch = torch.arange(len(tokens), device=text.device)[:, None]
        mean = F.normalize(tokens[batch[..., None], nearest].mean(dim=2), dim=-1)
        moved = text.repeat(len(tokens), 1, 1)
        moved[batch, chosen] = F.normalize(torch.lerp(names, mean, self.shift), dim=-1)
        logits = torch.lerp(moved @ tokens.mT, sim[..., None], self.share)
        return logits.unflatten(-1, patches.shape[2:])


class AdjustedNamesByWindow(AdjustedNames):
    """The same with the image embedding of each window, as on Cityscapes."""

    image: ClassVar[Literal["picture", "window"] | None] = "window"
