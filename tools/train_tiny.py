"""Train the small CLIP that ships in `rfclip/tiny/`, from scratch, on procedural scenes.

python tools/train_tiny.py [--out DIR] [--stage NAME --start WEIGHTS]

In five stages (`STAGES`). All but the first have smaller objects. Three of them start with sharper attention, since
heads that attend broadly lose small objects to the ground; queries and keys are scaled alike, which favours neither kk
nor qq. In the last one, objects count more than ground where a patch has both.

Two losses, on images of 112 x 112 pixels cut from scenes of 112 to 168:

- CLIP's contrastive loss between the CLS embedding and a caption that names some of what is seen;
- a patch-text loss on the value path of the last block: `proj(ln_post(out_proj(v)))` of each patch against the names of
  all classes, the target being the share of each class in the patch. It aligns patches with text without training any
  attention variant, so that it favours none of the methods compared on this model.

Half the patches are dropped for most of the first stage (as in FLIP, arXiv 2212.00794). Every batch is a function of
stage and step, so a run that was stopped resumes from its last checkpoint to the same weights, up to the rounding of
threaded sums. Products are in bfloat16.

On glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment keep freed memory from going back to
the system and save about a sixth of the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from rfclip.calibration import calibrate  # noqa: E402
from rfclip.tiny.scenes import CLASSES, GROUNDS, OBJECTS, make_scene  # noqa: E402

PACKAGE = Path(__file__).parent.parent / "rfclip" / "tiny"
CONFIG = json.loads((PACKAGE / "open_clip_config.json").read_text())["model_cfg"]
SIDE = CONFIG["vision_cfg"]["image_size"]
PATCH = CONFIG["vision_cfg"]["patch_size"]
CONTEXT = CONFIG["text_cfg"]["context_length"]
CALIBRATION_STREAM = 5  # first number of the scenes' seeds; training and evaluation use others
TEMPLATES = (*open_clip.OPENAI_IMAGENET_TEMPLATES, *open_clip.SIMPLE_IMAGENET_TEMPLATES, lambda name: name)
PATCH_SCALE = 40.0  # the logit scale at which patches are read out (method: logits times 40)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the training.

    Attributes:
        stream: the first number of the scenes' seeds.
        steps, batch: how many batches of how many scenes.
        lr, warmup, decay: the largest learning rate, reached after `warmup` steps; a cosine brings it to 0 at `decay`.
        single: the share of scenes with one object, and the range of its longer side in pixels.
        objects, object_size: the largest number of objects in the other scenes, and the range of their longer sides.
        least_area: pixels of an object that a caption may name.
        dense_from: the share of the stage after which no patch is dropped.
        ground_weight: the weight of a patch of nothing but ground in the patch-text loss.
        object_weight: what the share of an object in a patch counts for, beside that of a ground.
        sharpen: what the query and key projections are multiplied by at the start.
        undecayed: the ends of the names of the matrices without weight decay, beside the token embedding.
    """

    stream: int
    steps: int
    batch: int
    lr: float
    warmup: int
    decay: int
    single: tuple[float, tuple[int, int]]
    objects: int
    object_size: tuple[int, int]
    least_area: int
    dense_from: float = 0.0
    ground_weight: float = 1.0
    object_weight: float = 1.0
    sharpen: float = 1.0
    undecayed: tuple[str, ...] = ()


FIRST = Stage(0, 2000, 128, 1.5e-3, 100, 2000, (0.35, (40, 100)), 4, (28, 84), 100, dense_from=0.9)
SECOND = Stage(
    *(0, 1000, 96, 1e-3, 60, 1500, (0.25, (24, 100)), 6, (16, 84), 60),
    ground_weight=0.5,
    sharpen=1.8,
    undecayed=("conv1.weight", "positional_embedding", "out_proj.weight", "c_proj.weight"),
)
THIRD = dataclasses.replace(SECOND, stream=10, steps=600, lr=5e-4, decay=600, sharpen=1.6)
FOURTH = dataclasses.replace(
    THIRD, stream=11, steps=1200, lr=8e-4, decay=1200, sharpen=1.4, objects=8, object_size=(16, 64)
)
FIFTH = dataclasses.replace(THIRD, stream=12, lr=6e-4, sharpen=1.0, ground_weight=1.0, object_weight=4.0)
STAGES = {"first": FIRST, "second": SECOND, "third": THIRD, "fourth": FOURTH, "fifth": FIFTH}


def with_article(name: str) -> str:
    if name in GROUNDS:
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def caption(objects: list[str], grounds: list[str], rng: np.random.Generator) -> str:
    """An English caption that names some of the objects, and the ground half of the time."""
    if not objects:
        return TEMPLATES[rng.integers(len(TEMPLATES))](grounds[0])
    count = 1 if rng.random() < 0.35 else int(rng.integers(1, len(objects) + 1))
    named = [str(name) for name in rng.permutation(objects)[:count]]
    if count == 1 and rng.random() < 0.5:
        return TEMPLATES[rng.integers(len(TEMPLATES))](named[0])
    parts = [with_article(name) for name in named]
    text = parts[0]
    for part in parts[1:]:
        text += str(rng.choice([" and ", " next to ", ", ", " near ", " with ", " beside "])) + part
    if rng.random() < 0.5:
        text += str(rng.choice([" on ", " in front of ", " over ", ", the background is ", " against "])) + grounds[0]
    lead = ("", "", "a photo of ", "a picture of ", "there is ", "a drawing of ", "an image showing ", "we see ")
    return str(rng.choice(lead)) + text + str(rng.choice(["", "."]))


class Scenes(torch.utils.data.Dataset):
    """Batch number `step`: images uint8 [B, 3, S, S], patch shares [B, N, C], tokens [B, L], names' tokens [C, L]."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, shares, captions = [], [], []
        stage, (often, single_size) = self.stage, self.stage.single
        for item in range(stage.batch):
            rng = np.random.default_rng((stage.stream, step, item, 1))
            single = rng.random() < often
            scene = make_scene(
                (stage.stream, step, item),
                SIDE if single else int(rng.integers(SIDE, SIDE * 3 // 2 + 1)),
                objects=(1, 1) if single else (1, stage.objects),
                object_size=single_size if single else stage.object_size,
            )
            top, left = rng.integers(0, len(scene.labels) - SIDE + 1, size=2)
            window = np.s_[top : top + SIDE, left : left + SIDE]
            labels = scene.labels[window]
            area = np.bincount(labels.ravel(), minlength=len(CLASSES))
            objects = [name for index, name in enumerate(OBJECTS) if area[index] >= stage.least_area]
            grounds = [name for index, name in enumerate(GROUNDS, len(OBJECTS)) if area[index] >= 800]
            captions.append(caption(objects, grounds or [CLASSES[int(area.argmax())]], rng))
            images.append(scene.image[window].transpose(2, 0, 1))
            side = SIDE // PATCH
            patches = labels.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, -1)
            index = np.arange(side * side)[:, None] * len(CLASSES) + patches
            shares.append(np.bincount(index.ravel(), minlength=side * side * len(CLASSES)).reshape(side * side, -1))
        rng = np.random.default_rng((stage.stream, step))
        names = [TEMPLATES[rng.integers(len(TEMPLATES))](name) for name in CLASSES]
        return (
            torch.from_numpy(np.stack(images)),
            torch.from_numpy(np.stack(shares)).float() / PATCH**2,
            self.tokenizer(captions),
            self.tokenizer(names),
        )


class Attention(torch.autograd.Function):
    """softmax(q k^T) v of q, k and v [G, N, D]; the backward pass of PyTorch's own is slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.bmm(q, k.mT).softmax(dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        inner = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
        return torch.bmm(inner, k), torch.bmm(inner.mT, q), torch.bmm(weights.mT, grad)


def attention(layer: nn.MultiheadAttention, y: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """The branch [B, T, d] of the first `queries` tokens of y [B, N, d], or of all, and the values [B, N, d]."""
    B, H = len(y), layer.num_heads
    q, k, v = F.linear(y, layer.in_proj_weight, layer.in_proj_bias).to(torch.bfloat16).chunk(3, dim=-1)
    by_head = [u.unflatten(-1, (H, -1)).transpose(1, 2).flatten(0, 1) for u in (q[:, :queries], k, v)]
    with torch.autocast("cpu", enabled=False):
        heads = Attention.apply(by_head[0] * by_head[0].shape[-1] ** -0.5, *by_head[1:])
    return layer.out_proj(heads.unflatten(0, (B, H)).transpose(1, 2).flatten(2)), v


def image_tower(visual: Any, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """CLS embedding [B, C], and the value path's embedding of the kept patches [B, K, C]; keep: [B, K] or all."""
    x = visual.conv1(images).flatten(2).transpose(1, 2) + visual.positional_embedding[1:]
    if keep is not None:
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(x.shape[0], 1, -1)
    x = visual.ln_pre(torch.cat([cls, x], dim=1))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = x + attention(block.attn, block.ln_1(x))[0]
        x = x + block.mlp(block.ln_2(x))
    # Only the CLS query of the last block is needed.
    branch, value = attention(last.attn, last.ln_1(x), queries=1)
    patches = visual.ln_post(last.attn.out_proj(value[:, 1:])) @ visual.proj
    cls = x[:, :1] + branch
    cls = cls + last.mlp(last.ln_2(cls))
    return visual.ln_post(cls[:, 0]) @ visual.proj, patches


def losses(
    model: Any, images: Tensor, shares: Tensor, tokens: Tensor, names: Tensor, keep: Tensor | None, stage: Stage
) -> tuple[Tensor, Tensor]:
    """The contrastive and the patch-text loss of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        image, patches = image_tower(model.visual, normalized(images), keep)
        text = model.encode_text(torch.cat([tokens, names]))
    image, patches, text = (F.normalize(each.float(), dim=-1) for each in (image, patches, text))
    text, names = text[: len(tokens)], text[len(tokens) :]
    logits = model.logit_scale.exp() * image @ text.T
    match = torch.arange(len(logits))
    contrastive = (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2
    if keep is not None:
        shares = shares.gather(1, keep[..., None].expand(-1, -1, shares.shape[-1]))
    ground = shares[..., len(OBJECTS) :].sum(dim=-1)
    weight = torch.where(ground > 0.999, stage.ground_weight, 1.0)
    shares = shares * weight[..., None]
    shares[..., : len(OBJECTS)] *= stage.object_weight
    log_p = (PATCH_SCALE * patches @ names.T).log_softmax(dim=-1)
    return contrastive, -(shares * log_p).sum() / shares.sum()


def normalized(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] as the image tower expects it."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def calibration_images() -> Tensor:
    """64 scenes that were not trained on, [64, 3, S, S]."""
    scenes = [make_scene((CALIBRATION_STREAM, number), SIDE).image for number in range(64)]
    return normalized(torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2))


@torch.no_grad()
def center_keys(model: Any, images: Tensor) -> None:
    """Let the mean key of the patches be 0 in every block.

    The bias of the keys adds the same to all logits of a query, so that no output of CLIP depends on it and training
    leaves it as it was. In kk attention it is an arbitrary preference for keys that are like it.
    """
    width = CONFIG["vision_cfg"]["width"]
    visual = model.visual

    def center(layer: nn.MultiheadAttention, inputs: tuple[Tensor, ...]) -> None:
        weight, bias = (each[width : 2 * width] for each in (layer.in_proj_weight, layer.in_proj_bias))
        bias.copy_(-F.linear(inputs[0][:, 1:], weight).mean(dim=(0, 1)))

    hooks = [block.attn.register_forward_pre_hook(center) for block in visual.transformer.resblocks]
    visual(images)
    for hook in hooks:
        hook.remove()


def save(path: Path, state: dict) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def train(model: Any, stage: Stage, checkpoint: Path) -> None:
    """Run a stage, from its checkpoint if there is one, which is written every 100 steps."""
    recipe, width = json.loads(json.dumps(dataclasses.asdict(stage))), CONFIG["vision_cfg"]["width"]
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight[: 2 * width] *= stage.sharpen
            block.attn.in_proj_bias[: 2 * width] *= stage.sharpen
    free = ("token_embedding.weight", *stage.undecayed)
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim >= 2 and not name.endswith(free)]
    others = [p for name, p in named if p.ndim < 2 or name.endswith(free)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98), fused=True)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(f"{checkpoint} is of a run with {state['recipe']}, not {recipe}: move it away")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    data = torch.utils.data.Subset(Scenes(stage), range(start, stage.steps))
    began, total = time.time(), SIDE**2 // PATCH**2
    for step, batch in enumerate(
        torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4), start
    ):
        rate = stage.lr * min((step + 1) / stage.warmup, 0.5 + 0.5 * math.cos(math.pi * step / stage.decay))
        for group in optimizer.param_groups:
            group["lr"] = rate
        keep = None
        if step < stage.dense_from * stage.steps:
            generator = torch.Generator().manual_seed(step)
            keep = torch.rand(stage.batch, total, generator=generator).argsort(1)[:, : total // 2]
        contrastive, patch = losses(model, *batch, keep, stage)
        optimizer.zero_grad()
        (contrastive + patch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 10 == 9:
            seconds = (time.time() - began) / (step + 1 - start)
            print(
                f"step {step + 1}/{stage.steps}  contrastive {contrastive.item():.3f}  patch {patch.item():.3f}  "
                f"scale {model.logit_scale.exp().item():.1f}  {stage.batch / seconds:.0f} images/s  "
                f"{seconds * (stage.steps - step - 1) / 60:.0f} min left",
                flush=True,
            )
        if step % 100 == 99 or step + 1 == stage.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, state | {"step": step + 1, "recipe": recipe})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder for open_clip_model.safetensors")
    parser.add_argument("--checkpoints", type=Path, default=Path(), help="folder for tiny-STAGE.pt")
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in place of all")
    parser.add_argument("--start", type=Path, help="safetensors weights to start from, in place of random ones")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG, output_dict=False)
    if args.start:
        model.load_state_dict(load_file(args.start))
    for name in [args.stage] if args.stage else STAGES:
        train(model, STAGES[name], args.checkpoints / f"tiny-{name}.pt")
    images = calibration_images()
    center_keys(model.eval(), images)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    weights_file = args.out / "open_clip_model.safetensors"
    part = weights_file.with_suffix(".part")
    save_file(weights, part)
    os.replace(part, weights_file)
    print(f"{weights_file}: {weights_file.stat().st_size / 1e6:.1f} MB")
    calibration = calibrate(model, images)
    (args.out / "refocus.json").write_text(calibration.config().to_json())
    print(calibration.report())


if __name__ == "__main__":
    main()
