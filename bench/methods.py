"""Every method's dense features beside plain CLIP, timed in alternating rounds once they match the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import BACKEND, DEVICE, DTYPE, alternate, relative_error
from bench.towers import MODEL, Case, TowerTime, config_for, pictures, plain, plain_name, planted, tower_size
from rfclip.config import RegisterConfig
from rfclip.methods import METHODS, feedback
from rfclip.methods.across import across_windows
from rfclip.methods.base import Method
from rfclip.towers import read_tower

CASES = (Case((224, 224), rounds=11), Case((336, 448), rounds=5))
QUICK_CASES = (Case((224, 224), rounds=2),)
WINDOWS = Case((224, 224), batch=6, rounds=5)  # of a picture of 336x448, by the common protocol
NAMES = 21
GOAL = 1.35  # at 224x224 and batch 1, if a method's formula needs no more than a tower's blocks


def dino(small: bool) -> nn.Module:
    """The architecture of DINO ViT-B/8, or a small one of the same patches, with random weights."""
    name = "vit_base_patch8_224"
    size = {"embed_dim": 48, "depth": 1, "num_heads": 2} if small else {}
    made = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **size)
    return made.eval().to(DEVICE, DTYPE)


def build(name: str, model: nn.Module, backend: str, proxy: nn.Module) -> Method:
    """The method, on a model that stays unchanged."""
    card, tower = METHODS[name], read_tower(model)
    options: dict[str, Any] = {"dino": proxy} if name == "proxyclip" else {}
    if card.registers:
        options["registers"] = RegisterConfig([(len(tower.blocks) // 2, unit) for unit in range(10)])
    return card(tower, config_for(model) if card.configured else None, backend, **options)


def features(method: Method, images: Tensor) -> Callable[[], Tensor]:
    return lambda: method.dense(method.tower.patches(images), images)


def crossing(method: Method, images: Tensor) -> Callable[[], Tensor]:
    """All windows of a picture, with attention across them in the last block."""
    return lambda: across_windows(method, [method.tower.patches(images)])


def twice(method: Method, images: Tensor) -> Callable[[], Tensor]:
    """ResCLIP's two passes, with random names in between."""
    names = F.normalize(torch.randn(NAMES, method.tower.module.output_dim, device=DEVICE), dim=-1)
    patch, constants = method.tower.patch_size, feedback.DEFAULTS

    def run() -> Tensor:
        patches = method.tower.patches(images)
        logits = torch.einsum("bchw,kc->bkhw", F.normalize(method.dense(patches).float(), dim=1), names)
        labels = feedback.patch_labels(method.ops, logits, images, patch, 40.0, constants["confidence"])
        return feedback.fed_back(method, patches, feedback.agreement(labels), constants)

    return run


@torch.inference_mode()
def time_windows(name: str, quick: bool) -> Iterator[TowerTime]:
    """What attends across the windows of a picture, and ResCLIP's second pass, beside plain windows."""
    model = planted(name)
    case = replace(WINDOWS, batch=2, rounds=1) if quick else WINDOWS
    images = pictures(case)
    tokens, operations = tower_size(read_tower(model), images)
    runs, errors = {plain_name(model, case): plain(model, images)}, {}
    for chosen in METHODS:
        if chosen == "proxyclip":
            continue
        method, reference = (build(chosen, model, backend, model) for backend in (BACKEND, "reference"))
        if method.crosses:
            for label, made in ((chosen, features), (f"{chosen}, across windows", crossing)):
                runs[label] = made(method, images)
                errors[label] = relative_error(runs[label](), made(reference, images)())
        if chosen == "resclip":
            runs[chosen], runs["resclip, both passes"] = features(method, images), twice(method, images)
    found = alternate(runs, case.rounds)
    baseline = found[plain_name(model, case)].median
    for label, times in found.items():
        yield TowerTime(
            str(case),
            tokens,
            label,
            case.rounds,
            times.median,
            times.spread,
            times.median / baseline,
            error=errors.get(label),
            operations=operations,
        )


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
