"""Every file of rfclip/presets: its form, the checkpoint that it names, and whether it fits its tower."""

import open_clip
import pytest

from rfclip.config import Origin, RefocusConfig, plain_name, read_settings
from rfclip.presets import FOLDER, PRESETS, read_presets
from rfclip.towers import use_of
from rfclip.towers.hugging_face import HUGGING_FACE
from rfclip.towers.open_clip import SOURCES

FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_preset(path):
    text = path.read_text("utf-8")
    config, origin = read_settings(text)
    assert text == config.to_json(origin), "not as `rfclip calibrate` writes it"
    assert path.name == origin.file_name()
    assert origin.source and (origin.date is None) == (origin.version is None)
    for tag in origin.pretrained or [None]:
        assert PRESETS[origin.model, tag] == config
    if origin.model.startswith((HUGGING_FACE, *SOURCES)):
        assert origin.pretrained == ()
        return
    assert origin.model == plain_name(origin.model) and use_of(origin.model)[0] == "refocus"
    assert set(origin.pretrained) <= set(open_clip.list_pretrained_tags_by_model(origin.model))
    vision = open_clip.get_model_config(origin.model)["vision_cfg"]
    config.check_tower(vision["width"], vision["layers"])


def test_there_is_nothing_else():
    assert {path.name for path in FOLDER.iterdir()} - {"__init__.py", "__pycache__"} == {path.name for path in FILES}
    assert len(PRESETS) == sum(len(read_settings(path.read_text("utf-8"))[1].pretrained or [None]) for path in FILES)


@pytest.mark.parametrize("size, name", [("base-patch16", "ViT-B-16"), ("large-patch14", "ViT-L-14")])
def test_the_same_weights_in_both_libraries(size, name):
    assert PRESETS[f"transformers:openai/clip-vit-{size}", None] == PRESETS[name, "openai"]


GOOD = ("ViT-B-32", ("laion2b_e16",), "calibrated on 64 pictures: photos")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("broken", "{", "must be JSON"),
        ("dims", RefocusConfig((1,)).to_json(Origin(*GOOD)).replace("1\n", "1.5\n"), "distraction_dims="),
        ("beta", RefocusConfig((1,)).to_json(Origin(*GOOD)).replace("0.7", "7"), "beta=7"),
        ("field", RefocusConfig((1,)).to_json(Origin(*GOOD)).replace("source", "sauce"), "unknown in a config: sauce"),
        ("tags", RefocusConfig((1,)).to_json(Origin(*GOOD)).replace('"laion2b_e16"', '""'), "pretrained="),
        ("lacking", RefocusConfig((1,)).to_json(Origin("ViT-B-32")), "a preset needs pretrained, source as well"),
        ("twice", RefocusConfig((1,)).to_json(Origin(*GOOD)), "ViT-B-32 with laion2b_e16 is in a.json as well"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, words):
    (tmp_path / "a.json").write_text(RefocusConfig((1,)).to_json(Origin(*GOOD)))
    assert read_presets(tmp_path) == {("ViT-B-32", "laion2b_e16"): RefocusConfig((1,))}
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{name}\.json: .*{words}"):
        read_presets(tmp_path)
