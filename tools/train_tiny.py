"""Train the small CLIP that ships in `rfclip/tiny/`, from scratch, on procedural scenes.

python tools/train_tiny.py [--out DIR] [--steps N]

Two losses, on images of 112 x 112 pixels cut from scenes of 112 to 168:

- CLIP's contrastive loss between the CLS embedding and a caption that names some of what is seen;
- a patch-text loss on the value path of the last block: `proj(ln_post(out_proj(v)))` of each patch against the names of
  all classes, the target being the share of each class in the patch. It aligns patches with text without training any
  attention variant, so that it favours none of the methods compared on this model.

Half the patches are dropped for most of the run (as in FLIP, arXiv 2212.00794), none at its end. Every batch is a
function of the step, so a run that was stopped resumes from its last checkpoint to the same weights, up to the rounding
of threaded sums; a checkpoint of a run with other arguments is refused.

On glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment keep freed memory from going back to
the system and save about a sixth of the time.
"""

from __future__ import annotations

import argparse
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
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from rfclip.calibration import calibrate  # noqa: E402
from rfclip.tiny.scenes import CLASSES, GROUNDS, OBJECTS, make_scene  # noqa: E402

PACKAGE = Path(__file__).parent.parent / "rfclip" / "tiny"
CONFIG = json.loads((PACKAGE / "open_clip_config.json").read_text())["model_cfg"]
SIDE = CONFIG["vision_cfg"]["image_size"]
PATCH = CONFIG["vision_cfg"]["patch_size"]
CONTEXT = CONFIG["text_cfg"]["context_length"]
TRAINING_STREAM, CALIBRATION_STREAM = 0, 5  # first numbers of the scenes' seeds; evaluation uses others
TEMPLATES = (*open_clip.OPENAI_IMAGENET_TEMPLATES, *open_clip.SIMPLE_IMAGENET_TEMPLATES, lambda name: name)
PATCH_SCALE = 40.0  # the logit scale at which patches are read out (method: logits times 40)


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

    def __init__(self, steps: int, batch: int) -> None:
        self.steps, self.batch = steps, batch
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, shares, captions = [], [], []
        for item in range(self.batch):
            rng = np.random.default_rng((TRAINING_STREAM, step, item, 1))
            single = rng.random() < 0.35
            scene = make_scene(
                (TRAINING_STREAM, step, item),
                SIDE if single else int(rng.integers(SIDE, SIDE * 3 // 2 + 1)),
                objects=(1, 1) if single else (1, 4),
                object_size=(40, 100) if single else (28, 84),
            )
            top, left = rng.integers(0, len(scene.labels) - SIDE + 1, size=2)
            window = np.s_[top : top + SIDE, left : left + SIDE]
            labels = scene.labels[window]
            area = np.bincount(labels.ravel(), minlength=len(CLASSES))
            objects = [name for index, name in enumerate(OBJECTS) if area[index] >= 100]
            grounds = [name for index, name in enumerate(GROUNDS, len(OBJECTS)) if area[index] >= 800]
            captions.append(caption(objects, grounds or [CLASSES[int(area.argmax())]], rng))
            images.append(scene.image[window].transpose(2, 0, 1))
            side = SIDE // PATCH
            patches = labels.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, -1)
            index = np.arange(side * side)[:, None] * len(CLASSES) + patches
            shares.append(np.bincount(index.ravel(), minlength=side * side * len(CLASSES)).reshape(side * side, -1))
        rng = np.random.default_rng((TRAINING_STREAM, step))
        names = [TEMPLATES[rng.integers(len(TEMPLATES))](name) for name in CLASSES]
        return (
            torch.from_numpy(np.stack(images)),
            torch.from_numpy(np.stack(shares)).float() / PATCH**2,
            self.tokenizer(captions),
            self.tokenizer(names),
        )


def image_tower(visual: Any, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """CLS embedding [B, C], and the value path's embedding of the kept patches [B, K, C]; keep: [B, K] or all."""
    x = visual.conv1(images).flatten(2).transpose(1, 2) + visual.positional_embedding[1:]
    if keep is not None:
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(x.shape[0], 1, -1)
    x = visual.ln_pre(torch.cat([cls, x], dim=1))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    width = x.shape[-1]
    value = F.linear(last.ln_1(x[:, 1:]), last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :])
    patches = visual.ln_post(last.attn.out_proj(value)) @ visual.proj
    # Only the CLS query of the last block is needed.
    y = last.ln_1(x)
    cls = x[:, :1] + last.attn(y[:, :1], y, y, need_weights=False)[0]
    cls = cls + last.mlp(last.ln_2(cls))
    return visual.ln_post(cls[:, 0]) @ visual.proj, patches


def losses(
    model: Any, images: Tensor, shares: Tensor, tokens: Tensor, names: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contrastive and the patch-text loss of one batch."""
    image, patches = image_tower(model.visual, normalized(images), keep)
    text = F.normalize(model.encode_text(torch.cat([tokens, names])), dim=-1)
    text, names = text[: len(tokens)], text[len(tokens) :]
    logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ text.T
    match = torch.arange(len(logits))
    contrastive = (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2
    if keep is not None:
        shares = shares.gather(1, keep[..., None].expand(-1, -1, shares.shape[-1]))
    patch_logits = PATCH_SCALE * F.normalize(patches, dim=-1) @ names.T
    return contrastive, F.cross_entropy(patch_logits.flatten(0, 1), shares.flatten(0, 1))


def normalized(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] as the image tower expects it."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def calibration_images() -> Tensor:
    """64 scenes that were not trained on, [64, 3, S, S]."""
    scenes = [make_scene((CALIBRATION_STREAM, number), SIDE).image for number in range(64)]
    return normalized(torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2))


def save(path: Path, state: dict) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder for open_clip_model.safetensors")
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny-checkpoint.pt"), help="written every 100 steps")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--dense-from", type=float, default=0.9, help="share of the run after which no patch is dropped"
    )
    args = parser.parse_args()

    recipe = {name: getattr(args, name) for name in ("steps", "batch", "lr", "dense_from")}
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG, output_dict=False)
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not model.token_embedding.weight]
    others = [p for p in model.parameters() if not any(p is q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    start = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(f"{args.checkpoint} is of a run with {state['recipe']}, not {recipe}: move it away")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    data = torch.utils.data.Subset(Scenes(args.steps, args.batch), range(start, args.steps))
    began, warmup, total = time.time(), 100, SIDE**2 // PATCH**2
    for step, batch in enumerate(
        torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4), start
    ):
        rate = args.lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        keep = None
        if step < args.dense_from * args.steps:
            generator = torch.Generator().manual_seed(step)
            keep = torch.rand(args.batch, total, generator=generator).argsort(1)[:, : total // 2]
        contrastive, patch = losses(model, *batch, keep)
        optimizer.zero_grad()
        (contrastive + patch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 10 == 9:
            seconds = (time.time() - began) / (step + 1 - start)
            print(
                f"step {step + 1}/{args.steps}  contrastive {contrastive.item():.3f}  patch {patch.item():.3f}  "
                f"scale {model.logit_scale.exp().item():.1f}  {args.batch / seconds:.0f} images/s  "
                f"{seconds * (args.steps - step - 1) / 60:.0f} min left",
                flush=True,
            )
        if step % 100 == 99 or step + 1 == args.steps:
            save(
                args.checkpoint,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "recipe": recipe},
            )
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    weights_file = args.out / "open_clip_model.safetensors"
    part = weights_file.with_suffix(".part")
    save_file(weights, part)
    os.replace(part, weights_file)
    print(f"{weights_file}: {weights_file.stat().st_size / 1e6:.1f} MB")
    calibration = calibrate(model.eval(), calibration_images())
    (args.out / "refocus.json").write_text(calibration.config().to_json())
    print(calibration.report())


if __name__ == "__main__":
    main()
