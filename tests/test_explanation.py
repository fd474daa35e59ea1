"""What `rfclip.explanation.explain` returns, against whole attention matrices in float64 and what must hold of them."""

import base64
import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from towers import DIMS, pictures, small_clip, to_hugging_face
from typer.testing import CliRunner

import rfclip
from rfclip import RefocusConfig, explanation, figures
from rfclip.cli import app
from rfclip.explanation import explain
from rfclip.models import load_model, tiny_folder

CONFIG = RefocusConfig(DIMS, tau=3.0)


@pytest.fixture
def model():
    model = small_clip()
    model.visual.image_mean, model.visual.image_std = (0.5,) * 3, (0.25,) * 3
    return model


@pytest.fixture
def picture():
    """24 x 40 pixels, so 3 x 5 patches, of which some are bright: they distract."""
    pixels = pictures(count=1, height=24, width=40)[0] * 0.25 + 0.5
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def seen(model, picture, **options):
    return explain(model, picture, CONFIG, short_side=24, **{"layers": [1, 2, 3, 4], **options})


def plain_blocks(model, picture):
    """Input and head-averaged attention of every plain block, from open_clip's own modules."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() / 255
    visual, found = model.visual, []
    x = rfclip.tower.read_tower(model).embed(visual.conv1((x - 0.5) / 0.25))
    for block in visual.transformer.resblocks:
        y = block.ln_1(x)
        found.append((x[0], block.attn(y, y, y, average_attn_weights=True)[1][0]))
        x = block(x)
    return found


def test_the_plain_view(model, picture):
    found = seen(model, picture, points=[(0, 0), (39, 23), (17, 9)])
    assert (found.grid, found.points, found.layers) == ((3, 5), ((0, 0), (2, 4), (1, 2)), (1, 2, 3, 4))
    profile = []
    for number, (x, A) in enumerate(plain_blocks(model, picture)):
        close = {"rtol": 0, "atol": 2e-4}  # pictures are normalized in float32, and colours grow in the tower
        np.testing.assert_allclose(found.before.attention[number + 1], A.detach(), **close)
        np.testing.assert_allclose(found.before.received[number], A[1:, 1:].mean(dim=0).detach(), **close)
        for place, row in enumerate((1, 15, 8)):
            np.testing.assert_allclose(found.before.pointed[number, place], A[row, 1:].detach(), **close)
        f = (x - x.min(dim=-1, keepdim=True).values)[1:]
        w = f / f.sum(dim=-1, keepdim=True)
        np.testing.assert_allclose(found.before.weights[number], w[:, list(DIMS)].max(dim=-1).values.detach(), **close)
        profile.append(w.mean(dim=0).detach())
    np.testing.assert_allclose(found.before.profile, torch.stack(profile).mean(dim=0), atol=1e-4)


def test_what_refocusing_moves(model, picture):
    """Attention goes from the distraction tokens to the defocused ones, and none is lost."""
    found = seen(model, picture)
    assert found.distraction.any()
    gave, got = found.moved < -1e-7, found.moved > 1e-7
    assert gave.any()
    assert (gave <= found.distraction).all()
    assert (got <= found.defocused).all()
    assert not (found.distraction & found.defocused).any()
    np.testing.assert_allclose(found.moved.sum(axis=1), 0, atol=1e-6)
    for A in found.after.attention.values():
        np.testing.assert_allclose(A.sum(axis=1), 1, atol=1e-5)
    assert np.isfinite(found.fiedler[found.defocused.any(axis=1)]).all()
    assert (found.after.weights[found.distraction] < found.before.weights[found.distraction]).mean() > 0.9
    assert found.thresholds == (3 / 48, None)
    assert "forward" not in vars(model.visual)


def test_bands_of_rows_change_nothing(model, picture, monkeypatch):
    want = seen(model, picture)
    monkeypatch.setattr(explanation, "CHUNK", 1)
    found = seen(model, picture)
    for name in ("received", "pointed", "weights"):
        np.testing.assert_allclose(getattr(found.after, name), getattr(want.after, name), atol=1e-7)
    np.testing.assert_allclose(found.after.attention[2], want.after.attention[2], atol=1e-7)


def test_hugging_faces_model(model, picture):
    other = to_hugging_face(model)
    other.image_mean, other.image_std = (0.5,) * 3, (0.25,) * 3
    found, want = seen(other, picture), seen(model, picture)
    np.testing.assert_allclose(found.moved, want.moved, atol=1e-6)
    np.testing.assert_allclose(found.after.received, want.after.received, atol=1e-6)


@pytest.mark.parametrize(
    "moves, shown",
    [
        ({}, (3, 6, 9, 12)),
        ({7: 1}, (3, 7, 9, 12)),
        ({7: 1, 2: 5}, (2, 6, 9, 12)),
        ({11: 1}, (3, 6, 11, 12)),
        ({9: 1}, (3, 6, 9, 12)),
    ],
    ids=str,
)
def test_the_block_that_moves_most_is_shown(moves, shown):
    """In place of the nearest of four; where nothing moves, the one with most distraction tokens."""
    moved, distraction = np.zeros((12, 5)), np.zeros((12, 5), bool)
    for number, amount in moves.items():
        moved[number - 1, :2] = -amount, amount
    assert explanation._with_layer(explanation._layers(None, 12), explanation.busiest(moved, distraction)) == shown
    distraction[4, 1:3] = True
    assert explanation.busiest(np.zeros((12, 5)), distraction) == 5


def test_the_layers_of_a_deep_tower(picture):
    model = small_clip(layers=8)
    model.visual.image_mean, model.visual.image_std = (0.5,) * 3, (0.25,) * 3
    found = explain(model, picture, CONFIG, short_side=24)
    assert 1 + np.abs(found.moved).sum(axis=1).argmax() in found.layers
    assert len(found.layers) == 4 and found.layers[-1] == 8 and set(found.after.attention) == set(found.layers)


def test_the_small_clip_with_classes():
    """It has no distraction dimensions: nothing moves, and each method segments the picture as given."""
    model, scene = load_model(), tiny_folder() / "scene.png"
    found = explain(model, scene, classes="dog, cactus, grass, sky")
    assert (found.moved == 0).all() and not found.distraction.any()
    np.testing.assert_array_equal(found.before.received, found.after.received)
    assert found.layers == (2, 3, 4, 6)
    assert set(found.before.attention) == set(found.layers)
    for method in ("clip", "kk-mean", "rf-clip"):
        with rfclip.Segmenter(model, method=method) as segmenter:
            want = segmenter(scene, "dog, cactus, grass, sky")
        np.testing.assert_array_equal(found.segmentations[method].labels, want.labels)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layers": [0, 2]}, "expected numbers from 1 to 4"),
        ({"layers": []}, "expected numbers from 1 to 4"),
        ({"points": [(40, 3)]}, "outside the picture of 40 x 24"),
        ({"short_side": 7}, "at least a patch, 8"),
        ({"memory_limit": 100}, "ask for fewer layers"),
    ],
)
def test_wrong_arguments(model, picture, options, words):
    with pytest.raises(ValueError, match=words):
        explain(model, picture, CONFIG, **options)


def test_a_refocused_model_is_refused(model, picture):
    with rfclip.refocus(model, CONFIG), pytest.raises(RuntimeError, match="refocused: undo that first"):
        explain(model, picture, CONFIG)


# Pictures, report and command ----------------------------------------------------------------------------------------

NAMES = {"overview", "attention", "matrices", "profile", "tokens", "maps"}


@pytest.mark.parametrize("layers", [[2], [1, 2, 3, 4]], ids=len)
def test_every_figure_is_drawn(model, picture, layers):
    found = seen(model, picture, layers=layers)
    drawn = {name: figures.png(figure) for name, figure in figures.draw(found).items()}
    assert set(drawn) == NAMES
    for data in drawn.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 5


def test_the_tint_is_on_the_tokens(model, picture):
    """Red where tokens distract and blue where they receive, patch by patch, in the drawn map."""
    found = seen(model, picture, layers=[3])
    shown = figures.draw_maps(found).axes[0].images[0].get_array().filled()
    plain = np.asarray(found.image.convert("L").convert("RGB")).astype(int)
    difference = (shown[..., :3].astype(int) - plain).reshape(3, 8, 5, 8, 3).mean(axis=(1, 3)).reshape(15, 3)
    for mask, channel in ((found.distraction[2], 0), (found.defocused[2], 2)):
        assert mask.any()
        assert (difference[mask].argmax(axis=1) == channel).all()
    neither = ~(found.distraction[2] | found.defocused[2])
    assert not difference[neither].any()


def test_the_sentences(model, picture):
    """Their figures are those of the arrays, in the block that moves most; without a finding they say so."""
    found = seen(model, picture, layers=[1])
    block = max(range(3), key=lambda number: np.abs(found.moved[number]).sum())
    figured = [
        f"{found.distraction.sum()} distraction tokens in {sum(map(any, found.distraction))} of 4 blocks",
        f"In block {block + 1}, where most is moved, {found.distraction[block].sum()} of 15 patches distract: they",
    ]
    for tokens in (found.distraction[block], found.defocused[block]):
        before, after = (100 * sum(view.received[block, tokens]) for view in (found.before, found.after))
        figured.append(f"{after:.1f} % ")
        figured.append(f"instead of {before:.1f} %")
    said = figures.describe(found)
    assert [part for part in figured if part not in said] == []
    assert (
        found.after.received[block, found.distraction[block]].sum()
        < found.before.received[block, found.distraction[block]].sum()
    )
    assert "no distraction token" in figures.describe(explain(model, picture, RefocusConfig(()), short_side=24))


def test_the_command(tmp_path):
    """A page that holds every picture it shows, the files beside it, and one profile of all pictures."""
    folder, out = tmp_path / "in <b>", tmp_path / "out"
    folder.mkdir()
    for name in ("one.png", "two.png"):
        (folder / name).write_bytes((tiny_folder() / "scene.png").read_bytes())
    (folder / "bad.png").write_bytes(b"nothing")
    given = ["explain", str(folder), "--inject-distraction", "0.1", "--layers", "3,4", "--points", "30,40"]
    done = CliRunner().invoke(app, [*given, "--classes", "dog, grass, sky", "--out", str(out)])
    assert done.exit_code == 1, done.output  # for bad.png
    assert "bad.png" in done.stderr
    page = (out / "one" / "report.html").read_text()
    shown = dict(re.findall(r'<img alt="(\w+)" src="data:image/png;base64,([^"]+)">', page))
    assert set(shown) == NAMES | {"segmentation"}
    for name, data in shown.items():
        assert base64.b64decode(data) == (out / "one" / f"{name}.png").read_bytes()
    assert "<pre>0, 0, 0, 20, 0, 0</pre>" in page  # by block: a tenth of 196 patches
    assert re.search(
        r"20 of 196 patches distract: they receive .* Refocusing changes the class of [\d.]+ % of the pixels", page
    )
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert {path.name for path in out.iterdir()} == {"one", "two", "profile.png"}
    again = CliRunner().invoke(app, [*given, "--out", str(out)])
    assert again.exit_code == 1
    assert "--overwrite replaces it" in again.stderr


@pytest.mark.parametrize(
    "given, words",
    [
        (["--points", "3"], "expected X,Y"),
        (["--points", "a,b"], "expected --points X,Y"),
        (["--layers", "1;2"], "--layers N,N"),
        (["--layers", "9"], "numbers from 1 to 6"),
        (["--points", "500,3"], "outside the picture"),
        (["--inject-distraction", "2"], "from 0 to 1"),
    ],
)
def test_wrong_options(tmp_path, given, words):
    done = CliRunner().invoke(app, ["explain", str(tiny_folder() / "scene.png"), *given, "--out", str(tmp_path / "o")])
    assert done.exit_code != 0
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder(tmp_path, out):
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["explain", str(tiny_folder() / "scene.png"), "--out", str(tmp_path / out)])
    assert done.exit_code == 2
    assert "expected a folder" in done.stderr


def test_names_of_files(tmp_path):
    """Brackets are no markup, and a name that is not UTF-8 gets a report like any other."""
    folder, out = tmp_path / "in", tmp_path / "x["
    folder.mkdir()
    for name in ("b].png", "img[old].png", os.fsdecode(b"a\xff.png")):
        (folder / name).write_bytes((tiny_folder() / "scene.png").read_bytes())
    done = CliRunner().invoke(app, ["explain", str(folder), "--classes", "dog, sky", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out / "img[old]" / "report.html") in done.stderr
    assert len(list(out.glob("*/report.html"))) == 3


def test_earlier_results_are_passed_over(tmp_path):
    """In the folder of the pictures, figures are no pictures; a profile of other pictures is not replaced unasked."""
    for name in ("one.png", "two.png", "three.png", "maps.png"):
        (tmp_path / name).write_bytes((tiny_folder() / "scene.png").read_bytes())

    def explained(*given):
        return CliRunner().invoke(app, ["explain", *map(str, given), "--classes", "dog, sky", "--out", str(tmp_path)])

    assert explained(tmp_path / "one.png", tmp_path / "two.png").exit_code == 0
    profile = (tmp_path / "profile.png").stat().st_mtime_ns
    done = explained(tmp_path)
    assert done.exit_code == 1
    assert {path.parent.name for path in tmp_path.rglob("report.html")} == {"one", "two", "three", "maps"}
    assert len(list(tmp_path.rglob("report.html"))) == 4
    assert "profile.png: exists; --overwrite replaces it" in " ".join(done.stderr.split())
    assert (tmp_path / "profile.png").stat().st_mtime_ns == profile
