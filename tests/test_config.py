"""RefocusConfig: checked values, JSON, and the presets of OpenAI's checkpoints."""

import json
import math
from dataclasses import fields, replace

import open_clip
import pytest
from refocusing import DEFAULT, VARIANTS
from small_models import DIMS

import rfclip
from rfclip import RefocusConfig
from rfclip.config import Origin, read_settings

NUMBERS = {"tau": "at least 0", "tau_attn": "at least 0", "beta": "at least 0 and at most 1"}
CONFIG_ERRORS = [
    *[
        ("distraction_dims", value, "distinct whole numbers of at least 0")
        for value in ((-1,), (1, 1), (1.0,), (True,))
    ],
    *[("distraction_dims", value, "distinct whole numbers of at least 0") for value in (None, 3, "12", ([1],))],
    *[("layers", value, "distinct whole numbers of at least 1") for value in ((0,), (2, 2), 3, ("1",))],
    *[(name, value, text) for name, text in NUMBERS.items() for value in (-0.1, math.nan, "1", True)],
    ("tau", None, "at least 0"),
    ("beta", None, "at least 0 and at most 1"),
    ("beta", 1.1, "at least 0 and at most 1"),
    ("shifted", 1, "True or False"),
    ("shifted", None, "True or False"),
    *[("neighbourhood", value, "3, 5, 7") for value in (1, 4, 9, 3.0, "3", True, None)],
    *[(name, value, "'") for name in rfclip.config.CHOICES if name != "neighbourhood" for value in ("other", None, 3)],
    *[(name, ["mean"], "'") for name in ("embedding", "cut_threshold")],
]


@pytest.mark.parametrize("name, value, expected", CONFIG_ERRORS, ids=[f"{n}={v!r}" for n, v, _ in CONFIG_ERRORS])
def test_config_values_are_checked(name, value, expected):
    with pytest.raises(ValueError) as error:
        RefocusConfig(**{"distraction_dims": DIMS, name: value})
    message = str(error.value)
    assert message.startswith(f"{name}={value!r}: expected")
    assert expected in message
    for choice in rfclip.config.CHOICES.get(name, ()):
        assert repr(choice) in message


@pytest.mark.parametrize(
    "changes, without, readers",
    [
        ({"neighbourhood": 5, "embedding": "none"}, "neighbourhood=5 .* embedding='none'", "mean"),
        ({"neighbourhood": 7, "embedding": "clamp"}, "neighbourhood=7 .* embedding='clamp'", "neighbourhood=3"),
        ({"similarity": "vv", "target": "cls"}, "similarity='vv' .* target='cls'", "target='defocused'"),
        ({"cut_threshold": "otsu", "target": "rest"}, "cut_threshold='otsu' .* target='rest'", "cut_threshold='mean'"),
        ({"tokens": "random", "embedding": "clamp"}, "tokens='random' .* embedding='clamp'", "tokens='distraction'"),
    ],
)
def test_choices_without_an_effect_are_refused(changes, without, readers):
    with pytest.raises(ValueError, match=f"{without}: take .*{readers}"):
        replace(DEFAULT, **changes)


def test_config_is_frozen_hashable_and_normalized():
    config = RefocusConfig([30, 5, 17], layers=[3, 1])
    assert (config.distraction_dims, config.layers) == ((5, 17, 30), (1, 3))
    assert config == RefocusConfig((5, 17, 30), layers=(1, 3))
    assert len({config, RefocusConfig((5, 17, 30), layers=(1, 3)), DEFAULT}) == 2
    with pytest.raises(AttributeError):
        config.beta = 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_json_round_trip(variant):
    config = replace(DEFAULT, **VARIANTS[variant])
    text = config.to_json()
    assert RefocusConfig.from_json(text) == config
    assert list(json.loads(text)) == [field.name for field in fields(config)]


def test_a_file_may_say_where_it_is_from():
    origin = Origin("ViT-B-16", ["openai"], "figure 3", "2026-01-31", "1.2.3")
    text = DEFAULT.to_json(origin)
    assert read_settings(text) == (DEFAULT, origin)
    assert RefocusConfig.from_json(text) == DEFAULT
    assert read_settings(DEFAULT.to_json()) == (DEFAULT, Origin())


@pytest.mark.parametrize(
    "model, pretrained, name",
    [
        ("ViT-B-16", ("openai", "other"), "ViT-B-16.openai.json"),
        ("rfclip-tiny", (), "rfclip-tiny.json"),
        ("transformers:openai/clip-vit-base-patch16", (), "transformers.openai.clip-vit-base-patch16.json"),
        ("hf-hub:laion/CLIP-ViT-B-32-DataComp.XL", None, "hf-hub.laion.CLIP-ViT-B-32-DataComp.XL.json"),
        ("local-dir:{folder}/my model", (), "my.model.json"),
        ("ViT-B-16", ("{folder}/mine.safetensors",), "ViT-B-16.mine.json"),
        ("ViT-B-16", ("../nowhere/mine.safetensors",), "ViT-B-16.nowhere.mine.safetensors.json"),
    ],
)
def test_files_are_named_after_checkpoints(folder, model, pretrained, name):
    (folder / "my model").mkdir()
    (folder / "mine.safetensors").write_bytes(b"")
    tags = pretrained and tuple(tag.format(folder=folder) for tag in pretrained)
    assert Origin(model.format(folder=folder), tags).file_name() == name


def test_config_from_json_takes_defaults():
    assert RefocusConfig.from_json('{"distraction_dims": [5, 17, 30]}') == DEFAULT


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["must be JSON"]),
        ("{'tau': 5}", ["must be JSON"]),
        ('{"distraction_dims": [1]', ["must be JSON"]),
        ("[1, 2]", ["JSON object", "distraction_dims"]),
        ("null", ["JSON object", "distraction_dims"]),
        ('{"tau": 5}', ["distraction_dims"]),
        ('{"distraction_dims": [1], "taw": 5, "bate": 1}', ["unknown in a config: bate, taw", "known:", "tau_attn"]),
        ('{"distraction_dims": [1], "model": ""}', ["model='': expected text"]),
        ('{"distraction_dims": [1], "version": 1}', ["version=1: expected text"]),
        ('{"distraction_dims": [1], "pretrained": "openai"}', ["pretrained='openai': expected a list"]),
        ('{"distraction_dims": [1], "pretrained": ["a", "a"]}', ["pretrained=['a', 'a']: expected", "distinct"]),
        ('{"distraction_dims": [1], "date": "31.1.2026"}', ["date='31.1.2026': expected a day, such as 2026-01-31"]),
        ('{"distraction_dims": [1], "date": "2026-02-30"}', ["date='2026-02-30': expected a day"]),
        ('{"distraction_dims": [1.5]}', ["distraction_dims=[1.5]", "whole numbers"]),
        ('{"distraction_dims": null}', ["distraction_dims=None", "whole numbers"]),
        ('{"distraction_dims": [1], "beta": 2}', ["beta=2", "at most 1"]),
        ('{"distraction_dims": [1], "beta": NaN}', ["beta=nan"]),
        ('{"distraction_dims": [1], "tau": 1' + 309 * "0" + "}", ["tau=1000", "a number of at least 0"]),
        ('{"distraction_dims": [1], "tau_attn": -1' + 400 * "0" + "}", ["tau_attn=-1000", "a number of at least 0"]),
        ('{"distraction_dims": [1], "tau": 1' + 5000 * "0" + "}", ["must be JSON"]),
        ('{"distraction_dims": ' + 100_000 * "[", ["must be JSON", "nested too deeply"]),
    ],
)
def test_config_from_wrong_json(text, words):
    with pytest.raises(ValueError) as error:
        RefocusConfig.from_json(text)
    for word in words:
        assert word in str(error.value)


BASE_DIMS = (4, 162, 189, 326, 429, 474, 633, 713)
LARGE_DIMS = (250, 261, 437, 650, 720, 779, 936, 1005)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B/16", "ViT-B-16-quickgelu"])
def test_preset_of_vit_b(name):
    assert RefocusConfig.preset(name, "openai") == RefocusConfig(BASE_DIMS)


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-L/14", "ViT-L-14-quickgelu"])
def test_preset_of_vit_l(name):
    assert RefocusConfig.preset(name, "openai") == RefocusConfig(LARGE_DIMS, tau_attn=5)


@pytest.mark.parametrize(
    "name, pretrained",
    [("ViT-B-16", "laion2b_s34b_b88k"), ("ViT-B-16", None), ("ViT-B-32", "openai"), ("ViT-L-14-336", "openai")],
)
def test_other_presets_name_the_calibration(name, pretrained):
    with pytest.raises(ValueError, match="rfclip calibrate") as error:
        RefocusConfig.preset(name, pretrained)
    for word in (repr(name), repr(pretrained), "ViT-B-16 with 'openai'", "ViT-L-14 with 'openai'"):
        assert word in str(error.value)


@pytest.mark.parametrize("name, width, layers", [("ViT-B-16", 768, 12), ("ViT-L-14", 1024, 24)])
def test_presets_fit_their_towers(name, width, layers):
    vision = open_clip.get_model_config(name)["vision_cfg"]
    assert (vision["width"], vision["layers"]) == (width, layers)
    RefocusConfig.preset(name, "openai").check_tower(width, layers)
