"""The methods: how each makes patch embeddings out of the same image tower, whose weights stay as they are.

Notation: x[l] is the residual stream that enters block l of L, F[l] = x[l+1] what leaves it; q, k, v are the heads of
ln_1(x[L]), SS(u) = softmax(u u^T / sqrt(D)) over all T tokens, O the output projection. A method says what z is; its
patch embeddings are proj(ln_post(z)) without CLS. [P n] is equation n of RF-CLIP's paper (arXiv 2511.16170) and [D] a
decision of this project. Where an original has a statistic over a batch, here each image has its own [D], and position
embeddings are resized as `rfclip.tower` does it for all [D].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from rfclip import reference
from rfclip.backends import choose, functions
from rfclip.config import RefocusConfig
from rfclip.reference import computing_dtype, matmul
from rfclip.tower import Block, Tower

PLAIN = RefocusConfig(distraction_dims=(), proxy="none")  # the tower as it was


@dataclass(frozen=True)
class Protocol:
    """How a method sees a picture and decides; sides are in pixels for a tower trained at 224, others' are scaled.

    Attributes:
        short_side, window, stride: of the resized picture, and of the windows over it.
        logit_scale: factor of the cosines before the softmax.
        threshold: class probability under which a pixel is background, where a benchmark has such a class.
        benchmarks: what differs on some of them, by name.
    """

    short_side: int = 336
    window: int = 224
    stride: int = 112
    logit_scale: float = 40.0
    threshold: float | None = 0.1
    benchmarks: dict[str, dict[str, float | None]] = field(default_factory=lambda: {"cityscapes": {"short_side": 560}})

    def on(self, benchmark: str) -> Protocol:
        """What holds on a benchmark."""
        return replace(self, **self.benchmarks.get(benchmark, {}))


class Method:
    """A method on an image tower. It keeps no tensor between calls, so threads can share it.

    Attributes:
        name: as `rfclip.refocus` takes it.
        source: where it comes from.
        protocol: how it is evaluated.
        blocks: how many the tower must have.
        configured: whether it takes a `RefocusConfig`.
        fixed: the config of a method that is a special case of RF-CLIP.
        sees_images: whether `dense` looks at the pictures besides their patches.
        beyond: what its formula computes beyond the tower's blocks, for those that take notably longer.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    protocol: ClassVar[Protocol] = Protocol()
    blocks: ClassVar[int] = 1
    configured: ClassVar[bool] = False
    fixed: ClassVar[RefocusConfig | None] = None
    sees_images: ClassVar[bool] = False
    beyond: ClassVar[str] = ""

    def __init__(self, tower: Tower, config: RefocusConfig | None, backend: str):
        if len(tower.blocks) < self.blocks:
            raise ValueError(f"method {self.name!r} needs {self.blocks} blocks, and this tower has {len(tower.blocks)}")
        self.tower, self.config, self.backend = tower, self.fixed if config is None else config, backend
        self._chosen: tuple[torch.device, torch.dtype, SimpleNamespace] | None = None
        self.ops  # noqa: B018  a backend that cannot run here is refused now

    @property
    def ops(self) -> SimpleNamespace:
        """The functions of the method, from the backend that is right for where the weights are now."""
        weight = self.tower.weight
        if self._chosen is None or self._chosen[:2] != (weight.device, weight.dtype):
            chosen = choose(self.backend, weight.device, weight.dtype)
            self._chosen = weight.device, weight.dtype, functions(chosen.backend)
        return self._chosen[2]

    def __call__(self, *args: object, **kwargs: object) -> object:
        """What the tower's own forward returns, and for the same arguments."""
        self.tower.check_eval()
        return self.tower.pool(self.stream(self.tower.patches(self.tower.images(*args, **kwargs))))

    def stream(self, patches: Tensor) -> Tensor:
        """What leaves the last block [B, T, d] on the way to the image embedding; most methods leave it as it is."""
        x, qkv = self._last(patches)
        return self.tower.blocks[-1].finish(x, F.scaled_dot_product_attention(*qkv))

    def dense(self, patches: Tensor, images: Tensor | None = None) -> Tensor:
        """Patch embeddings [B, C, gh, gw], before normalization.

        Args:
            patches: the tower's [B, d, gh, gw], of images, or of windows that were cut out after the convolution.
            images: those windows [B, 3, height, width], normalized as the model expects, where `sees_images`.
        """
        self.tower.check_eval()
        return self.tower.readout(self.tokens(patches)).mT.unflatten(-1, patches.shape[2:])

    def tokens(self, patches: Tensor) -> Tensor:
        """z without CLS, [B, N, d]."""
        raise NotImplementedError

    def _inputs(self, patches: Tensor) -> Iterator[tuple[Block, Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """Each block with its input in the plain tower, and its q, k and v."""
        x = self.tower.embed(patches)
        for number, block in enumerate(self.tower.blocks, 1):
            qkv = block.query_key_value(x)
            yield block, x, qkv
            if number < len(self.tower.blocks):
                x = block.finish(x, F.scaled_dot_product_attention(*qkv))

    def _last(self, patches: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x[L], of the plain tower in most methods, and its q, k and v."""
        for _, x, qkv in self._inputs(patches):  # noqa: B007  only the last ones count
            pass
        return x, qkv


class RFCLIP(Method):
    """RF-CLIP, in every form that its config has."""

    name, source, configured = "rf-clip", "Target Refocusing via Attention Redistribution, AAAI 2026", True

    def _last(self, patches: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """With every block refocused; the last one then runs as it was."""
        x, qkv, *_ = self._run(patches)
        return x, qkv

    def tokens(self, patches: Tensor) -> Tensor:
        """The last block's values gathered by the proxy attention [P 14]."""
        proxy, last = self.config.proxy, self.tower.blocks[-1]
        query = proxy not in ("kk", "kk-mean", "vv")
        x, (q, k, v), keys, heads, count = self._run(patches, keep_keys=proxy == "kk-mean", last_query=query)
        if proxy == "none":
            return last.finish(x, F.scaled_dot_product_attention(q, k, v))[:, 1:]
        if proxy == "qk":  # like the others without the row and the column of CLS, not renormalized [D]
            without_cls = torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, 1:]], dim=2)
            gathered = F.scaled_dot_product_attention(q, k, without_cls)[:, :, 1:]
        elif proxy == "kk-mean":
            gathered = self.ops.proxy_attention(keys, v, heads=heads, count=count)
        else:
            gathered = self.ops.proxy_attention({"kk": k, "qq": q, "vv": v}[proxy][None], v)
        return last.project(gathered)

    def _run(
        self, patches: Tensor, keep_keys: bool = False, last_query: bool = True
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor], Tensor | None, Tensor | None, int]:
        """All blocks but the last one's attention.

        Returns the input of the last block after its redistribution [B, T, d] and that block's q, if wanted, k and v.
        On demand also what the proxy attention reads: the keys of the blocks [., B, H, T, D], and in place of the
        first `count` of them, where the backend asks for it, the sum of their attention [B, H, N, N].
        """
        config, ops, blocks = self.config, self.ops, self.tower.blocks
        grid = patches.shape[2], patches.shape[3]
        x = self.tower.embed(patches)
        refocused = range(1, len(blocks) + 1) if config.layers is None else config.layers
        refocused = refocused if config.distraction_dims else ()
        cut = config.beta > 0 and config.target == "defocused"
        # The similarity is averaged over the blocks up to this one.
        averaged = min(max(refocused, default=0), len(blocks) - 1) if cut and config.similarity == "kk-mean" else 0
        N, count = grid[0] * grid[1], 0
        keys = heads = similarity = fiedler = None
        if keep_keys and 4 * len(x) * blocks[0].heads * N * N <= ops.heads_budget:
            count = averaged
        for number, block in enumerate(blocks, 1):
            distraction = None
            if number in refocused:
                distraction = self._locate(block, x, number)
                if _seen_empty(distraction):
                    distraction = None
                else:
                    x = self._repair(x, distraction, grid)
            q, k, v = block.query_key_value(x, query=last_query or number < len(blocks))
            if keep_keys and number > count:
                keys = k.new_empty((len(blocks) - count, *k.shape)) if keys is None else keys
                keys[number - 1 - count] = k
            if number == len(blocks):
                self._seen(number, x, q, k, distraction, None, None)
                break
            if number <= averaged:
                if count and heads is None:
                    heads = k.new_zeros((*k.shape[:2], N, N), dtype=reference.computing_dtype(k))
                similarity = ops.key_similarity(k, similarity, number - 1, inplace=not k.requires_grad, heads=heads)
            elif cut and distraction is not None:
                similarity = ops.key_similarity({"kk": k, "qq": q, "vv": v}[config.similarity])
            target = None
            if distraction is None or config.beta == 0:
                attended = F.scaled_dot_product_attention(q, k, v)
            else:
                if cut:
                    fiedler = ops.fiedler_vector(similarity, fiedler)
                target = self._target(distraction, fiedler)
                attended = ops.refocused_attention(q, k, v, distraction, target, config.beta)
            self._seen(number, x, q, k, distraction, fiedler if cut and target is not None else None, target)
            x = block.finish(x, attended)
        return x, (q, k, v), keys, heads, count

    def _locate(self, block: Block, x: Tensor, number: int) -> Tensor:
        """T_dis, bool [B, N], from the input of a block [B, T, d]: steps 1 and 2."""
        config, patches = self.config, x[:, 1:]
        tau = config.tau / patches.shape[2]
        mask = self.ops.distraction_mask(patches, config.distraction_dims, tau, shifted=config.shifted)
        if config.tau_attn is not None:
            q, k, _ = block.query_key_value(x)
            mask = mask & (self.ops.received_attention(q, k) > config.tau_attn / patches.shape[1])
        if config.tokens == "random":
            # As many tokens of each image, the same order in each, so that an image's result depends on no other [D].
            generator = torch.Generator().manual_seed(number)
            rank = torch.randperm(patches.shape[1], generator=generator).to(x.device)
            mask = rank < mask.sum(dim=1, keepdim=True)
        return mask

    def _repair(self, x: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Step 3, or its variant of table 1, on the input of a block [B, T, d], which may be overwritten."""
        config, ops, patches = self.config, self.ops, x[:, 1:]
        if config.embedding == "none":
            return x
        if config.embedding == "redistribute":
            size, inplace = config.neighbourhood, not x.requires_grad
            repaired = ops.redistribute_embeddings(
                patches, mask, config.distraction_dims, grid, size=size, inplace=inplace
            )
            return x if inplace else torch.cat([x[:, :1], repaired], dim=1)
        if config.embedding == "clamp":
            tau = config.tau / patches.shape[2]
            repaired = ops.clamp_embeddings(patches, mask, config.distraction_dims, tau, shifted=config.shifted)
        else:
            repaired = ops.filter_embeddings(patches, mask, grid, size=config.neighbourhood, statistic=config.embedding)
        return torch.cat([x[:, :1], repaired], dim=1)

    def _seen(
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

    def _target(self, distraction: Tensor, fiedler: Tensor | None) -> Tensor:
        """The tokens that receive the budget, bool [B, N] over patches or [B, T] over all tokens."""
        target = self.config.target
        if target == "defocused":
            return self.ops.defocus_mask(fiedler, threshold=self.config.cut_threshold) & ~distraction
        if target == "non-distraction":
            return ~distraction
        patches = torch.zeros_like(distraction) if target == "cls" else ~distraction
        return F.pad(patches, (1, 0), value=True)


class CLIP(RFCLIP):
    """z = F[L]: nothing changes."""

    name, source, configured, fixed = "clip", "Radford et al., ICML 2021", False, PLAIN


class KK(RFCLIP):
    """z = O(SS(k) v), without the row and the column of CLS, not renormalized [D]: the paper's first baseline."""

    name, source, configured = "kk", RFCLIP.source, False
    fixed = RefocusConfig(distraction_dims=(), proxy="kk")


class KKMean(RFCLIP):
    """As kk with the mean of all blocks' SS(k): the paper's second baseline."""

    name, source, configured = "kk-mean", RFCLIP.source, False
    fixed = RefocusConfig(distraction_dims=())


def _seen_empty(mask: Tensor) -> bool:
    """Whether no token is in the mask, so that a block stays plain; on a CPU only, where to look means no wait."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any()


class MaskCLIP(Method):
    """z = O(v): every patch attends to itself; no residual, no MLP [D, as in ClearCLIP's code]."""

    name, source = "maskclip", "Zhou et al., ECCV 2022"
    protocol = Protocol(short_side=512, threshold=None, benchmarks={"context59": {"short_side": 520}})

    def tokens(self, patches: Tensor) -> Tensor:
        _, (_, _, v) = self._last(patches)
        return self.tower.blocks[-1].project(v)[:, 1:]


class SCLIP(Method):
    """u = x[L] + O((SS(q) + SS(k)) v), z = u + MLP(ln_2(u)): rows sum to 2, and the residual stays."""

    name, source = "sclip", "Wang et al., ECCV 2024"
    protocol = Protocol(
        benchmarks={
            "cityscapes": {"short_side": 560},
            "coco_stuff": {"short_side": 448},
            "voc21": {"logit_scale": 65.0},
            "context60": {"logit_scale": 50.0},
            "coco_object": {"logit_scale": 50.0},
        }
    )

    def tokens(self, patches: Tensor) -> Tensor:
        x, (q, k, v) = self._last(patches)
        gathered = self.ops.self_attention(q, v) + self.ops.self_attention(k, v)
        return self.tower.blocks[-1].finish(x, gathered)[:, 1:]


class ClearCLIP(Method):
    """z = O(SS(q) v), without residual and MLP."""

    name, source = "clearclip", "Lan et al., ECCV 2024"
    protocol = Protocol(
        short_side=448,
        window=448,
        stride=224,
        logit_scale=50.0,
        threshold=0.5,
        benchmarks={
            "cityscapes": {"window": 224},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.4},
        },
    )

    def tokens(self, patches: Tensor) -> Tensor:
        _, (q, _, v) = self._last(patches)
        return self.tower.blocks[-1].project(self.ops.self_attention(q, v))[:, 1:]


class NACLIP(Method):
    """z = O(softmax(k k^T / sqrt(D) + G) v), G[i, j] = exp(-|i - j|^2 / (2 * 5^2)) by distance on the patch grid."""

    name, source = "naclip", "Hajimiri et al., WACV 2025"

    def tokens(self, patches: Tensor) -> Tensor:
        _, (_, k, v) = self._last(patches)
        down, right = (
            torch.arange(1 - side, side, dtype=computing_dtype(k), device=k.device) for side in patches.shape[2:]
        )
        bias = torch.exp(-(down[:, None].square() + right.square()) / (2 * 5**2))
        return self.tower.blocks[-1].project(self.ops.self_attention(k, v, bias))[:, 1:]


class CLIPtrase(Method):
    """u = x[L] + O((SS(q) + SS(k) + SS(v)) v), z = u + MLP(ln_2(u)); its clustering of the picture is left out."""

    name, source = "cliptrase", "Shao et al., ECCV 2024"
    protocol = Protocol(short_side=224, logit_scale=100.0, threshold=None, benchmarks={})

    def tokens(self, patches: Tensor) -> Tensor:
        x, (q, k, v) = self._last(patches)
        gathered = sum(self.ops.self_attention(u, v) for u in (q, k, v))
        return self.tower.blocks[-1].finish(x, gathered)[:, 1:]


class TwoStreams(Method):
    """z = x[L-5] + the sum over the last six blocks of what they gather from the plain stream: no MLP sees it."""

    blocks = 6

    def tokens(self, patches: Tensor) -> Tensor:
        z, first = None, len(self.tower.blocks) - self.blocks
        for number, (block, x, qkv) in enumerate(self._inputs(patches)):
            if number >= first:
                z = (x if z is None else z) + block.project(self._gather(block, x, *qkv))
        return z[:, 1:]

    def _gather(self, block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a block's heads gather, [B, H, T, D], from its input x [B, T, d] and its q, k and v."""
        raise NotImplementedError


class CLIPSurgery(TwoStreams):
    """SS(v) v in each of the last six blocks; its surgery on the logits of all classes is left out."""

    name, source = "clip-surgery", "Li et al., Pattern Recognition 2025"
    beyond = "a second attention in each of six blocks"
    protocol = Protocol(short_side=448, window=448, stride=224, threshold=None, benchmarks={})

    def _gather(self, block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.ops.self_attention(v, v)


class GEM(TwoStreams):
    """The mean over u of q, k, v of softmax(theta u u^T) v, u normalized and once smoothed by its own attention.

    theta is the mean over tokens of |ln_1(x)| / sqrt(D), one number for each image and block. Smoothing: u becomes
    softmax(theta u u^T) u, normalized.
    """

    name, source = "gem", "Bousselham et al., CVPR 2024"
    beyond = "six more attentions in each of six blocks"
    protocol = Protocol(short_side=448, window=448, stride=224, logit_scale=100.0, threshold=None, benchmarks={})

    def _gather(self, block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = block.ln_1(x)
        theta = y.to(computing_dtype(y)).norm(dim=-1).mean(dim=1) / v.shape[-1] ** 0.5
        root = theta.sqrt()[:, None, None, None].to(v.dtype)  # of each image: the op's scale is one for all
        gathered = 0
        for u in (q, k, v):
            u = F.normalize(u, dim=-1)
            u = F.normalize(self.ops.self_attention(root * u, u, scale=1.0), dim=-1)
            gathered = gathered + self.ops.self_attention(root * u, v, scale=1.0)
        return gathered / 3


class SCCLIP(Method):
    """Outliers mended, and the last block's attention and input guided by features of earlier blocks; patches only.

    1. Outliers are the patches of F[L-1] whose LOF exceeds the 0.95 quantile: the mean of d_i / d_j over the 30 nearest
       other patches j, d being the squared distance to the 30th nearest. M replaces each by the mean of its 3 x 3
       neighbours that are none; where there is none, it stays.
    2. W1 are the cosines of M(F[9]) and W2 those of F[4]; S(W) is W without entries under 0.4, rows divided by their
       sums.
    3. P = softmax(3 (W1 - mean W1)) over what is not negative; A = (P + softmax(k k^T / sqrt(D)) over patches) / 2.
    4. G(x, c) = O(A v) + 0.3 c, with k and v of ln_1(x). With Y = F[4] + ... + F[10],
       z = S(W2) (G(S(W1) M(F[L-1]), CLS of F[L-1]) + G(Y, CLS of Y)).
    """

    name, source, blocks = "sc-clip", "Bai et al., 2024", 11
    protocol = Protocol(
        threshold=0.15,
        benchmarks={
            "cityscapes": {"short_side": 560},
            "voc21": {"logit_scale": 50.0},
            "coco_object": {"logit_scale": 55.0, "threshold": 0.35},
        },
    )

    def tokens(self, patches: Tensor) -> Tensor:
        grid, Y, kept = tuple(patches.shape[2:]), 0, {}
        for number, (_, x, _) in enumerate(self._inputs(patches)):  # x is F[number]
            Y = Y + x if 4 <= number <= 10 else Y
            if number in (4, 9):
                kept[number] = x[:, 1:]
        outliers = _outliers(x[:, 1:])
        W1 = _cosines(_mend(kept[9], outliers, grid))
        W2 = _smoothing(_cosines(kept[4]))
        P = _positive_softmax(3 * (W1 - W1.mean(dim=(1, 2), keepdim=True)))
        X = matmul(_smoothing(W1), _mend(x[:, 1:], outliers, grid)).to(x.dtype)
        return matmul(W2, self._guided(X, x[:, :1], P) + self._guided(Y[:, 1:], Y[:, :1], P)).to(x.dtype)

    def _guided(self, x: Tensor, cls: Tensor, P: Tensor) -> Tensor:
        """G of patches x [B, N, d] and a class token [B, 1, d]."""
        last = self.tower.blocks[-1]
        _, k, v = last.query_key_value(x, query=False)
        own = self.ops.self_attention(k, v) if k.shape[2] > 1 else v
        return last.project((matmul(P[:, None], v).to(v.dtype) + own) / 2) + 0.3 * cls


class ProxyCLIP(Method):
    """z = O(P v), P = softmax(3 (W - 1.2 mean W)) over what is not negative, W the cosines of a DINO's patches.

    The patches are those of DINO ViT-B/8's last layer, on the picture as ImageNet's models want it; v is resized
    bilinearly to their grid, which is also the result's. The diagonal always stays [D].
    """

    name, source = "proxyclip", "Lan et al., ECCV 2024"
    sees_images = True
    beyond = "a DINO ViT-B/8 on the picture"
    protocol = Protocol(
        window=336,
        threshold=0.2,
        benchmarks={
            "cityscapes": {"short_side": 448, "window": 224},
            "ade20k": {"short_side": 448},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.25},
        },
    )

    def __init__(self, tower: Tower, config: RefocusConfig | None, backend: str, dino: nn.Module | None = None):
        super().__init__(tower, config, backend)
        self.dino = load_dino() if dino is None else dino

    def dense(self, patches: Tensor, images: Tensor | None = None) -> Tensor:
        if images is None:
            raise ValueError("images=None: ProxyCLIP looks at the pictures, too")
        self.tower.check_eval()
        _, (_, _, v) = self._last(patches)
        tower, last = self.tower, self.tower.blocks[-1]
        mean, std = (images.new_tensor(value)[:, None, None] for value in (tower.image_mean, tower.image_std))
        images = TF.normalize(images * std + mean, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).to(v.dtype)
        side = self.dino.patch_embed.patch_size[0]
        grid = [max(1, round(length / side)) for length in images.shape[2:]]
        images = TF.resize(images, [side * length for length in grid], antialias=True)
        self.dino.to(v.device, v.dtype)  # the model may have been moved
        W = _cosines(self.dino.forward_features(images)[:, self.dino.num_prefix_tokens :])
        P = _positive_softmax(3 * (W - 1.2 * W.mean(dim=(1, 2), keepdim=True)))
        planes = v[:, :, 1:].transpose(2, 3).flatten(1, 2).unflatten(-1, patches.shape[2:])  # [B, H D, gh, gw]
        planes = F.interpolate(planes, size=grid, mode="bilinear", align_corners=False)
        values = planes.flatten(2).unflatten(1, (v.shape[1], -1)).transpose(2, 3)
        z = last.project(matmul(P[:, None], values).to(v.dtype))
        return tower.readout(z).mT.unflatten(-1, grid)


class Released(Method):
    """What the code that RF-CLIP's authors released computes by default, where it departs from the paper.

    Patches with a weight over 5 / d in D_dis become 0.6 x + 0.4 times the mean of their 3 x 3 square, zeros beyond the
    border, after every block. With g the mean of F[1..L] and W the cosines of its patches, without entries under 0.4,
    the last block's k and v are those of F[L-1] and of g, patches multiplied by W: z is the mean over both of O(A v), A
    the mean over blocks of SS(k) without the row and the column of CLS. Of the config, only D_dis and tau are read.
    """

    name, source, configured = "released", RFCLIP.source, True
    beyond = "the last block's attention twice more, each over all blocks' keys"

    def stream(self, patches: Tensor) -> Tensor:
        x, *_ = self._run(patches)
        return x

    def tokens(self, patches: Tensor) -> Tensor:
        _, before, guide, keys = self._run(patches)
        W, last, z = _cosines(guide[:, 1:]), self.tower.blocks[-1], 0
        W = W.where(W >= 0.4, 0)
        for x in (before, guide):
            aggregated = torch.cat([x[:, :1], matmul(W, x[:, 1:]).to(x.dtype)], dim=1)
            _, keys[-1], v = last.query_key_value(aggregated)
            z = z + last.project(self.ops.proxy_attention(keys, v))
        return z / 2

    def _run(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """F[L], F[L-1], the mean of F[1..L], and the blocks' keys [L, B, H, T, D]."""
        grid, blocks, total, keys = patches.shape[2:], self.tower.blocks, 0, []
        x = self.tower.embed(patches)
        for block in blocks:
            before = x
            q, k, v = block.query_key_value(x)
            keys.append(k)
            x = self._denoised(block.finish(x, F.scaled_dot_product_attention(q, k, v)), grid)
            total = total + x
        return x, before, total / len(blocks), torch.stack(keys)

    def _denoised(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        patches, tau = x[:, 1:], self.config.tau / x.shape[2]
        mask = self.ops.distraction_mask(patches, self.config.distraction_dims, tau)
        means = F.avg_pool2d(patches.mT.unflatten(-1, grid), 3, stride=1, padding=1).flatten(2).mT
        return torch.cat([x[:, :1], torch.where(mask[..., None], 0.6 * patches + 0.4 * means, patches)], dim=1)


def load_dino() -> nn.Module:
    """DINO ViT-B/8 as timm loads it, for pictures of any size.

    Raises:
        ConnectionError: its weights could not be downloaded.
    """
    try:
        dino = timm.create_model("vit_base_patch8_224.dino", pretrained=True, num_classes=0, dynamic_img_size=True)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights of DINO ViT-B/8 could not be downloaded ({error}); this needs a network once"
        ) from error
    return dino.eval()


def _outliers(x: Tensor, neighbours: int = 30) -> Tensor:
    """Step 1 of SC-CLIP: which of x [B, N, d] stand out, bool [B, N]."""
    distances = torch.cdist(x.to(computing_dtype(x)), x.to(computing_dtype(x)))
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest, which = distances.topk(min(neighbours, x.shape[1] - 1), largest=False)
    if not which.shape[2]:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    reach = nearest[..., -1].square()
    lof = (reach[..., None] / reach[:, None].expand(-1, x.shape[1], -1).gather(2, which)).mean(dim=-1)
    return lof > lof.quantile(0.95, dim=1, keepdim=True)


def _mend(x: Tensor, outliers: Tensor, grid: tuple[int, int]) -> Tensor:
    """M of SC-CLIP on x [B, N, d]."""
    inliers = (~outliers)[..., None].to(computing_dtype(x))
    planes = torch.cat([x * inliers, inliers], dim=-1).mT.unflatten(-1, grid)
    sums = reference.neighbour_sum(planes, 3).mT  # of the inliers around, and in the last column their number
    count = sums[..., -1:]
    return torch.where(outliers[..., None] & (count > 0), (sums[..., :-1] / count).to(x.dtype), x)


def _cosines(x: Tensor) -> Tensor:
    """[B, N, N] in the computing dtype, of x [B, N, d]."""
    unit = F.normalize(x.to(computing_dtype(x)), dim=-1)
    return matmul(unit, unit.mT)


def _smoothing(W: Tensor) -> Tensor:
    """S of SC-CLIP: rows [B, N, N] without entries under 0.4, divided by their sums."""
    W = W.where(W >= 0.4, 0)
    return W / (W.sum(dim=-1, keepdim=True) + 1e-6)


def _positive_softmax(logits: Tensor) -> Tensor:
    """Over the entries [B, N, N] that are not negative, and the diagonal, so that no row is empty [D]."""
    kept = (logits >= 0) | torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.where(kept, -torch.inf).softmax(dim=-1)


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(CLIP, MaskCLIP, SCLIP, ClearCLIP, NACLIP, GEM, CLIPSurgery, CLIPtrase, SCCLIP, ProxyCLIP),
        *(KK, KKMean, RFCLIP, Released),
    )
}


def find_method(name: str) -> type[Method]:
    """The class of a method's name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
