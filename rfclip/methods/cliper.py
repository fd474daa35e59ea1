"""CLIPer without diffusion: the last block attends as all blocks together do, and embeddings of all blocks score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.methods.base import Method
from rfclip.methods.rule import Rule
from rfclip.ops import Backend
from rfclip.ops.numerics import matmul
from rfclip.ops.reference import BAND


class CLIPer(Method):
    """z = O(A_L v), without residual and MLP, where A_l is the attention of all blocks but the last, balanced l times.

    S is the sum over blocks of softmax(q k^T / sqrt(D)), by head. Once balanced, its columns are divided by their sums,
    and then its rows by theirs. With B = (S + S^T) / 2 after l times, A_l are the rows of max(B - mean over queries of
    B, 0), divided by their sums; a row without anything left is that of the identity [D].
    """

    def tokens(self, patches: Tensor) -> Tensor:
        streams, S = self._streams(patches)
        *_, A = _balanced(S, len(streams))
        return self._gathered(A, streams[-1])[:, self.tower.prefix :]

    def fused(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """What `Fused` needs: z_l = O(A_l v_l) for l = 1 .. L, and the map of the last.

        v_l are the last block's values of x[L] and, for l < L, of ln_1(x[l]) of block l, which they normalize again.

        Returns:
            proj(ln_post(z_l)) of the patches, [B, L, C, gh, gw], and the mean over heads of A_L between patches,
            [B, N, N] in the computing dtype.
        """
        self.tower.check_ready()
        prefix, (streams, S) = self.tower.prefix, self._streams(patches)
        found: list[Tensor] = []
        for block, u, A in zip(self.tower.blocks, streams, _balanced(S, len(streams)), strict=True):
            u = u if len(found) == len(streams) - 1 else block.ln_1(u)
            found.append(self.embeddings(self._gathered(A, u)[:, prefix:], patches.shape[2:]))
        return torch.stack(found, dim=1), A.mean(dim=1)[:, prefix:, prefix:]

    def _streams(self, patches: Tensor) -> tuple[list[Tensor], Tensor]:
        """x[1], .., x[L], and S [B, H, T, T] in the computing dtype."""
        streams: list[Tensor] = []
        S = patches.new_zeros(())
        for _, x, (q, k, _) in self.inputs(patches):
            streams.append(x)
            if len(streams) < len(self.tower.blocks):
                S = S + (matmul(q, k.mT) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return streams, S

    def _gathered(self, A: Tensor, u: Tensor) -> Tensor:
        """O(A v), [B, T, d], with v of u [B, T, d]."""
        last = self.tower.blocks[-1]
        _, v = last.key_value(last.ln_1(u))
        return last.project(matmul(A, v).to(v.dtype))


def _balanced(S: Tensor, rounds: int) -> Iterator[Tensor]:
    """A_1, A_2, .. of S [B, H, T, T], which stays: balanced, it is r_i S_ij c_j."""
    tiny, eye = torch.finfo(S.dtype).tiny, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    r = torch.ones_like(S[..., :1])
    for _ in range(rounds):
        c = 1 / matmul(r.mT, S).clamp(min=tiny)
        r = 1 / matmul(S, c.mT).clamp(min=tiny)
        B = r * S * c
        B = (B + B.mT) / 2
        B = (B - B.mean(dim=-2, keepdim=True)).clamp(min=0)
        total = B.sum(dim=-1, keepdim=True)
        yield B / total.clamp(min=tiny) + eye * (total == 0)


class Fused(Rule):
    """Names score by the embeddings of all blocks, the last one's smoothed by its attention.

    p_l is the softmax over names of `scale` <z_l, t>, z_l as in `CLIPer.fused`, over the names asked for, those of the
    background and the normalized mean of the former, which are kept. In p_L, what is under `cut` of a name's maximum
    becomes 0. With B the map of attention,

        out[c, j] = sum over i of p_L[c, i] B[i, j] + mean over l of p_l[c, j]

    At the size of the labels, each name's map is multiplied so that its maximum is again that over the patches, m_c; if
    `stretched`, its minimum becomes 0 as well, unless it is constant [D]. A pixel belongs to the largest map of those
    with m_c > `score`, and to none if that is under `least`. A threshold that is asked for takes the place of `least`.
    The background is the class of that name, if there is one [D].
    """

    at_once: ClassVar[bool] = True

    def __init__(self, scale: float, cut: float, score: float, least: float, stretched: bool = False) -> None:
        self.scale, self.cut, self.score, self.least, self.stretched = scale, cut, score, least, stretched

    def check(self, method: Method) -> None:
        if not isinstance(method, CLIPer):
            raise ValueError(
                f"the protocol of cliper needs what only that method computes, and the method is {method.name!r}: "
                "choose method 'cliper', or protocol 'common'"
            )

    def knows(self, text: Tensor, embed: Callable[[tuple[str, ...]], Tensor], background: Tensor) -> Tensor:
        """Which names are not the background's."""
        return ~background

    def look(self, method: Method, patches: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalized embeddings of all blocks [B, L, C, gh, gw] and the map [B, N, N], both float32."""
        assert isinstance(method, CLIPer)
        z, B = method.fused(patches)
        return F.normalize(z.float(), dim=2), B.float()

    def window(
        self, patches: tuple[Tensor, Tensor], image: Tensor | None, text: Tensor, known: Tensor | None
    ) -> Tensor:
        assert known is not None
        z, B = patches
        asked = known[:, None].to(text.dtype)
        names = torch.cat([text, F.normalize((text * asked).sum(dim=0, keepdim=True), dim=-1)])
        total = z.new_zeros(len(z), len(text), B.shape[-1])
        for number, x in enumerate(z.unbind(1), 1):
            p = (self.scale * names @ x.flatten(2)).softmax(dim=1)[:, :-1] * asked
            if number == z.shape[1]:
                p = p.where(p >= self.cut * p.amax(dim=-1, keepdim=True), 0)
            total += p
        return (p @ B + total / z.shape[1]).unflatten(-1, z.shape[3:])

    def labels(
        self,
        ops: Backend,
        logits: Tensor,
        size: tuple[int, int],
        scale: float,
        class_of_name: Tensor,
        threshold: float | None,
    ) -> Tensor:
        most = logits.amax(dim=(1, 2))
        low, high = _range(logits, size)
        varied = (high > low) & (most > logits.amin(dim=(1, 2)))  # or rounding would be stretched
        low = low.where(varied, 0) if self.stretched else torch.zeros_like(low)
        factor = most / (high - low).where(high > low, 1)
        maps = (logits - low[:, None, None]) * factor[:, None, None]
        maps = maps.where((most > self.score)[:, None, None], -1)  # below every `least`
        # What is under `least` belongs to one more class, whose map is constant.
        least = self.least if threshold is None else threshold
        nothing = int(class_of_name.max()) + 1
        found = ops.upsample_argmax(
            torch.cat([maps, torch.full_like(maps[:1], least)]),
            size,
            1.0,
            torch.cat([class_of_name, class_of_name.new_tensor([nothing])]),
            None,
        )
        return found.where(found != nothing, -1)


def _range(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each map [K, h, w] once it is resized."""
    ranges = []
    for part in maps.split(max(1, BAND // (size[0] * size[1]))):
        resized = F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0].flatten(1)
        ranges.append(torch.stack(resized.aminmax(dim=1)))
    low, high = torch.cat(ranges, dim=1)
    return low, high
