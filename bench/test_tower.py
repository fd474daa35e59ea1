"""Time the image tower of ViT-B/16 with random weights: plain open_clip against RF-CLIP, both giving patch features.

`pytest bench/test_tower.py` runs it.
"""

import open_clip
import pytest
import torch
from conftest import DEVICE, DTYPE

import rfclip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16", None).eval()
    with torch.no_grad():  # a tenth of the positions over-activated, so that masks are neither empty nor full
        model.visual.positional_embedding[1::10, 4] += 40 * model.visual.positional_embedding.std()
    return model.to(DEVICE, DTYPE)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("backend", ["open_clip", "reference", "triton"])
def test_dense_features(timed, model, backend, batch):
    images, group = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=DTYPE), f"ViT-B/16, 224x224, batch {batch}"
    if backend == "open_clip":
        read = model.visual.forward_intermediates
        timed(lambda: read(images, indices=1, normalize_intermediates=True), group, graph=True)
        return
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("no GPU: the interpreter's time says nothing about a kernel's")
    with rfclip.refocus(model, rfclip.RefocusConfig.preset("ViT-B-16", "openai"), backend=backend):
        timed(lambda: rfclip.dense_features(model, images), group, graph=backend == "triton")
