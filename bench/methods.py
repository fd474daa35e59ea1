"""Every method's dense features beside plain CLIP, timed in alternating rounds once they match the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import timm
import torch
from torch import Tensor, nn

from bench.measure import BACKEND, DEVICE, DTYPE, alternate, relative_error
from bench.towers import MODEL, Case, TowerTime, config_for, pictures, plain, plain_name, planted, tower_size
from rfclip.methods import METHODS
from rfclip.methods.base import Method
from rfclip.towers import read_tower

CASES = (Case((224, 224), rounds=11), Case((336, 448), rounds=5))
QUICK_CASES = (Case((224, 224), rounds=2),)
GOAL = 1.35  # at 224x224 and batch 1, if a method's formula needs no more than a tower's blocks


def dino(small: bool) -> nn.Module:
    """The architecture of DINO ViT-B/8, or a small one of the same patches, with random weights."""
    name = "vit_base_patch8_224"
    size = {"embed_dim": 48, "depth": 1, "num_heads": 2} if small else {}
    made = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **size)
    return made.eval().to(DEVICE, DTYPE)


def build(name: str, model: nn.Module, backend: str, proxy: nn.Module) -> Method:
    """The method, on a model that stays unchanged."""
    card, options = METHODS[name], {"dino": proxy} if name == "proxyclip" else {}
    return card(read_tower(model), config_for(model) if card.configured else None, backend, **options)


def features(method: Method, images: Tensor) -> Callable[[], Tensor]:
    return lambda: method.dense(method.tower.patches(images), images)


@torch.inference_mode()
def time_methods(name: str, quick: bool) -> Iterator[TowerTime]:
    """Check every method at every size, and time those that are correct."""
    model = planted(name)
    proxy = dino(small=quick)
    for case in QUICK_CASES if quick else CASES:
        images = pictures(case)
        tokens, operations = tower_size(read_tower(model), images)
        runs, errors = {plain_name(model, case): plain(model, images)}, {}
        for method in METHODS:
            runs[method] = features(build(method, model, BACKEND, proxy), images)
            want = features(build(method, model, "reference", proxy), images)()
            errors[method] = relative_error(runs[method](), want)
            if errors[method] > (1e-4 if DTYPE is torch.float32 else 5e-2):
                failure = f"relative error {errors[method]:.1e}"
                yield TowerTime(str(case), tokens, method, failure=failure)
                del runs[method]
        found = alternate(runs, case.rounds)
        baseline = found[plain_name(model, case)].median
        for implementation, times in found.items():
            card = METHODS.get(implementation)
            bound = card and not card.beyond and case.size == (224, 224) and name == MODEL and DEVICE == "cpu"
            yield TowerTime(
                str(case),
                tokens,
                implementation,
                case.rounds,
                times.median,
                times.spread,
                times.median / baseline,
                GOAL if bound else None,
                errors.get(implementation),
                card.beyond if card else "",
                operations=operations,
            )
