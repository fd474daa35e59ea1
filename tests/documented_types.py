"""What README and docs show, for the type checker alone: a user's code must pass it as well. Nothing here runs."""

from torch import Tensor

import rfclip
import rfclip_kernels
from rfclip.methods import METHODS
from rfclip.outputs import read_masks
from rfclip.reference import distraction_mask, key_similarity


def segmenting() -> dict[str, float]:
    result = rfclip.Segmenter("ViT-B-16-quickgelu", "openai")("photo.jpg", ["cat, kitten", "dog", "grass"])
    result.overlay().save("overlay.png")
    for image, labels in read_masks("results"):
        print(image, labels.shape)
    return result.shares


def refocusing(images: Tensor) -> Tensor:
    model = rfclip.load_model("ViT-L-14-quickgelu", "openai")
    print(model.refocus_config.tau, *model.trained_on or (), *METHODS)
    with rfclip.refocus(model, model.refocus_config):
        return rfclip.dense_features(model, images)


def operating(q: Tensor, k: Tensor, v: Tensor, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    distraction: Tensor = distraction_mask(x, [4, 162], 5 / x.shape[-1])
    out: Tensor = rfclip_kernels.refocused_attention(q, k, v, distraction, target, 0.7)
    similarity: Tensor = key_similarity(k)
    return out, similarity + rfclip.reference.key_similarity(k)
