"""Models by name: loading them, and every model that open_clip lists, refocused, read or refused as its use says."""

import json
import re
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from open_clip.model import CustomTextCLIP, _build_vision_tower
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from small_towers import small_resnet, small_timm
from torch import nn

import rfclip
from rfclip import RefocusConfig, Segmenter
from rfclip.methods import METHODS
from rfclip.towers import read_tower, use_of
from rfclip.towers.loading import find_model, load_model, tiny_folder
from rfclip.towers.open_clip import OpenCLIPTower

NAMES = open_clip.list_models()
REFOCUSED = [name for name in NAMES if use_of(name)[0] == "refocus"]
ALONE = {}  # one name for each kind of tower, whatever its depth, its width and the size of its pictures
for _name in REFOCUSED:
    _vision = open_clip.get_model_config(_name)["vision_cfg"]
    ALONE.setdefault(str({**_vision, "layers": 1, "width": 0, "image_size": 0}), _name)


def image_tower(name, **changes):
    """A model that consists of the image tower of that name alone, with random weights."""
    config, model = open_clip.get_model_config(name), nn.Module()
    vision = config["vision_cfg"] | changes
    model.visual = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_use_of_a_name_is_that_of_its_tower(name):
    if "timm_model_name" in open_clip.get_model_config(name)["vision_cfg"] and Version(version("timm")) < Version(
        "1.0.23"
    ):
        pytest.skip("timm before 1.0.23 cannot make its towers without memory")
    with torch.device("meta"):
        model = image_tower(name)
    use, reason = use_of(name)
    if use == "neither":
        assert reason
        with pytest.raises(ValueError, match="TimmModel around timm's .*, which cannot be read"):
            read_tower(model)
        return
    tower = read_tower(model)
    assert tower.reason == reason and (use == "refocus") == (not reason)
    assert [side // patch for side, patch in zip(tower.image_size, tower.patch_size, strict=True)] == [*tower.grid_size]
    if use == "refocus":
        assert len(tower.blocks) == open_clip.get_model_config(name)["vision_cfg"]["layers"]


@pytest.mark.parametrize("source", ["openai", "laion2b", "laion400m", "datacomp", "dfn", "metaclip"])
def test_the_checkpoints_of_standard_towers(source):
    """Every checkpoint of these sources for a plain ViT belongs to a tower that can be refocused."""
    found = [name for name, tag in open_clip.list_pretrained() if tag.startswith(source) and name.startswith("ViT-")]
    assert found
    assert [name for name in found if name not in REFOCUSED] == []


@pytest.mark.parametrize("name", ALONE.values())
def test_it_is_calibrated_and_refocused(name):
    """Two blocks of the tower on two by three patches: what calibration finds is what refocusing takes."""
    torch.manual_seed(0)
    patch = open_clip.get_model_config(name)["vision_cfg"]["patch_size"]
    model = image_tower(name, layers=2, image_size=(2 * patch, 3 * patch))
    images = torch.randn(2, 3, 2 * patch, 3 * patch)
    with torch.no_grad():
        model.visual.ln_pre = nn.LayerNorm(model.visual.conv1.out_channels)  # for planting, even where there is none
        model.visual.ln_pre.bias[7] = 300
        config = rfclip.calibrate(model, images).config()
        assert config.distraction_dims == (7,)
        model.visual.output_tokens = False
        plain = model.visual(images)
        patches = model.visual.forward_intermediates(images, indices=1)["image_intermediates"][0].movedim(1, -1)
        want = model.visual.ln_post(patches) @ model.visual.proj
        found = rfclip.dense_features(model, images, method="clip").movedim(1, -1)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        with rfclip.refocus(model, config):
            assert rfclip.dense_features(model, images).isfinite().all()
            assert not torch.equal(model.visual(images), plain)
        assert torch.equal(model.visual(images), plain)


FAMILY = {  # in docs/models.md, by name
    "SigLIP and SigLIP 2": "SigLIP|siglip",
    "ViTamin": "^ViTamin",
    "ResNets": "^RN",
    "EVA": "^EVA",
    "PE-Core": "^PE-Core",
    "MobileCLIP's ViTs": "^MobileCLIP2?-[BL]",
    "CoCa": "^coca",
    "a ViT of timm's": "^vit_medium",
    "ConvNeXt": "^convnext",
    "MobileCLIP's FastViTs": "^MobileCLIP2?-S",
    "a Swin transformer": "^swin",
    "a ViT with biases of relative positions": "^vit_relpos",
}


def test_the_counts_that_the_page_gives():
    """Of open_clip 3.3; other releases list some more or fewer."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| (refocus|readout|neither) \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    counts = Counter(use_of(name)[0] for name in NAMES)
    assert min(counts.values()) > 10
    if not version("open_clip_torch").startswith("3.3.") or Version(version("timm")) < Version("1.0.23"):
        return
    assert counts["refocus"] + counts["readout"] >= 120
    assert {use: int(number) for use, number, _ in rows} == counts and f"lists {len(NAMES)} models" in page
    named = [(use, *found) for use, _, which in rows for found in re.findall(r"([^(,][^(]*?) \((\d+)\)", which)]
    assert {family.strip(", ") for _, family, _ in named} == set(FAMILY)
    for use, family, number in named:
        of_family = [name for name in NAMES if re.search(FAMILY[family.strip(", ")], name) and use_of(name)[0] == use]
        assert len(of_family) == int(number), family
    assert sum(int(number) for *_, number in named) == counts["readout"] + counts["neither"]


def test_the_messages_that_the_page_shows():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    siglip, resnet = (read_tower(model) for model in (small_timm("siglip", depth=11), small_resnet()))
    for name, tower in (("rf-clip", siglip), ("gem", resnet), ("sc-clip", siglip)):
        with pytest.raises(ValueError) as error:
            METHODS[name].check_tower(tower)
        assert str(error.value).partition(": ")[0] in page


# Loading by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, found",
    {
        "rfclip-tiny": ("rfclip-tiny", None),
        "ViT-B/16": ("ViT-B-16", "openai"),
        "vit-b/32": ("ViT-B-32", "openai"),
        "ViT-L/14@336px": ("ViT-L-14-336", "openai"),
        "ViT-B-16": ("ViT-B-16", None),
        "ViT-H/14": ("ViT-H-14", None),  # of which OpenAI has none
        "openai/ViT-B-16": ("ViT-B-16", "openai"),
        "openai/ViT-B/16": ("ViT-B-16", "openai"),
        "laion2b_s34b_b88k/ViT-B-16": ("ViT-B-16", "laion2b_s34b_b88k"),
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": ("ViT-B-16", "laion2b_s34b_b88k"),
        "openai/clip-vit-base-patch16": ("transformers:openai/clip-vit-base-patch16", None),
        "hf-hub:somebody/model": ("hf-hub:somebody/model", None),
        "local-dir:a/ViT-B/16": ("local-dir:a/ViT-B/16", None),
        "somebody/model": ("somebody/model", None),
        "ViT-Z/16": ("ViT-Z/16", None),
    }.items(),
)
def test_ways_to_write_a_model(written, found):
    assert find_model(written) == found == find_model(*found)


def test_weights_given_apart():
    assert find_model("ViT-B/16", "laion2b_s34b_b88k") == ("ViT-B-16", "laion2b_s34b_b88k")
    assert find_model("openai/ViT-B-16", "openai") == ("ViT-B-16", "openai")
    assert find_model("openai/ViT-B-16", "laion400m_e31") == ("openai/ViT-B-16", "laion400m_e31")


@pytest.mark.parametrize(
    "written, words",
    [
        ("ViT-B-61", "unknown model 'ViT-B-61': did you mean ViT-B-16"),
        ("vit_b_16", "did you mean ViT-B-16"),
        ("rfclip-tniy", "did you mean rfclip-tiny"),
        ("somebody/model", "hf-hub:somebody/model is open_clip's, and transformers:somebody/model a CLIPModel"),
        ("???", "unknown model '???'; `rfclip models`"),
    ],
)
def test_the_nearest_names(written, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_model(written)


def test_what_comes_with_a_model():
    """Pictures and names to features and embeddings that agree, without further packages."""
    model, picture = load_model(), Image.open(tiny_folder() / "scene.png")
    seen = model.preprocess(picture)
    assert seen.shape == (3, 112, 112) and model.preprocess(picture.resize((300, 100))).shape == (3, 112, 336)
    assert model.preprocess(tiny_folder() / "scene.png", short_side=50).shape == (3, 48, 48)
    mean, std = (torch.tensor(value)[:, None, None] for value in (model.visual.image_mean, model.visual.image_std))
    whole = np.asarray(picture.convert("RGB").resize((112, 112), Image.Resampling.BICUBIC))
    np.testing.assert_allclose((seen * std + mean).movedim(0, -1) * 255, whole, atol=1e-3)
    with pytest.raises(ValueError, match="short_side=3: expected at least a patch, 8"):
        model.preprocess(picture, short_side=3)
    names = ["dog", "grass"]
    text = rfclip.text_embeddings(model, names, templates=["a {}.".format], cache=False)
    with torch.no_grad():
        want = F.normalize(model.encode_text(model.tokenizer(["a dog.", "a grass."])), dim=-1)
    torch.testing.assert_close(text, want)
    with rfclip.refocus(model):
        features = F.normalize(rfclip.dense_features(model, seen[None]), dim=1)
    found = torch.einsum("chw,kc->khw", features[0], text).argmax(dim=0)
    assert (found[-3:] == 1).float().mean() > 0.9  # grass, below
    with pytest.raises(ValueError, match="names: got 'dog', expected a list"):
        rfclip.text_embeddings(model, "dog")


def test_models_and_weights_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'ViT-Z'.*rfclip models"):
        rfclip.load_model("ViT-Z", "openai")
    with pytest.raises(ValueError, match="'nonsense' is neither a file nor weights of ViT-B-16: openai,"):
        rfclip.load_model("ViT-B-16", "nonsense")
    with pytest.raises(ValueError, match="needs pretrained weights: one of openai,"):
        rfclip.load_model("ViT-B-16")
    with pytest.raises(ValueError, match="convnext_base cannot be read: a ConvNeXt has no .*; rfclip works with"):
        rfclip.load_model("convnext_base", "laion400m_s13b_b51k")
    with pytest.raises(ValueError, match="no such folder"):
        rfclip.load_model(f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="'dfn2b' are not known.*rfclip calibrate"):
        Segmenter("ViT-B-16", "dfn2b")
    with pytest.raises(ValueError, match="comes with its own weights"):
        rfclip.load_model("rfclip-tiny", "openai")
    pickled = tmp_path / "weights.pt"
    torch.save({}, pickled)
    with pytest.raises(ValueError, match="must be safetensors"):
        rfclip.load_model("ViT-B-16", str(pickled))


KINDS = {  # of the text towers of MetaCLIP 2 and CLIPA, which differ in vocabulary, pooling and what is masked
    "metaclip-2": ({"pool_type": "eos", "eos_id": 2}, {}),
    "clipa": ({"pool_type": "last", "no_causal_mask": True}, {"strip_sep_token": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_a_tokenizer_of_transformers(tmp_path, kind):
    """Its texts are embedded as by hand: <s> words </s> and padding, without </s> where separators are stripped."""
    if kind == "metaclip-2" and not hasattr(open_clip.CLIPTextCfg, "eos_id"):
        pytest.skip("open_clip 3.0 does not have MetaCLIP 2")
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "dog": 4, "a": 5, "grass": 6}
    text, options = KINDS[kind]
    text = {"context_length": 6, "vocab_size": len(words), "width": 16, "heads": 2, "layers": 2, **text}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    torch.manual_seed(0)
    plain = open_clip.model.CLIP(16, vision, text).eval()
    save_model(plain, tmp_path / "open_clip_model.safetensors")
    text |= {"hf_tokenizer_name": "elsewhere/the-one-in-the-folder", "tokenizer_kwargs": options}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    special = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path)
    end = 0 if options else 2
    tokens = torch.tensor([[0, 4, end, 1, 1, 1], [0, 5, 6, end, 1, 1]])
    found = rfclip.text_embeddings(
        rfclip.load_model(f"local-dir:{tmp_path}"), ["dog", "a grass"], templates=[str], cache=False
    )
    torch.testing.assert_close(found, F.normalize(plain.encode_text(tokens), dim=-1))
    with pytest.raises(ValueError, match=r"knows 7 tokens, .* 49408: pass one that fits"):
        rfclip.text_embeddings(plain, ["dog"], cache=False)


@pytest.mark.parametrize("name, error", [("ViT-H-14-worldwide", ConnectionError), ("local-dir:a", ValueError)])
def test_a_tokenizer_that_cannot_be_loaded(monkeypatch, name, error):
    def fail(*given):
        raise OSError("no such tokenizer")

    monkeypatch.setattr("open_clip.get_tokenizer", fail)
    with pytest.raises(error, match=f"the tokenizer of '{name}' could not be .*: no such tokenizer"):
        OpenCLIPTower.tokenizer(name)


def test_weights_that_are_not(tmp_path):
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights")
    for path in (garbage, tiny_folder() / "open_clip_model.safetensors"):
        with pytest.raises(ValueError, match="does not hold the weights of ViT-B-32"):
            rfclip.load_model("ViT-B-32", str(path))
    with pytest.raises(ValueError, match="does not hold the weights"):
        rfclip.load_model(f"local-dir:{tmp_path}")


def saved(folder, **files):
    """The bundled model in a folder, with other files in the place of its weights."""
    folder.mkdir()
    shutil.copy(tiny_folder() / "open_clip_config.json", folder)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return f"local-dir:{folder}"


WEIGHTS = tiny_folder() / "open_clip_model.safetensors"


def test_a_folder_without_weights_is_no_model(tmp_path):
    """open_clip would go on with random weights."""
    with pytest.raises(ValueError, match="holds no weights: expected open_clip_model.safetensors"):
        rfclip.load_model(saved(tmp_path / "none"))
    with pytest.raises(ValueError, match="open_clip_pytorch_model.bin may be pickled.*can run code"):
        rfclip.load_model(saved(tmp_path / "pickle", open_clip_pytorch_model__bin=b""))
    with pytest.raises(ValueError, match="several weights"):
        rfclip.load_model(saved(tmp_path / "several", a__safetensors=b"", b__safetensors=b""))
    for content, words in ((b"", ""), (b"\x02" + 7 * b"\0" + b"{}", ".*the file is empty"), (8 * b"\xff", "")):
        with pytest.raises(ValueError, match=f"does not hold the weights{words}"):
            rfclip.load_model(saved(tmp_path / content.hex()[:8].ljust(1, "0"), open_clip_model__safetensors=content))


LARGE = {
    "width": ("vision_cfg", "width", 10**7),
    "layers": ("vision_cfg", "layers", 10**7),
    "picture": ("vision_cfg", "image_size", 10**6),
    "context": ("text_cfg", "context_length", 10**6),
    "vocabulary": ("text_cfg", "vocab_size", 10**10),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_config_far_larger_than_its_weights(tmp_path, case):
    """Refused before the memory is taken, which would end the process."""
    name = saved(tmp_path / "large", open_clip_model__safetensors=WEIGHTS.read_bytes())
    part, key, value = LARGE[case]
    config = json.loads((tmp_path / "large/open_clip_config.json").read_text("utf-8"))
    config["model_cfg"][part][key] = value
    (tmp_path / "large/open_clip_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=f"far larger than the {WEIGHTS.stat().st_size} bytes of weights"):
        rfclip.load_model(name)


CONFIGS = {
    "no-text": (lambda config: json.dumps({"model_cfg": config["model_cfg"] | {"text_cfg": None}}), ""),
    "lacks-text": (lambda config: json.dumps({"model_cfg": {"embed_dim": 128, "vision_cfg": {}}}), "lacks 'text_cfg'"),
    "deep": (lambda config: 100_000 * "[", ""),
    "huge": (lambda config: json.dumps(config).replace('"width": 128', '"width": 1' + 309 * "0"), ""),
    "list": (lambda config: "[]", ""),
    "text": (lambda config: json.dumps(config).replace('"width": 128', '"width": "wide"'), ""),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_describes_no_model(tmp_path, case):
    name = saved(tmp_path / "odd", open_clip_model__safetensors=WEIGHTS.read_bytes())
    change, words = CONFIGS[case]
    path = tmp_path / "odd/open_clip_config.json"
    path.write_text(change(json.loads(path.read_text("utf-8"))), "utf-8")
    with pytest.raises(ValueError, match=f"does not hold the weights of .*{words}"):
        rfclip.load_model(name)


def test_what_a_library_logs_is_read(tmp_path, caplog):
    """open_clip's remark on weights that are loaded next is dropped, and only that."""
    name = saved(tmp_path / "whole", open_clip_model__safetensors=WEIGHTS.read_bytes())
    rfclip.load_model(name)
    assert not caplog.records
    open_clip.create_model(name, load_weights=False)
    assert "No pretrained weights loaded" in caplog.text or "initialized partially" in caplog.text  # open_clip 3.0


def test_safetensors_are_taken_beside_a_pickle(tmp_path):
    name = saved(tmp_path / "both", mine__safetensors=WEIGHTS.read_bytes(), open_clip_pytorch_model__bin=b"a pickle")
    assert torch.equal(rfclip.load_model(name).visual.proj, rfclip.load_model().visual.proj)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    weights = load_file(WEIGHTS)
    weights["visual.proj"][3, 5] = value
    name = saved(tmp_path / "damaged")
    save_file(weights, tmp_path / "damaged/open_clip_model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity, in visual.proj: they are damaged"):
        rfclip.load_model(name)


def test_downloaded_weights_that_are_pickled(monkeypatch, tmp_path):
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *given, **options: f"{tmp_path}/weights.bin")
    with pytest.raises(ValueError, match="weights.bin: weights must be safetensors"):
        rfclip.load_model("ViT-B-16", "openai")


def test_a_model_on_the_hub(monkeypatch, tmp_path):
    """The real loading path but for the downloads; without weights there, open_clip would go on with random ones."""
    saved(tmp_path / "hub")
    config = json.loads((tmp_path / "hub/open_clip_config.json").read_text("utf-8"))
    monkeypatch.setattr("open_clip.factory._get_hf_config", lambda *given, **options: config)
    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", lambda *given, **options: str(WEIGHTS))
    assert torch.equal(rfclip.load_model("hf-hub:some/model").visual.proj, rfclip.load_model().visual.proj)

    def fail(*given, **options):
        raise FileNotFoundError("no such file on the hub")

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", fail)
    with pytest.raises(ConnectionError, match="could not be downloaded: no such file on the hub"):
        rfclip.load_model("hf-hub:some/model")


def test_an_unknown_precision():
    for name in ("rfclip-tiny", "ViT-B-16"):
        with pytest.raises(ValueError, match="precision='float16': expected one of fp32, bf16, fp16"):
            rfclip.load_model(name, None if name == "rfclip-tiny" else "openai", precision="float16")
    with pytest.raises(ValueError, match="precision='banana': expected one of fp32, bf16, fp16"):
        Segmenter(rfclip.load_model(), precision="banana")


def test_no_network(monkeypatch):
    def fail(*arguments, **options):
        raise OSError("name or service not known")

    monkeypatch.setattr("open_clip.factory.download_pretrained", fail)
    with pytest.raises(
        ConnectionError, match="(?s)could not be downloaded.*needs a network once.*safetensors.*rfclip-tiny"
    ):
        Segmenter("ViT-B-16-quickgelu", "openai")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """Of ViT-B-16: the file, and the patch convolution."""
    torch.manual_seed(0)
    real = open_clip.create_model("ViT-B-16", None)
    weights = tmp_path_factory.mktemp("random") / "open_clip_model.safetensors"
    save_model(real, weights)
    return weights, real.visual.conv1.weight


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B/16", "ViT-B-16-quickgelu"])
def test_openai_weights_get_quickgelu_and_their_preset(monkeypatch, random_weights, name):
    """The real loading path but for the download, which is replaced by random weights of the right shapes."""
    weights, convolution = random_weights
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *arguments, **options: str(weights))
    model = rfclip.load_model(name, "openai")
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert torch.equal(model.visual.conv1.weight, convolution)
    assert model.refocus_config == RefocusConfig.preset("ViT-B-16", "openai")
    with rfclip.refocus(model), torch.inference_mode():
        assert rfclip.dense_features(model, torch.zeros(1, 3, 224, 224)).shape == (1, 512, 14, 14)


# Loading what is read only --------------------------------------------------------------------------------------------


def test_every_checkpoint_of_a_tower_that_can_be_read_gets_to_its_download(monkeypatch):
    def fail(config):
        asked.append(config)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr("open_clip.factory.download_pretrained", fail)
    listed = [(name, tag) for name, tag in open_clip.list_pretrained() if use_of(name)[0] != "neither"]
    for name, tag in listed:
        with pytest.raises(ConnectionError, match="could not be downloaded: no network"):
            rfclip.load_model(name, tag)
    assert len(asked) == len(listed) > 150


@pytest.mark.parametrize(
    "name, tag, size, tokens, embedding",
    [("PE-Core-T-16-384", "meta", 384, 32, 512), ("RN50", "openai", 224, 77, 1024)],
)
def test_towers_that_are_read_only_are_loaded(monkeypatch, tmp_path, name, tag, size, tokens, embedding):
    """The real loading path but for the download, which is replaced by random weights of the right shapes."""
    if use_of(name)[0] == "neither":
        pytest.skip(f"this timm has no tower for {name}")
    torch.manual_seed(0)
    weights = tmp_path / "open_clip_model.safetensors"
    save_model(open_clip.create_model(name, None), weights)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *arguments, **options: str(weights))
    model = rfclip.load_model(name, tag)
    assert model.refocus_config is None and model.tokenizer(["a cat"]).shape == (1, tokens)
    seen = model.preprocess(Image.new("RGB", (300, 200)))
    assert min(seen.shape[1:]) == size
    with torch.inference_mode():
        side = 16 if size == 384 else 32
        found = rfclip.dense_features(model, seen[None, :, :64, :96], method="maskclip")
        assert found.shape == (1, embedding, 64 // side, 96 // side)
        whole = rfclip.text_embeddings(model, ["cat"], cache=False)
        assert whole.shape == (1, embedding)


def test_what_is_read_only_is_refused_before_a_download(monkeypatch):
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda config: pytest.fail("downloaded"))
    for config in (None, RefocusConfig((3,))):
        with pytest.raises(ValueError, match="RN50 is only read, not refocused: it has no transformer.*'maskclip'"):
            Segmenter("RN50", "openai", config=config)


def test_a_tokenizer_that_cannot_be_downloaded(monkeypatch):
    def fail(name):
        raise OSError("no such file on the hub\nat all")

    monkeypatch.setattr("open_clip.get_tokenizer", fail)
    with pytest.raises(
        ConnectionError, match="tokenizer of 'ViT-B-16-SigLIP' could not be downloaded: no such file on"
    ):
        OpenCLIPTower.tokenizer("ViT-B-16-SigLIP")
    monkeypatch.setattr("rfclip.extras.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"ViT-B-16-SigLIP needs transformers: pip install \"rfclip\[transformers\]"):
        rfclip.load_model("ViT-B-16-SigLIP", "webli")


@pytest.mark.parametrize("method", ["maskclip", "naclip"])
def test_a_picture_is_segmented_by_a_tower_that_is_read_only(tmp_path, method):
    """A small one of timm's from a folder, by the command's own path."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "custom_text": True}}
    config["preprocess_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
    torch.manual_seed(0)
    model = CustomTextCLIP(24, vision, text)
    save_model(model, tmp_path / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}"
    with Segmenter(name, method=method, cache=False) as segmenter:
        assert segmenter.tower.image_mean == (0.5, 0.4, 0.3)
        found = segmenter(Image.new("RGB", (90, 70), (200, 30, 40)), ["cat", "grass"])
        assert found.labels.shape == (70, 90)
    with pytest.raises(ValueError, match="method 'rf-clip' needs a tower that can be refocused"):
        Segmenter(name, config=RefocusConfig((3,)), cache=False)
