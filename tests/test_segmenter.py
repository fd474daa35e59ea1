"""The segmenter against a plain loop over windows, and on scenes whose labels are known."""

import copy
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

import rfclip
from rfclip import RefocusConfig, Segmenter
from rfclip.models import tiny_folder
from rfclip.scenes import CLASSES, make_scene
from rfclip.segmenter import Segmentation, palette, parse_classes

SCENE = make_scene((4, 0), 200, objects=(3, 3), object_size=(70, 76))
NAMES = [[CLASSES[c], f"{CLASSES[c]}s"] for c in SCENE.present()]
NAMES[1:] = [*(names[0] for names in NAMES[1:]), "cat"]
pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny was never trained on")


@pytest.fixture(scope="module")
def model():
    return rfclip.load_model()


@pytest.fixture
def segmenter(model):
    with Segmenter(model) as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def picture():
    """A picture of 130 x 200 pixels, whose windows overlap unevenly."""
    return Image.fromarray(SCENE.image[:130])


def plain_loop(model, picture, named, short=168, side=112, stride=56):
    """Steps 8 and 9 of the method, one prompt, one window, one full-size tensor at a time."""
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_folder()}")
    text = []
    for name in [name for names in named for name in names]:
        prompts = [
            F.normalize(model.encode_text(tokenizer(t(name)))[0], dim=0) for t in open_clip.OPENAI_IMAGENET_TEMPLATES
        ]
        text.append(F.normalize(sum(prompts) / 80, dim=0))
    width, height = picture.size
    ratio = short / min(width, height)
    size = [round(height * ratio), round(width * ratio)]
    x = TF.resize(TF.to_image(picture).float() / 255, size, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    x = (x - torch.tensor(model.visual.image_mean)[:, None, None]) / torch.tensor(model.visual.image_std)[:, None, None]
    total, count = torch.zeros(len(text), *size), torch.zeros(size)
    for top in sorted({min(t, size[0] - side) for t in range(0, size[0], stride)}):
        for left in sorted({min(t, size[1] - side) for t in range(0, size[1], stride)}):
            window = x[None, :, top : top + side, left : left + side]
            patches = F.normalize(rfclip.dense_features(model, window), dim=1)[0]
            logits = torch.stack([(patches * t[:, None, None]).sum(0) for t in text])
            logits = F.interpolate(logits[None], size=(side, side), mode="bilinear", align_corners=False)[0]
            total[:, top : top + side, left : left + side] += logits
            count[top : top + side, left : left + side] += 1
    full = F.interpolate((total / count)[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    of_names = (40 * full).softmax(0)
    of_classes, first = [], 0
    for names in named:
        of_classes.append(of_names[first : first + len(names)].amax(0))
        first += len(names)
    return torch.stack(of_classes).numpy()


@torch.inference_mode()
def test_equals_a_plain_loop(segmenter, picture):
    want = plain_loop(segmenter.model, picture, parse_classes(NAMES))
    result = segmenter(picture, NAMES, probabilities=True)
    np.testing.assert_allclose(result.probabilities, want, atol=2e-5)
    assert result.labels.shape == (130, 200)
    assert result.labels.dtype == np.uint8
    assert len(np.unique(result.labels)) > 1
    top = np.sort(want, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    assert clear.mean() > 0.99
    assert np.array_equal(result.labels[clear], want.argmax(0)[clear])


def test_memory_limit_changes_nothing_but_the_batches(model, segmenter, picture):
    want = segmenter(picture, NAMES, probabilities=True).probabilities
    batches = []
    dense = model.visual.forward.dense
    model.visual.forward.dense = lambda windows, images: batches.append(len(windows)) or dense(windows)
    segmenter.memory_limit = 1
    np.testing.assert_allclose(segmenter(picture, NAMES, probabilities=True).probabilities, want, atol=1e-5)
    assert len(batches) > 1
    assert set(batches) == {1}
    del model.visual.forward.dense


@pytest.mark.parametrize("stride", [56, 32, 50, 55, 112])
@torch.inference_mode()
def test_the_patch_convolution_runs_once(model, stride):
    """Each window has the patches of a convolution of it alone, and all together cost no more than that."""
    with Segmenter(model, stride=stride) as segmenter:
        tower, side = model.visual.forward.tower, segmenter.window
        x = torch.randn(3, 168, 301, generator=torch.Generator().manual_seed(0))
        corners = [(top, left) for top in segmenter._starts(168) for left in segmenter._starts(301)]
        areas = []
        counted = model.visual.conv1.register_forward_pre_hook(lambda _, given: areas.append(given[0][0, 0].numel()))
        patches = segmenter._window_patches(x, corners)
        counted.remove()
    assert sum(areas) <= len(corners) * side**2
    if stride % 8 == 0:  # whole patches: the picture, and what the last column of windows does not share with it
        assert sum(areas) <= 168 * (301 + side)
    for window, (top, left) in zip(patches, corners, strict=True):
        alone = tower.patches(x[None, :, top : top + side, left : left + side])[0]
        torch.testing.assert_close(window, alone, atol=1e-5, rtol=1e-5)


def test_threshold(segmenter, picture):
    plain = segmenter(picture, NAMES, probabilities=True)
    unsure = plain.probabilities.max(0) < 0.6
    assert 0 < unsure.mean() < 1
    below = segmenter(picture, NAMES, threshold=0.6)
    assert np.array_equal(below.labels, np.where(unsure, 255, plain.labels))
    assert below.nothing == 255
    assert sum(below.shares.values()) == pytest.approx(1 - unsure.mean())
    with pytest.raises(ValueError, match="threshold=1.5.*from 0 to 1"):
        segmenter(picture, NAMES, threshold=1.5)


def test_threshold_with_a_background_class(segmenter, picture):
    named = [*NAMES, ["background", "wall"]]
    plain = segmenter(picture, named, probabilities=True)
    below = segmenter(picture, named, threshold=0.6).labels
    assert np.array_equal(below, np.where(plain.probabilities.max(0) < 0.6, len(NAMES), plain.labels))


def test_wide_pictures_and_small_ones(segmenter):
    for size in ((1, 1), (3, 500), (2000, 30), (40, 40)):
        result = segmenter(Image.new("RGB", size, "tan"), ["sand", "sky"])
        assert result.labels.shape == size[::-1]
        assert result.overlay().width >= size[0]


# Class names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["cat", "dog"], [("cat",), ("dog",)]),
        (["cat, kitten", "dog"], [("cat", "kitten"), ("dog",)]),
        ([["cat", "kitten"], "dog"], [("cat", "kitten"), ("dog",)]),
        ((("cat",), ("fire hydrant",)), [("cat",), ("fire hydrant",)]),
        ("cat, dog ,  grass", [("cat",), ("dog",), ("grass",)]),
        ("cat, kitten; dog", [("cat", "kitten"), ("dog",)]),
        ("cat", [("cat",)]),
    ],
    ids=str,
)
def test_parse_classes(given, want):
    assert parse_classes(given) == want


def test_parse_classes_from_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sky, wall\n\nchêne\nfire hydrant\n", "utf-8")
    want = [("sky", "wall"), ("chêne",), ("fire hydrant",)]
    assert parse_classes(path) == parse_classes(str(path)) == want
    for missing in (tmp_path / "nowhere.txt", str(tmp_path / "nowhere"), "nowhere.txt"):
        with pytest.raises(ValueError, match="nowhere"):
            parse_classes(missing)
    path.write_text("cat\ndog\n", "utf-8-sig")
    assert parse_classes(path) == [("cat",), ("dog",)]
    path.write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(ValueError, match="classes file"):
        parse_classes(path)


@pytest.mark.parametrize("given", [[], "", "cat,,dog", [[]], ["cat", ""], [["cat", " "]]], ids=str)
def test_empty_names_are_refused(given):
    with pytest.raises(ValueError, match="at least one class, and no empty names"):
        parse_classes(given)


def test_other_class_errors():
    with pytest.raises(ValueError, match="'cat' given more than once"):
        parse_classes(["cat", ["dog", "cat"]])
    with pytest.raises(ValueError, match="expected a name or a list of names"):
        parse_classes([["cat", 3]])
    with pytest.raises(ValueError, match="got 65535, at most 65534"):
        parse_classes([str(i) for i in range(65535)])


def test_names_never_trained_on_get_a_warning(segmenter):
    with pytest.warns(UserWarning, match="never trained on 'unicorn', 'grassland'; it knows: cat, dog,.*brick"):
        segmenter.text_embeddings(("cat", "unicorn", "grassland"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter.text_embeddings((*CLASSES, "Cat"))


# Text embeddings -----------------------------------------------------------------------------------------------------


def calls_of(model, monkeypatch):
    calls = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens))
    return calls


def test_text_embeddings_are_cached(model, tmp_path, monkeypatch):
    calls = calls_of(model, monkeypatch)

    def embeddings(names=("cat", "dog"), **options):
        with Segmenter(model, cache=tmp_path, **options) as segmenter:
            first = segmenter.text_embeddings(names)
            count = len(calls)
            assert torch.equal(segmenter.text_embeddings(names), first)
            assert len(calls) == count, "encoded again within one segmenter"
            return first

    def encoded(*arguments, **options):
        before = len(calls)
        return embeddings(*arguments, **options), len(calls) > before

    first, again = encoded()
    assert again
    torch.testing.assert_close(first.norm(dim=1), torch.ones(2))
    second, again = encoded()
    assert not again
    assert torch.equal(first, second)
    swapped, again = encoded(("dog", "cat"))
    assert not again
    assert torch.equal(swapped, first.flip(0))
    more, again = encoded(("cat", "sky", "dog"))
    assert again
    assert torch.equal(more[::2], first), "a name's embedding depends on the others"
    assert encoded(templates=[lambda name: f"a {name}"])[1]
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    third, again = encoded()
    assert again
    assert torch.equal(first, third)
    assert not list(tmp_path.glob("*.part"))
    with torch.no_grad():
        model.ln_final.bias += 0.1
    fourth, again = encoded()
    with torch.no_grad():
        model.ln_final.bias -= 0.1
    assert again
    assert not torch.allclose(first, fourth)


def test_the_cache_tells_activations_and_tokenizers_apart(model, tmp_path):
    quick = copy.deepcopy(model)
    for block in quick.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    shorter = open_clip.SimpleTokenizer(context_length=32, clean="whitespace")
    found = []
    for clip, tokenizer in ((model, None), (quick, None), (model, lambda texts: shorter([f"{t}!" for t in texts]))):
        for cache in (tmp_path, False):
            with Segmenter(clip, tokenizer=tokenizer, cache=cache) as segmenter:
                found.append(segmenter.text_embeddings(("cat",)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert torch.equal(found[4], found[5])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], found[4])


def test_no_cache_on_disk(model, tmp_path, monkeypatch):
    calls = calls_of(model, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with Segmenter(model, cache=False) as segmenter:
            segmenter.text_embeddings(("cat",))
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_an_unwritable_cache_costs_time_only(model, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with Segmenter(model, cache=blocked) as segmenter:
        assert segmenter.text_embeddings(("cat",)).shape == (1, 128)


# Models --------------------------------------------------------------------------------------------------------------


def test_a_ready_model_is_given_back(model):
    with Segmenter(model) as segmenter:
        assert "forward" in vars(model.visual)
        assert segmenter.config == model.refocus_config
    assert "forward" not in vars(model.visual)
    segmenter.close()
    with pytest.raises(RuntimeError, match="closed"):
        segmenter(Image.new("RGB", (9, 9)), ["cat"])


def test_a_refocused_model_keeps_its_config(model, picture):
    config = RefocusConfig(distraction_dims=(1, 2), proxy="kk")
    with rfclip.refocus(model, config):
        segmenter = Segmenter(model)
        assert segmenter.config == config
        segmenter(picture, NAMES)
        segmenter.close()
        assert "forward" in vars(model.visual)
        with pytest.raises(ValueError, match="refocused already"):
            Segmenter(model, config=config)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees(segmenter, picture, precision):
    want = segmenter(picture, NAMES).labels
    with Segmenter(precision=precision) as half:
        assert (half(picture, NAMES).labels == want).mean() > 0.97


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 60}, "window 60.*multiple of the patch, 8"),
        ({"stride": 200}, "stride 200"),
        ({"short_side": 100}, "short side 100"),
        ({"templates": []}, "at least one function"),
        ({"pretrained": "openai"}, "goes with a model's name"),
        ({"backend": "fast"}, "backend='fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options(model, options, words):
    with pytest.raises(ValueError, match=words):
        Segmenter(model, **options)
    assert "forward" not in vars(model.visual)


def test_another_vocabulary_needs_its_tokenizer():
    cfg = {"vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}}
    text = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    other = open_clip.CLIP(8, text_cfg=text, **cfg).eval()
    with pytest.raises(ValueError, match="tokenizer=open_clip.get_tokenizer"):
        Segmenter(other, config=RefocusConfig(distraction_dims=()))


def test_models_and_weights_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'ViT-Z'.*rfclip models"):
        rfclip.load_model("ViT-Z", "openai")
    with pytest.raises(ValueError, match="'nonsense' is neither a file nor weights of ViT-B-16: openai,"):
        rfclip.load_model("ViT-B-16", "nonsense")
    with pytest.raises(ValueError, match="needs pretrained weights: one of openai,"):
        rfclip.load_model("ViT-B-16")
    with pytest.raises(ValueError, match="RN50 cannot be refocused; rfclip works with"):
        rfclip.load_model("RN50", "openai")
    with pytest.raises(ValueError, match="no such folder"):
        rfclip.load_model(f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="'dfn2b' are not known.*rfclip calibrate"):
        Segmenter("ViT-B-16", "dfn2b")
    with pytest.raises(ValueError, match="comes with its weights"):
        rfclip.load_model("rfclip-tiny", "openai")
    pickled = tmp_path / "weights.pt"
    torch.save({}, pickled)
    with pytest.raises(ValueError, match="must be safetensors"):
        rfclip.load_model("ViT-B-16", str(pickled))


def test_weights_that_are_not(tmp_path):
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights")
    for path in (garbage, tiny_folder() / "open_clip_model.safetensors"):
        with pytest.raises(ValueError, match="does not hold the weights of ViT-B-32"):
            rfclip.load_model("ViT-B-32", str(path))
    with pytest.raises(ValueError, match="does not hold the weights"):
        rfclip.load_model(f"local-dir:{tmp_path}")


def test_no_network(monkeypatch):
    def fail(*arguments, **options):
        raise OSError("name or service not known")

    monkeypatch.setattr("open_clip.factory.download_pretrained", fail)
    with pytest.raises(
        ConnectionError, match="(?s)could not be downloaded.*needs a network once.*safetensors.*rfclip-tiny"
    ):
        Segmenter("ViT-B-16-quickgelu", "openai")


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B/16", "ViT-B-16-quickgelu"])
def test_openai_weights_get_quickgelu_and_their_preset(monkeypatch, tmp_path, name):
    """The real loading path up to the download, which hands over random weights of the right shapes."""
    torch.manual_seed(0)
    real = open_clip.create_model("ViT-B-16", None)
    weights = tmp_path / "open_clip_model.safetensors"
    from safetensors.torch import save_model

    save_model(real, weights)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *arguments, **options: str(weights))
    model = rfclip.load_model(name, "openai")
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert torch.equal(model.visual.conv1.weight, real.visual.conv1.weight)
    assert model.refocus_config == RefocusConfig.preset("ViT-B-16", "openai")
    with rfclip.refocus(model), torch.inference_mode():
        assert rfclip.dense_features(model, torch.zeros(1, 3, 224, 224)).shape == (1, 512, 14, 14)


# Results -------------------------------------------------------------------------------------------------------------


def test_segmentation_outputs():
    labels = np.zeros((60, 90), np.uint8)
    labels[:30], labels[30:, :30] = 2, 255
    result = Segmentation(Image.new("RGB", (90, 60), "gray"), labels, ("a", "b", "c"))
    assert result.shares == pytest.approx({"a": 1 / 3, "b": 0, "c": 1 / 2})
    mask = result.mask()
    assert mask.mode == "P"
    assert np.array_equal(np.asarray(mask), labels)
    colours = palette(3)
    seen = np.asarray(mask.convert("RGB"))
    assert tuple(seen[0, 0]) == colours[2]
    assert tuple(seen[40, 60]) == colours[0]
    assert tuple(seen[40, 0]) == (0, 0, 0)
    overlay = result.overlay(alpha=1)
    assert overlay.width >= 240
    left = (overlay.width - 90) // 2
    assert overlay.getpixel((left + 5, 5)) == colours[2]
    assert overlay.getpixel((left + 5, 50)) == (128, 128, 128)
    legend = {colour for _, colour in overlay.crop((0, 60, *overlay.size)).getcolors(1 << 20)}
    assert {colours[0], colours[2]} <= legend
    assert colours[1] not in legend
    plain = result.overlay(alpha=0.25, legend=False)
    assert plain.size == (90, 60)
    for place, colour in (((5, 5), colours[2]), ((60, 50), colours[0]), ((5, 50), (128, 128, 128))):
        assert plain.getpixel(place) == pytest.approx([0.75 * 128 + 0.25 * channel for channel in colour], abs=1)


def test_colours_of_classes_differ():
    """Also of many, and from the black of no class."""
    colours = np.array([(0, 0, 0), *palette(255)], int)
    apart = np.abs(colours[:, None] - colours).max(axis=-1) + 999 * np.eye(256, dtype=int)
    assert apart.min() >= 8
    assert apart[:20, :20].min() >= 50
    assert palette(300)[256:] == palette(44)


def test_an_overlay_without_any_class():
    result = Segmentation(Image.new("RGB", (300, 60), "gray"), np.full((60, 300), 255, np.uint8), ("a",))
    assert result.overlay().getcolors() == [(300 * 60, (128, 128, 128))]


def test_more_classes_than_a_mask_holds():
    labels = np.full((2, 2), 300, np.uint16)
    result = Segmentation(Image.new("RGB", (2, 2)), labels, tuple(str(i) for i in range(400)))
    assert result.nothing == 65535
    assert result.shares["300"] == 1
    with pytest.raises(ValueError, match="400 classes: an indexed picture holds at most 255"):
        result.mask()


def test_colours_differ():
    assert len(set(palette(255))) == 255


def test_the_shipped_scene(segmenter):
    """The README's picture: what is there is found, and of all other classes none."""
    result = segmenter(Path(tiny_folder()) / "scene.png", CLASSES)
    found = {name for name, share in result.shares.items() if share > 0.005}
    assert found == {"dog", "cactus", "octopus", "sailboat", "grass", "sky"}
