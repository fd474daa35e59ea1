"""Time the image tower of ViT-B/16 with random weights: plain open_clip against RF-CLIP, both giving patch features.

`pytest bench` runs it.
"""

import open_clip
import pytest
import torch

import rfclip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16", None).eval()
    with torch.no_grad():  # a tenth of the positions over-activated, so that masks are neither empty nor full
        model.visual.positional_embedding[1::10, 4] += 40 * model.visual.positional_embedding.std()
    return model


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("backend", ["open_clip", "reference"])
def test_dense_features(benchmark, model, backend, batch):
    images = torch.randn(batch, 3, 224, 224)
    benchmark.group = f"ViT-B/16, 224x224, batch {batch}"

    def features():
        with torch.inference_mode():
            if backend == "open_clip":
                return model.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
            return rfclip.dense_features(model, images)

    if backend == "open_clip":
        benchmark.pedantic(features, rounds=5, warmup_rounds=1)
        return
    with rfclip.refocus(model, rfclip.RefocusConfig.preset("ViT-B-16", "openai"), backend=backend):
        benchmark.pedantic(features, rounds=5, warmup_rounds=1)
