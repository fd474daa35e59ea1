"""Hugging Face's CLIPModel through the same calls: equal to an open_clip model of the same weights, and to itself."""

import copy
import io
import json
import pickle
import shutil

import helpers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from helpers import relative_error
from miniatures import scores_of
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import DIMS, pictures, small_clip, to_hugging_face
from typer.testing import CliRunner

import rfclip
from rfclip.app.cli import app
from rfclip.config import RefocusConfig
from rfclip.datasets.scenes import Scenes
from rfclip.methods import METHODS
from rfclip.presets import PRESETS
from rfclip.scoring.run import Scorer
from rfclip.segment.job import Job
from rfclip.simulated_distraction import inject_distraction
from rfclip.towers.loading import load_model, tiny_folder

CONFIG = RefocusConfig(DIMS, tau=3.0)
SCENE = tiny_folder() / "scene.png"
NAMES = "tiger, mushroom, pizza, cake, cat, bus, grass, sky"


@pytest.fixture
def pair():
    """The same weights in both libraries, float64."""
    model = small_clip()
    return model, to_hugging_face(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small CLIP of the package as transformers saves it, with a processor that has other means."""
    folder = tmp_path_factory.mktemp("saved")
    to_hugging_face(load_model()).save_pretrained(folder)
    transformers.CLIPImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.25, 0.2]).save_pretrained(folder)
    return folder


def embeddings(output):
    """What get_image_features and get_text_features give: a tensor in transformers 4, a model output since 5.0."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def config_of(method):
    return CONFIG if METHODS[method].configured else None


def assert_close(got, want, tolerance=1e-10):
    helpers.assert_close(got, want, tolerance)


# On a model in memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (8, 8)], ids=str)
def test_plain_features_are_transformers_own(size, act):
    model, images = to_hugging_face(small_clip(), act), pictures(height=size[0], width=size[1])
    tokens = model.vision_model(images, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    want = model.visual_projection(model.vision_model.post_layernorm(tokens)).mT.unflatten(
        -1, (size[0] // 8, size[1] // 8)
    )
    assert_close(rfclip.dense_features(model, images, method="clip"), want)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"proxyclip"}))  # its weights would have to be downloaded
def test_every_method_equals_open_clips(method, size):
    model = small_clip(layers=METHODS[method].blocks + 3)
    images, found = pictures(height=size[0], width=size[1]), []
    for one in (to_hugging_face(model), model):
        with rfclip.refocus(one, config_of(method), method=method), torch.no_grad():
            found.append(rfclip.dense_features(one, images))
    assert_close(*found)


@pytest.mark.parametrize("method", ["rf-clip", "released", "clip"])
def test_image_embeddings(pair, method):
    """In every way to ask for them; those of plain CLIP do not change."""
    plain, model = pair
    images = pictures()
    own = embeddings(model.get_image_features(images))
    with rfclip.refocus(plain, config_of(method), method=method):
        want = plain.encode_image(images)
    assert_close(plain.encode_image(images), own)
    tokens = torch.tensor([[1, 5, 31, 0, 0, 0, 0, 0]])
    with rfclip.refocus(model, config_of(method), method=method):
        assert_close(embeddings(model.get_image_features(images)), want)
        assert_close(embeddings(model.get_image_features(pixel_values=images)), want)
        # In float32, as transformers 4 makes no causal mask for the text in float64.
        whole = copy.deepcopy(model).float()(input_ids=tokens, pixel_values=images.float())
        assert_close(whole.image_embeds, want / want.norm(dim=-1, keepdim=True), 1e-5)
        seen = model.vision_model(images)
        assert_close(model.visual_projection(seen.pooler_output), want)
        assert seen.last_hidden_state.shape == (3, 17, 48)
    assert (method == "clip") == torch.allclose(want, own)
    assert_close(embeddings(model.float().get_text_features(tokens)), plain.encode_text(tokens), 1e-5)


def test_it_is_undone(pair):
    _, model = pair
    images, state = pictures(), copy.deepcopy(model.state_dict())
    before = embeddings(model.get_image_features(images))
    with rfclip.refocus(model, CONFIG):
        assert not torch.equal(embeddings(model.get_image_features(images)), before)
        with pytest.raises(RuntimeError, match="already refocused"):
            rfclip.refocus(model, CONFIG)
        twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(embeddings(model.get_image_features(images)), before)
    assert not torch.equal(embeddings(twin.get_image_features(images)), before)  # a copy stays refocused
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model.vision_model)


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}])
def test_what_a_refocused_tower_does_not_return(pair, asked):
    _, model = pair
    with rfclip.refocus(model, CONFIG), pytest.raises(ValueError, match=f"{next(iter(asked))}.*undo the refocusing"):
        model.vision_model(pictures(), **asked)


def test_a_tower_alone(pair):
    """CLIPVisionModelWithProjection has no texts: everything but segmenting works."""
    plain, whole = pair
    config = transformers.CLIPVisionConfig(**whole.config.vision_config.to_dict() | {"projection_dim": 20})
    model = transformers.CLIPVisionModelWithProjection(config).double().eval()
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("vis")})
    images = pictures()
    with rfclip.refocus(plain, CONFIG), rfclip.refocus(model, CONFIG):
        assert_close(rfclip.dense_features(model, images), rfclip.dense_features(plain, images))
        assert_close(model(images).image_embeds, plain.encode_image(images))
    with pytest.raises(ValueError, match="CLIPVisionModelWithProjection knows no tokens"):
        rfclip.Segmenter(model, config=CONFIG)


def test_calibration(pair):
    plain, model = pair
    images = pictures(bright=1.0, colours=(0,))
    got, want = rfclip.calibrate(model, images), rfclip.calibrate(plain, images)
    assert got.dims == want.dims
    assert set(got.dims) == set(DIMS)
    torch.testing.assert_close(got.profile, want.profile)


def test_half_precision(pair):
    """About as close to float64 as open_clip's own model of that precision."""
    images, errors = pictures(), []
    with rfclip.refocus(pair[0], CONFIG):
        want = rfclip.dense_features(pair[0], images)
    for model in pair:
        with rfclip.refocus(model.bfloat16(), CONFIG):
            found = rfclip.dense_features(model, images)
        assert found.dtype == torch.bfloat16
        errors.append(relative_error(found, want))
    assert errors[1] <= 1.5 * errors[0]


def test_the_compiler_traces_it_in_one_graph(pair):
    _, model = pair
    with rfclip.refocus(model, CONFIG):
        want = model.vision_model(pictures()).pooler_output
        compiled = torch.compile(model.vision_model, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert_close(compiled(pictures()).pooler_output, want)


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14"])
def test_openais_checkpoints_know_their_dimensions(name):
    config = PRESETS[f"transformers:{name}", None]
    vision = {"hidden_size": 1056, "num_attention_heads": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    text = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    with pytest.raises(ValueError, match="config=None"):
        rfclip.refocus(model)
    model.name_or_path = name
    with rfclip.refocus(model):
        assert model.vision_model.forward.config == config


def test_training_mode_is_refused(pair):
    with pytest.raises(RuntimeError, match="training mode"):
        rfclip.refocus(pair[1].train(), CONFIG)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["Siglip", "CLIPSeg", "CLIPVision"])
def test_other_models_of_transformers_are_refused_by_name(kind):
    if kind == "CLIPVision":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL))
    else:
        config = getattr(transformers, f"{kind}Config")(vision_config=SMALL, text_config=SMALL)
        model = getattr(transformers, f"{kind}Model")(config)
    for call in (lambda: rfclip.refocus(model, CONFIG), lambda: rfclip.calibrate(model, pictures())):
        with pytest.raises(ValueError, match=f"got a {kind}Model; .*CLIPModel and CLIPVisionModelWithProjection"):
            call()


# By name -------------------------------------------------------------------------------------------------------------


def test_segmenting_equals_open_clips(folder):
    """The same labels and text embeddings, under the normalization of the processor."""
    plain = load_model()
    plain.visual.image_mean, plain.visual.image_std = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
    with rfclip.Segmenter(plain) as segmenter:
        want = segmenter(SCENE, NAMES, probabilities=True)
        texts = segmenter.text_embeddings(("dog", "grass"))
    with rfclip.Segmenter(f"transformers:{folder}", config=RefocusConfig(())) as segmenter:
        found = segmenter(SCENE, NAMES, probabilities=True)
        np.testing.assert_allclose(segmenter.text_embeddings(("dog", "grass")), texts, atol=1e-6)
        assert segmenter.model.refocus_config is None
    np.testing.assert_allclose(found.probabilities, want.probabilities, atol=1e-4)
    assert (found.labels == want.labels).mean() > 0.999


PROCESSORS = {
    "none": {"do_normalize": False},
    "scaled": {"rescale_factor": 1 / 127.5},
    "unscaled": {"do_rescale": False},
    "unscaled-none": {"do_rescale": False, "do_normalize": False},
    "one-number": {"image_mean": 0.4, "image_std": 0.3},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_pictures_are_normalized_as_by_the_processor(tmp_path, folder, case):
    """Whatever it does to a pixel, we do: compared on the values that it makes of single colours."""
    shutil.copytree(folder, tmp_path / "other")
    transformers.CLIPImageProcessor(**PROCESSORS[case]).save_pretrained(tmp_path / "other")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "other")
    model = load_model(f"transformers:{tmp_path / 'other'}")
    for colour in ((0, 0, 0), (255, 255, 255), (10, 100, 200)):
        made = processor(images=Image.new("RGB", (64, 64), colour), return_tensors="pt")["pixel_values"]
        want = made[0, :, made.shape[2] // 2, made.shape[3] // 2].double().numpy()
        found = (np.array(colour) / 255 - model.image_mean) / model.image_std
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"image_std": [0, 1, 1]}, {"image_mean": "half"}, {"image_mean": [0.5, 0.5]}], ids=str
)
def test_processors_that_cannot_be(tmp_path, folder, changes):
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json says .*expected numbers, and no std of 0"):
        load_model(f"transformers:{tmp_path / 'other'}")


def test_a_processor_without_means(tmp_path, folder):
    """transformers 4 takes OpenAI's for them, and transformers 5 refuses the processor once it is used."""
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": None}))
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "other")
    if processor.image_mean is None:
        with pytest.raises(ValueError, match="says image_mean=None"):
            load_model(f"transformers:{tmp_path / 'other'}")
    else:
        assert load_model(f"transformers:{tmp_path / 'other'}").image_mean == tuple(processor.image_mean)


def test_text_embeddings_are_cached_apart_from_the_tower(folder, tmp_path):
    """Another image tower reads the same cache, another text tower does not."""
    model = load_model(f"transformers:{folder}")
    files = []
    for change in (None, model.visual_projection, model.text_projection):
        if change is not None:
            with torch.no_grad():
                change.weight[0, 0] += 1
        with rfclip.Segmenter(model, config=RefocusConfig(()), cache=tmp_path) as segmenter:
            segmenter.text_embeddings(("dog",))
        files.append(len(list(tmp_path.iterdir())))
    assert files == [1, 1, 2]


def test_scenes_and_injected_distraction(folder, tmp_path):
    model = load_model(f"transformers:{folder}")
    model.image_mean, model.image_std = load_model().visual.image_mean, load_model().visual.image_std
    plain, job = load_model(), Job(method="kk-mean", inject=0.2)
    found, want = (
        scores_of(Scorer(job, Scenes(count=4), one), tmp_path / name) for name, one in (("a", model), ("b", plain))
    )
    assert found.miou == pytest.approx(want.miou, abs=1e-3)
    assert found.top1 == want.top1
    images = torch.rand(2, 3, 112, 112)
    before = rfclip.dense_features(model, images, method="clip")
    with inject_distraction(model, 0.2), inject_distraction(plain, 0.2):
        found = rfclip.dense_features(model, images, method="clip")
        assert_close(found, rfclip.dense_features(plain, images, method="clip"), 1e-4)
    assert relative_error(found, before) > 0.1


def test_keys_that_are_no_product_cannot_lean(folder):
    model = load_model(f"transformers:{folder}")
    attention = model.vision_model.encoder.layers[4].self_attn
    attention.k_proj.register_forward_hook(lambda module, inputs, output: output * 1.01)
    weights = [layer.self_attn.k_proj.weight.clone() for layer in model.vision_model.encoder.layers]
    with pytest.raises(ValueError, match="block 5 do more than multiply and add"), inject_distraction(model, 0.2):
        pass
    left = [layer.self_attn.k_proj.weight for layer in model.vision_model.encoder.layers]
    assert all(map(torch.equal, weights, left))
    with inject_distraction(model, 0.2, attraction=0):
        rfclip.dense_features(model, torch.rand(1, 3, 112, 112), method="clip")


def test_the_command(folder, tmp_path):
    """calibrate writes the config, segment reads it."""
    config, out = tmp_path / "config.json", tmp_path / "out"
    model = ["--model", f"transformers:{folder}"]
    done = CliRunner().invoke(app, ["calibrate", str(SCENE), *model, "--out", str(config)])
    assert done.exit_code == 0, done.output
    assert RefocusConfig.from_json(config.read_text()) == RefocusConfig(())
    given = ["segment", str(SCENE), "--classes", NAMES, *model, "--out", str(out)]
    done = CliRunner().invoke(app, [*given, "--config", str(config)])
    assert done.exit_code == 0, done.output
    assert json.loads((out / "scene.json").read_text())["model"] == f"transformers:{folder}"
    assert Image.open(out / "scene.mask.png").mode == "P"
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    assert "rfclip calibrate" in done.stderr


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / "config.json").write_text('{"model_type": "siglip"}'), ["'siglip'", "CLIPModel"]),
        (lambda folder: (folder / "config.json").unlink(), ["of type None", "CLIPModel"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), ["does not hold a CLIPModel"]),
        (lambda folder: _pickle_instead(folder), ["does not hold a CLIPModel", "safetensors"]),
        (lambda folder: _leave_out(folder, "visual_projection.weight"), ["lacks weights", "visual_projection"]),
        (lambda folder: _widen(folder), ["far larger than the"]),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), ["does not hold a CLIPModel", "preprocessor"]),
    ],
    ids=["siglip", "no-config", "damaged", "pickle", "missing-weight", "wide", "no-processor"],
)
def test_wrong_folders(tmp_path, folder, change, words):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    change(broken)
    with pytest.raises(ValueError) as error:
        load_model(f"transformers:{broken}")
    for word in words:
        assert word in str(error.value)


def _pickle_instead(folder):
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())


def _widen(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 10**7
    (folder / "config.json").write_text(json.dumps(config))


def _leave_out(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_other_refusals(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="comes with its own weights"):
        load_model(f"transformers:{folder}", "openai")
    with pytest.raises(ValueError, match="precision='fp8': expected one of fp32"):
        load_model(f"transformers:{folder}", precision="fp8")
    with pytest.raises(ConnectionError, match="needs a network once"):
        load_model("transformers:nobody/there-is-none")


def test_precision_by_name(folder):
    assert load_model(f"transformers:{folder}", precision="bf16").visual_projection.weight.dtype == torch.bfloat16
