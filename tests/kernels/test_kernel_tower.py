"""Whole image towers on the Triton kernels, against the reference."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from kernel_cases import DEVICE
from open_clip.transformer import VisionTransformer
from openai_models import SIZES, clip, small_openai
from PIL import Image
from small_models import DIMS, photograph, photographic_clip, pictures, small_clip, to_hugging_face
from torchvision.transforms.v2 import functional as TF

import rfclip
import rfclip_kernels
from rfclip.config import CHOICES
from rfclip.images import to_rgb
from rfclip.methods import METHODS
from rfclip.methods.across import across_windows
from rfclip.methods.feedback import DEFAULTS, agreement, fed_back
from rfclip.ops import dispatch
from rfclip.simulated_distraction import INJECTED_DIMS, inject_distraction
from rfclip.towers import read_tower
from rfclip.towers.loading import tiny_folder

CONFIGS = {  # every value of every choice is in one of them
    "paper": {},
    "received attention too": {"tau_attn": 1.0},
    "target cls": {"target": "cls"},
    "target rest, beta 1": {"target": "rest", "beta": 1.0},
    "target non-distraction alone, proxy qk": {"target": "non-distraction", "embedding": "none", "proxy": "qk"},
    "otsu": {"cut_threshold": "otsu"},
    "similarity qq, window 5": {"similarity": "qq", "neighbourhood": 5},
    "similarity vv, window 7, proxy vv": {"similarity": "vv", "neighbourhood": 7, "proxy": "vv"},
    "similarity kk, proxy kk": {"similarity": "kk", "proxy": "kk"},
    "two layers": {"layers": (1, 3)},
    "proxy qq, raw": {"proxy": "qq", "shifted": False},
    "proxy none, median": {"proxy": "none", "embedding": "median"},
    "clamp": {"embedding": "clamp"},
    "mean of random tokens": {"embedding": "mean", "tokens": "random", "beta": 0.0},
}


joint_or_not = pytest.mark.parametrize("tau_attn", [None, 1.0], ids=["scores", "joint"])


def test_the_configs_cover_every_choice():
    for name, values in CHOICES.items():
        default = getattr(rfclip.RefocusConfig(()), name)
        assert {changes.get(name, default) for changes in CONFIGS.values()} == set(values)


def features(model, images, config, backend, read=rfclip.dense_features):
    """The dense features (or whatever `read` returns), and the distraction masks of all blocks."""
    model, images, masks = model.to(DEVICE), images.to(DEVICE), []
    with rfclip.refocus(model, config, backend=backend, cuda_graphs=False), torch.inference_mode():
        forward = read_tower(model).module.forward
        enter = forward._enter

        def watched(*arguments):
            x, y, qkv, mask = enter(*arguments)
            masks.append(torch.zeros_like(x[:, 1:, 0], dtype=torch.bool) if mask is None else mask)
            return x, y, qkv, mask

        forward._enter = watched
        return read(model, images), masks


@pytest.mark.parametrize("case", CONFIGS)
def test_a_small_tower(case):
    config = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, **CONFIGS[case])
    images = pictures(count=2, height=32, width=40, dtype=torch.float32)
    got, masks = features(small_clip(dtype=torch.float32), images, config, "triton")
    want, want_masks = features(small_clip(), images.double(), config, "reference")
    assert 0 < torch.stack(masks).float().mean() < 1
    for mask, want_mask in zip(masks, want_masks, strict=True):
        assert torch.equal(mask, want_mask)
    assert relative_error(got, want) <= 1e-5
    plain, _ = features(small_clip(), images.double(), rfclip.RefocusConfig(distraction_dims=()), "reference")
    assert relative_error(want, plain) > 0.01


@pytest.mark.parametrize("method", ["sclip", "naclip", "gem", "resclip", "sc-clip", "sfp", "registers", "released"])
def test_other_methods(method):
    """Between them, these call every kernel that the methods share, each in its own way."""
    config = rfclip.RefocusConfig(distraction_dims=DIMS) if METHODS[method].configured else None
    images = pictures(count=2, height=16, width=24).to(DEVICE)
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        model = small_clip(layers=METHODS[method].blocks, dtype=dtype).to(DEVICE)
        with rfclip.refocus(model, config, method=method, backend=backend), torch.inference_mode():
            found.append(rfclip.dense_features(model, images.to(dtype)))
    assert relative_error(*found) <= 1e-5


@pytest.mark.parametrize("method", ["gem", "resclip"])
def test_steps_that_change_the_last_block(method):
    """Attention across windows, and a second pass with the agreement of a first."""
    images, found = pictures(count=3, height=16, width=24).to(DEVICE), []
    labels = torch.tensor([[[0, 0, 1], [1, 0, 1]], [[0, 0, 0], [1, 1, 1]], [[2, 0, 1], [1, 0, 2]]], device=DEVICE)
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        model = small_clip(layers=METHODS[method].blocks, dtype=dtype).to(DEVICE)
        with rfclip.refocus(model, method=method, backend=backend), torch.inference_mode():
            running = rfclip.plugin.installed(model)
            patches = running.tower.patches(images.to(dtype))
            again = fed_back(running, patches, agreement(labels).to(dtype), DEFAULTS)
            found.append([again, across_windows(running, patches.split(2))] if running.crosses else [again])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) <= 1e-5


@joint_or_not
def test_hugging_faces_tower(tau_attn):
    """It projects query, key and value separately, so that they have another memory layout."""
    config, images = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, tau_attn=tau_attn), pictures(count=2)
    got, masks = features(to_hugging_face(small_clip(dtype=torch.float32)), images.float(), config, "triton")
    want, want_masks = features(small_clip(), images, config, "reference")
    assert torch.equal(torch.stack(masks), torch.stack(want_masks))
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_openais_tower(dtype):
    """Its norms, in float32 in a model in half, and its activations are kernels too."""
    config, images = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0), pictures(count=2, dtype=torch.float32)
    model = small_openai()
    want, _ = features(small_clip(**SIZES, quick_gelu=True), images.double(), config, "reference")
    if dtype == torch.float16:
        clip.model.convert_weights(model)
    triton, visual = dispatch.backend("triton"), model.visual
    norms = [
        visual.ln_pre,
        visual.ln_post,
        *(n for block in read_tower(model).blocks for n in (block.ln_1, block.ln_2)),
    ]
    assert all(map(triton.fuses, norms))
    assert triton._replaces(visual.transformer.resblocks[0].mlp.gelu, dispatch.QUICK_GELUS)
    got, _ = features(model, images, config, "triton")
    assert got.dtype == dtype
    assert relative_error(got, want) <= (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_layers_that_do_more_are_projected_twice(hooked, monkeypatch):
    """A hook on a linear layer of transformers' changes what it returns, which its weights do not tell."""
    model, images = to_hugging_face(small_clip(dtype=torch.float32)), pictures(count=2)
    twin = copy.deepcopy(model).double()
    if hooked:
        for each in (model, twin):
            layer = each.vision_model.encoder.layers[1].self_attn.k_proj
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    calls = []
    repaired = rfclip_kernels.launchers()["project_tokens"]
    monkeypatch.setitem(
        dispatch.backend("triton")._run, "project_tokens", lambda *given: calls.append(repaired(*given))
    )
    config = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, tau_attn=1.0)
    got, _ = features(model, images.float(), config, "triton")
    want, _ = features(twin, images, config, "reference")
    assert relative_error(got, want) <= 1e-5
    assert len(calls) == 3 * (3 if hooked else 4)


@pytest.mark.parametrize("proxy", ["kk-mean", "qk", "none"])
def test_the_joint_criterion_of_a_batch(proxy):
    """An image without candidates beside another, each like alone, and all uses of the last block's projections."""
    config = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, tau_attn=1.0, proxy=proxy)
    images = torch.cat([pictures(count=1, height=24, bright=bright) for bright in (0, 0.5)])
    model = small_clip(dtype=torch.float32)
    got, masks = features(model, images.float(), config, "triton")
    want, want_masks = features(small_clip(), images, config, "reference")
    empty, found = torch.stack(masks).float().mean(dim=(0, 2))
    assert empty == 0 < found < 1
    assert torch.equal(torch.stack(masks), torch.stack(want_masks))
    assert relative_error(got, want) <= 1e-5
    alone, _ = features(model, images[1:].float(), config, "triton")
    torch.testing.assert_close(alone, got[1:], rtol=1e-4, atol=1e-5)  # PyTorch's products depend on the batch


@joint_or_not
def test_the_cls_embedding(tau_attn):
    config, images = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, tau_attn=tau_attn), pictures(count=2)
    got, want = (
        features(small_clip(dtype=dtype), images.to(dtype), config, backend, lambda model, x: model.encode_image(x))[0]
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference"))
    )
    assert relative_error(got, want) <= 1e-5
    assert relative_error(small_clip().encode_image(images).to(DEVICE), want) > 0.01


@joint_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype, tau_attn):
    """In half precision, the tower on the kernels is about as close to float64 as on the reference."""
    config, images = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, tau_attn=tau_attn), pictures(count=2)
    want, _ = features(small_clip(), images, config, "reference")
    triton, reference = (
        features(small_clip(dtype=dtype), images.to(dtype), config, name)[0] for name in ("triton", "reference")
    )
    assert triton.dtype == dtype
    assert relative_error(triton, want) <= 1.5 * relative_error(reference, want)


@pytest.mark.parametrize(
    ("name", "width", "patch", "side"), [("ViT-B-16", 768, 16, 224), ("ViT-L-14", 1024, 14, 126)], ids=["B/16", "L/14"]
)
def test_a_block_of_a_vit(name, width, patch, side):
    """Its width and heads and the patches of a picture; the second block makes the effect of the first visible."""
    torch.manual_seed(0)
    config = rfclip.RefocusConfig.preset(name, "openai")
    visual = VisionTransformer(side, patch, width, 2, width // 64, 4.0, output_dim=64).eval()
    with torch.no_grad():
        visual.positional_embedding[1::7, config.distraction_dims[0]] += 15
    model = torch.nn.Module()
    model.visual = visual
    config = replace(config, tau_attn=config.tau_attn and 1.0)  # random weights attend to all patches about alike
    picture = TF.to_dtype(TF.pil_to_tensor(to_rgb(tiny_folder() / "scene.png")), torch.float32, scale=True)
    images = 4 * TF.resize(picture[None], [side, side]) - 2
    got, masks = features(model, images, config, "triton")
    planted = len(visual.positional_embedding[1::7])
    assert 0 < masks[0].sum() < (masks[0].numel() if config.tau_attn is None else planted)
    want, want_masks = features(model.double(), images.double(), config, "reference")
    assert torch.equal(masks[0], want_masks[0])
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize(("share", "width"), [(0.0, 213), (0.1, 320)], ids=["as it is", "injected distraction"])
def test_the_shipped_scene(share, width):
    """Its right part in two windows, as `rfclip segment` does it; and all in one, with something to refocus."""
    picture = Image.open(tiny_folder() / "scene.png").crop((320 - width, 0, 320, 320))
    model = rfclip.load_model("rfclip-tiny", device=DEVICE)
    config = rfclip.RefocusConfig(distraction_dims=INJECTED_DIMS) if share else model.refocus_config
    classes, found = "tiger, mushroom, pizza, cake, grass, sky", {}
    for backend in ("triton", "reference"):
        with (
            inject_distraction(model, share),
            rfclip.Segmenter(model, config=config, backend=backend, short_side=112) as segmenter,
        ):
            found[backend] = segmenter(picture, classes, probabilities=True)
    want = found["reference"]
    np.testing.assert_allclose(found["triton"].probabilities, want.probabilities, atol=1e-4)
    best, second = np.sort(want.probabilities, axis=0)[[-1, -2]]
    clear = best - second > 1e-3
    assert clear.mean() > 0.99
    assert np.array_equal(found["triton"].labels[clear], want.labels[clear])
    assert len(np.unique(want.labels)) >= 5


@pytest.mark.parametrize("dataset", ["voc21", "cityscapes"])
def test_labels_of_the_released_evaluation(dataset):
    """The picture as a whole, and windows with their own image embeddings: as by the reference."""
    model, picture = photographic_clip(torch.float32).to(DEVICE), photograph(45, 61, seed=0)
    text = F.normalize(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), dim=-1)
    protocol, named = METHODS["released"].protocol.on(dataset), [("a", "b"), ("c",), ("d", "e", "f")]
    found = []
    for backend in ("triton", "reference"):
        options = {"method": "released", "config": rfclip.RefocusConfig(DIMS), "tokenizer": len, "short_side": 48}
        with rfclip.Segmenter(model, protocol=protocol, backend=backend, **options) as segmenter:
            segmenter.text_embeddings = lambda names: text[: len(names)]
            found.append(segmenter.segment(picture, named, probabilities=True))
    np.testing.assert_allclose(found[0].probabilities, found[1].probabilities, atol=1e-4)
    assert (found[0].labels == found[1].labels).mean() > 0.999
