"""Every model that open_clip lists: which of their image towers can be refocused, and that those are."""

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower
from torch import nn

import rfclip
from rfclip.models import can_refocus
from rfclip.tower import read_tower

NAMES = open_clip.list_models()
ALONE = {}  # one name for each kind of tower, whatever its depth and its picture's size
for _name in filter(can_refocus, NAMES):
    _vision = open_clip.get_model_config(_name)["vision_cfg"]
    ALONE.setdefault(str({**_vision, "layers": 1, "image_size": 0}), _name)


def image_tower(name, **changes):
    """A model that is nothing but the image tower of that name, with random weights."""
    config, model = open_clip.get_model_config(name), nn.Module()
    vision = config["vision_cfg"] | changes
    model.visual = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_list_tells_what_can_be_refocused(name):
    with torch.device("meta"):
        model = image_tower(name)
    if can_refocus(name):
        assert len(read_tower(model).blocks) == open_clip.get_model_config(name)["vision_cfg"]["layers"]
    else:
        kinds = "TimmModel|ModifiedResNet|pools its tokens by attention"
        with pytest.raises(ValueError, match=kinds):
            read_tower(model)


@pytest.mark.parametrize("source", ["openai", "laion2b", "laion400m", "datacomp", "dfn", "metaclip"])
def test_the_checkpoints_of_standard_towers(source):
    """All weights of these sources on ViTs named by patch and size alone are for towers that can be refocused."""
    found = [name for name, tag in open_clip.list_pretrained() if tag.startswith(source) and name.startswith("ViT-")]
    assert found
    assert [name for name in found if not can_refocus(name)] == []


@pytest.mark.parametrize("name", ALONE.values())
def test_it_is_calibrated_and_refocused(name):
    """Two blocks of the tower on two by three patches: what calibration finds is what refocusing takes."""
    torch.manual_seed(0)
    patch = open_clip.get_model_config(name)["vision_cfg"]["patch_size"]
    model = image_tower(name, layers=2, image_size=(2 * patch, 3 * patch))
    images = torch.randn(2, 3, 2 * patch, 3 * patch)
    with torch.no_grad():
        model.visual.ln_pre = nn.LayerNorm(model.visual.conv1.out_channels)  # also where there is none, to plant
        model.visual.ln_pre.bias[7] = 300
        config = rfclip.calibrate(model, images).config()
        assert config.distraction_dims == (7,)
        model.visual.output_tokens = False
        plain = model.visual(images)
        patches = model.visual.forward_intermediates(images, indices=1)["image_intermediates"][0].movedim(1, -1)
        want = model.visual.ln_post(patches) @ model.visual.proj
        torch.testing.assert_close(rfclip.dense_features(model, images).movedim(1, -1), want, rtol=1e-4, atol=1e-4)
        with rfclip.refocus(model, config):
            assert rfclip.dense_features(model, images).isfinite().all()
            assert not torch.equal(model.visual(images), plain)
        assert torch.equal(model.visual(images), plain)
