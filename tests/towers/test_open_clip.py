"""open_clip's towers of every kind: plain and refocused, their outputs, and the ones that are refused."""

import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from refocusing import DEFAULT, PLAIN, TOWERS, assert_each_close, assert_each_equal, differs, outputs, refocused
from small_models import pictures, small_clip
from torch import nn

import rfclip

pytestmark = pytest.mark.usefixtures("no_grad")
towers = pytest.mark.parametrize("tower", TOWERS)


# Plain CLIP -----------------------------------------------------------------------------------------------------------


@towers
@pytest.mark.parametrize("refocus", [False, True], ids=["not-refocused", "proxy-none-without-dims"])
def test_plain_tower_is_open_clips(tower, refocus):
    model = small_clip(**TOWERS[tower])
    visual, images = model.visual, pictures(width=model.visual.image_size[1])
    want = visual.forward_intermediates(images, indices=1)  # the patch tokens after the last block
    patches = visual.ln_post(want["image_intermediates"][0].movedim(1, -1)) @ visual.proj
    got = refocused(model, images, PLAIN) if refocus else outputs(model, images)
    assert_each_close(got, (patches.movedim(-1, 1), want["image_features"]))


@pytest.mark.parametrize("config", [PLAIN, DEFAULT], ids=["plain", "refocused"])
def test_output_tokens(config):
    """The tower's forward still returns the pair that was asked for."""
    model, images = small_clip(output_tokens=True), pictures()
    plain = model.visual(images)
    with rfclip.refocus(model, config):
        pooled, tokens = model.visual(images)
    assert_each_close([pooled], refocused(small_clip(), images, config)[1:])
    assert tokens.shape == plain[1].shape
    assert differs(tokens, plain[1]) == (config is DEFAULT)


def test_text_and_logits_still_work(model):
    text = torch.randint(1, 31, (2, 8), generator=torch.Generator().manual_seed(1))
    images, want = pictures(), model.encode_text(text)
    with rfclip.refocus(model, DEFAULT):
        assert torch.equal(model.encode_text(text), want)
        image_embeddings, text_embeddings, scale = model(images, text)
        assert_each_equal([image_embeddings], [model.encode_image(images, normalize=True)])


def test_images_are_cast_to_the_weights_dtype(model):
    images = pictures(dtype=torch.float32)
    assert_each_equal(refocused(model, images), refocused(model, images.double()))


# What is refused ------------------------------------------------------------------------------------------------------

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
CONVOLUTIONS = {"timm_model_name": "test_convnext", "image_size": 32, "timm_model_pretrained": False}


def unsupported(name):
    return {
        "convolutions": lambda: CustomTextCLIP(16, CONVOLUTIONS, TEXT),
        "two-pools": lambda: small_clip(attentional_pool="parallel", attn_pooler_queries=2, attn_pooler_heads=2),
        "no-pool": lambda: small_clip(pool_type="none"),
        "qk-norm": lambda: small_clip(qk_norm=True),
        "cosine": lambda: small_clip(scaled_cosine_attn=True),
        "head-scale": lambda: small_clip(scale_heads=True),
        "inner-norm": lambda: small_clip(scale_attn_inner=True),
        "no-tower": lambda: nn.Linear(2, 2),
    }[name]().eval()


@pytest.mark.parametrize(
    "name, given",
    [
        ("convolutions", "TimmModel"),
        ("two-pools", "has two pools"),
        ("no-pool", "does not pool its tokens"),
        ("qk-norm", "ln_q, ln_k"),
        ("cosine", "logit_scale"),
        ("head-scale", "head_scale"),
        ("inner-norm", "ln_inner"),
        ("no-tower", "Linear"),
    ],
)
def test_other_towers_are_refused(name, given):
    model = unsupported(name)
    calls = {
        "refocus": lambda: rfclip.refocus(model, DEFAULT),
        "dense_features": lambda: rfclip.dense_features(model, pictures(dtype=torch.float32), method="clip"),
        "calibrate": lambda: rfclip.calibrate(model, pictures(dtype=torch.float32)),
    }
    for call in calls.values():
        with pytest.raises(ValueError) as error:
            call()
        assert given in str(error.value)
        assert "open_clip's own vision transformers" in str(error.value)


IMAGE_ERRORS = {
    "picture": (Image.new("RGB", (32, 32)), "got an object of class Image", "[B, 3, height, width]"),
    "array": (pictures().numpy(), "got an object of class ndarray", "[B, 3, height, width]"),
    "rank": (pictures()[0], "(3, 32, 32)", "float [B, 3, height, width]"),
    "channels": (pictures()[:, :1], "(3, 1, 32, 32)", "float [B, 3, height, width]"),
    "bytes": (pictures().byte(), "torch.uint8", "float [B, 3, height, width]"),
    "empty": (pictures()[:0], "(0, 3, 32, 32)", "float [B, 3, height, width]"),
    "height": (pictures()[:, :, :30], "30 x 32", "multiples of the patch, 8 x 8"),
    "width": (pictures()[:, :, :, :31], "32 x 31", "multiples of the patch, 8 x 8"),
}


@pytest.mark.parametrize("refocus", [False, True], ids=["plain", "refocused"])
@pytest.mark.parametrize("case", IMAGE_ERRORS)
def test_wrong_images(model, case, refocus):
    images, *words = IMAGE_ERRORS[case]
    method = None if refocus else "clip"
    calls = [lambda: rfclip.dense_features(model, images, method=method), lambda: rfclip.calibrate(model, images)]
    if refocus:
        rfclip.refocus(model, DEFAULT)
        calls.append(lambda: model.encode_image(images))
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        for word in words:
            assert word in str(error.value)
