"""The segmenter as a plain loop over prompts and windows."""

import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

import rfclip
from rfclip.towers.loading import tiny_folder


def plain_loop(model, picture, named, short=168, side=112, stride=56):
    """Steps 8 and 9 of the method: one prompt, one window and one full-size tensor at a time."""
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_folder()}")
    text = []
    for name in [name for names in named for name in names]:
        prompts = [
            F.normalize(model.encode_text(tokenizer(t(name)))[0], dim=0) for t in open_clip.OPENAI_IMAGENET_TEMPLATES
        ]
        text.append(F.normalize(sum(prompts) / 80, dim=0))
    width, height = picture.size
    ratio = short / min(width, height)
    size = [round(height * ratio), round(width * ratio)]
    x = TF.resize(TF.to_image(picture).float() / 255, size, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    x = (x - torch.tensor(model.visual.image_mean)[:, None, None]) / torch.tensor(model.visual.image_std)[:, None, None]
    total, count = torch.zeros(len(text), *size), torch.zeros(size)
    for top in sorted({min(t, size[0] - side) for t in range(0, size[0], stride)}):
        for left in sorted({min(t, size[1] - side) for t in range(0, size[1], stride)}):
            window = x[None, :, top : top + side, left : left + side]
            patches = F.normalize(rfclip.dense_features(model, window), dim=1)[0]
            logits = torch.stack([(patches * t[:, None, None]).sum(0) for t in text])
            logits = F.interpolate(logits[None], size=(side, side), mode="bilinear", align_corners=False)[0]
            total[:, top : top + side, left : left + side] += logits
            count[top : top + side, left : left + side] += 1
    full = F.interpolate((total / count)[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    of_names = (40 * full).softmax(0)
    of_classes, first = [], 0
    for names in named:
        of_classes.append(of_names[first : first + len(names)].amax(0))
        first += len(names)
    return torch.stack(of_classes).numpy()
