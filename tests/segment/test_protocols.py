"""Pictures of any size by each method's own protocol, on the bundled model."""

import numpy as np
import pytest
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import rfclip
from rfclip.methods import METHODS
from rfclip.methods import proxyclip as proxyclip_file

pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
ON_TINY = [name for name, card in METHODS.items() if card.blocks <= 6]


@pytest.fixture(autouse=True)
def dino(monkeypatch):
    """A small random DINO in place of the one that would have to be downloaded."""
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    made = VisionTransformer(img_size=64, patch_size=8, **sizes, dynamic_img_size=True).eval()
    monkeypatch.setattr(proxyclip_file, "load_dino", lambda: made)


@pytest.mark.parametrize("method, dataset", [("cliptrase", "voc20"), *((name, "voc21") for name in ON_TINY)])
def test_pictures_of_any_size(method, dataset, model, picture):
    shapes = [picture, picture.resize((1, 1)), picture.resize((40, 30)), picture.resize((40, 8)), (7, 35)]
    with rfclip.Segmenter(model, method=method, protocol=METHODS[method].protocol.on(dataset)) as segmenter:
        for number, each in enumerate(shapes):
            rgb = each if isinstance(each, Image.Image) else Image.new("RGB", each, (90, 120, 60))
            threshold = 0.3 if number == 2 else None
            found = segmenter(rgb, "tiger; grass; sky, mushroom", probabilities=True, threshold=threshold)
            assert found.labels.shape == rgb.size[::-1]
            assert set(np.unique(found.labels)) <= {0, 1, 2, found.nothing}
            assert found.probabilities.shape == (3, *found.labels.shape)
            assert np.isfinite(found.probabilities).all()


@pytest.mark.parametrize("method", ON_TINY)
def test_a_single_name(method, model, picture):
    """Without a background: every pixel that is seen is its own. CLIP Surgery compares it with the empty text."""
    with rfclip.Segmenter(model, method=method) as segmenter:
        found = segmenter(picture, "dog", background=False, probabilities=True)
        top, left, height, width = segmenter.windows.seen(*found.labels.shape)
    assert not found.labels[top : top + height, left : left + width].any()
    assert found.probabilities.max() == 1 and np.isfinite(found.probabilities).all()


def test_without_the_packages_for_regions(model, monkeypatch):
    monkeypatch.setattr("rfclip.extras.find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(ValueError, match=r'cliptrase needs sklearn: pip install "rfclip\[evaluate\]"'):
        rfclip.Segmenter(model, method="cliptrase")
