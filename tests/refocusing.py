"""Configs, towers and comparisons that the tests of refocused models share."""

import torch
from helpers import assert_close, relative_error
from open_clip.model import convert_weights_to_lp
from small_models import DIMS, small_clip

import rfclip
from rfclip import RefocusConfig
from rfclip.plugin import installed

DEFAULT = RefocusConfig(DIMS)
NO_DIMS = RefocusConfig(())
PLAIN = RefocusConfig((), proxy="none")

TOWERS = {
    "clip": {},
    "quick-gelu": {"quick_gelu": True},
    "layer-scale": {"ls_init_value": 0.1},
    "sequence-first": {"batch_first": False},
    "custom-block": {"block_type": "custom"},
    "custom-block-norms": {"scale_attn": True, "scale_fc": True},
    "next-release": {"next_release": True},
    "next-release-layer-scale": {"next_release": True, "ls_init_value": 0.1},
    "wide": {"width": 64, "head_width": 32},
    "not-square": {"image_size": (32, 48)},
    "average-pool": {"pool_type": "avg"},
    "norm-after-pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "no-first-norm": {"no_ln_pre": True},
}

VARIANTS = {  # what differs from the default; every value of every field occurs in one of them
    "tau-low": {"tau": 3.0},
    "tau-high": {"tau": 8},
    "attention": {"tau_attn": 1.0},
    "attention-five": {"tau_attn": 5.0},
    "raw": {"shifted": False},
    "random": {"tokens": "random"},
    "random-mean": {"tokens": "random", "embedding": "mean"},
    "mean": {"embedding": "mean"},
    "mean-5": {"embedding": "mean", "neighbourhood": 5},
    "median": {"embedding": "median"},
    "median-7": {"embedding": "median", "neighbourhood": 7},
    "clamp": {"embedding": "clamp"},
    "clamp-raw": {"embedding": "clamp", "shifted": False},
    "embedding-none": {"embedding": "none"},
    "neighbours-5": {"neighbourhood": 5},
    "neighbours-7": {"neighbourhood": 7},
    "beta-0": {"beta": 0},
    "beta-0.3": {"beta": 0.3},
    "beta-1": {"beta": 1},
    "to-non-distraction": {"target": "non-distraction"},
    "to-cls": {"target": "cls"},
    "to-rest": {"target": "rest"},
    "masked": {"target": "rest", "beta": 1.0, "embedding": "none"},
    "similarity-kk": {"similarity": "kk"},
    "similarity-qq": {"similarity": "qq"},
    "similarity-vv": {"similarity": "vv"},
    "otsu": {"cut_threshold": "otsu"},
    "proxy-kk": {"proxy": "kk"},
    "proxy-qq": {"proxy": "qq"},
    "proxy-vv": {"proxy": "vv"},
    "proxy-qk": {"proxy": "qk"},
    "proxy-none": {"proxy": "none"},
    "first-block": {"layers": (1,)},
    "middle-blocks": {"layers": (2, 3)},
    "last-block": {"layers": (4,)},
    "no-block": {"layers": ()},
    "one-dim": {"distraction_dims": DIMS[1:2]},
    "no-dims": {"distraction_dims": ()},
}
ONLY_DENSE = [name for name, changes in VARIANTS.items() if "proxy" in changes]  # the CLS embedding stays the same

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16"]


def at_precision(name, **options):
    """A small CLIP as open_clip's create_model builds it at that precision, and the dtype it computes in."""
    dtype = HALF.get(name.removeprefix("pure_"), torch.float32)
    model = small_clip(dtype=torch.float32, lp_norms=name in HALF, **options)
    if name in HALF:
        convert_weights_to_lp(model, dtype=dtype)  # layer norms and position embeddings stay in float32
        return model, dtype
    return model.to(dtype), dtype


def outputs(model, images):
    """Dense features and image embeddings of a model, refocused or plain."""
    method = None if installed(model) else "clip"
    return rfclip.dense_features(model, images, method=method), model.encode_image(images)


def refocused(model, images, config=DEFAULT):
    with rfclip.refocus(model, config):
        return outputs(model, images)


def assert_each_close(got, want, tolerance=1e-12):
    """Pair by pair. Float64 towers differ only in their order of summation: some hundred roundings of 1e-16."""
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, tolerance)


def assert_each_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def differs(a, b):
    return relative_error(a, b) > 1e-3
