"""The figures and sentences of an explanation, and `rfclip explain`, which writes them."""

import base64
import io
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from helpers import linux_only
from PIL import Image
from typer.testing import CliRunner

from rfclip import RefocusConfig
from rfclip.app.cli import app
from rfclip.explanation import explain, figures
from rfclip.explanation.explanation import busiest
from rfclip.segment.result import Segmentation
from rfclip.towers.loading import tiny_folder

NAMES = {"overview", "attention", "matrices", "profile", "tokens", "maps"}
BRIEF = ("--classes", "tiger, sky", "--layers", "4", "--points", "30,40")  # of few and small figures


@pytest.mark.parametrize("layers", [[2], [1, 2, 3, 4]], ids=len)
def test_every_figure_is_drawn(seen, model, picture, layers):
    found = seen(model, picture, layers=layers)
    drawn = {name: figures.png(figure) for name, figure in figures.draw(found).items()}
    assert set(drawn) == NAMES
    for data in drawn.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 5


def test_the_tint_is_on_the_tokens(seen, model, picture):
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


def test_columns_are_aligned_and_have_colour_bars(seen, model, picture):
    """Each row's pictures lie at one height and are as large; a bar's ends are the values of its colours."""
    found = seen(model, picture, layers=[1, 3])
    segmented = Segmentation(
        Image.new("RGB", (100, 61)), np.arange(61 * 100, dtype=np.uint8).reshape(61, 100) % 2, ("a", "b")
    )
    found = replace(found, segmentations=dict.fromkeys(("clip", "kk-mean", "rf-clip"), segmented))
    for name, bars in (("overview", 2), ("attention", 2 * len(found.points)), ("matrices", 2), ("segmentation", 0)):
        figure = figures.draw(found)[name]
        figures.png(figure)  # which lays it out
        panels = [ax for ax in figure.axes if ax.images]
        places = np.array([ax.get_position().bounds for ax in panels])
        assert len({tuple(size) for size in places[:, 2:].round(4)}) == 1
        for place in places:
            assert (np.isclose(places[:, 1], place[1], atol=1e-3)).sum() == len(set(places[:, 0].round(3)))
        assert len(figure.axes) - len(panels) == bars
    block = busiest(found.moved, found.distraction) - 1
    axes = figures.draw_overview(found).axes
    bar = next(ax for ax in axes if not ax.images)
    assert bar.get_xlim() == pytest.approx((0, np.quantile(found.before.received[block], 0.99)))
    said = [float(ax.get_xlabel().split(" %")[0]) for ax in axes if "distraction" in ax.get_xlabel()]
    tokens = found.distraction[block]
    assert said == pytest.approx([100 * view.received[block][tokens].sum() for view in found.views], abs=0.051)


@pytest.mark.parametrize("colours, low, high", [("magma", 0, 2), ("PiYG", -3, 3)])
def test_a_bars_colours_are_those_of_the_map(seen, model, picture, colours, low, high):
    """On average over the picture, whose mean is a middle gray."""
    found = seen(model, picture, layers=[3])
    gray = replace(found, image=Image.new("RGB", found.image.size, (128, 128, 128)))
    scale = figures.Scale(colours, low, high)
    for value in (low, 0.3 * high, high):
        shown = np.asarray(scale.over(gray, np.full(found.grid, value).ravel()))[0, 0]
        assert shown == pytest.approx(255 * np.array(scale.mappable().to_rgba(value)[:3]), abs=2)


def test_a_map_of_nothing_has_no_scale():
    assert figures.Scale.around_zero("PiYG", np.full(4, np.nan)) is None
    assert figures.Scale.around_zero("PiYG", np.zeros(4)) is None
    assert figures.Scale.around_zero("PiYG", np.array([1, -2])) == figures.Scale("PiYG", -2, 2)


def test_the_sentences(seen, model, picture):
    """Their numbers are those of the arrays, in the block that moves most; where nothing is found, they say so."""
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


# The command ----------------------------------------------------------------------------------------------------------


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
        (["--points", "a,b"], "--points a,b: expected X,Y"),
        (["--layers", "1;2"], "--layers 1;2: expected numbers"),
        (["--layers", "9"], "numbers from 1 to 6"),
        (["--points", "500,3"], "outside the picture"),
        (["--inject-distraction", "2"], "--inject-distraction"),
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


@linux_only
def test_names_of_files(tmp_path):
    """Brackets are not markup, and a name that is not UTF-8 gets a report like any other."""
    folder, out = tmp_path / "in", tmp_path / "x["
    folder.mkdir()
    for name in ("b].png", "img[old].png", os.fsdecode(b"a\xff.png")):
        (folder / name).write_bytes((tiny_folder() / "scene.png").read_bytes())
    done = CliRunner().invoke(app, ["explain", str(folder), *BRIEF, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out / "img[old]" / "report.html") in done.stderr
    assert len(list(out.glob("*/report.html"))) == 3


def test_earlier_outputs_are_skipped(tmp_path):
    """Figures of earlier runs do not count as pictures; a profile of other pictures is only replaced on demand."""
    for name in ("one.png", "two.png", "three.png", "maps.png"):
        (tmp_path / name).write_bytes((tiny_folder() / "scene.png").read_bytes())

    def explained(*given):
        return CliRunner().invoke(app, ["explain", *map(str, given), *BRIEF, "--out", str(tmp_path)])

    assert explained(tmp_path / "one.png", tmp_path / "two.png").exit_code == 0
    profile = (tmp_path / "profile.png").stat().st_mtime_ns
    done = explained(tmp_path)
    assert done.exit_code == 1
    assert {path.parent.name for path in tmp_path.rglob("report.html")} == {"one", "two", "three", "maps"}
    assert len(list(tmp_path.rglob("report.html"))) == 4
    assert "profile.png: exists; --overwrite replaces it" in " ".join(done.stderr.split())
    assert (tmp_path / "profile.png").stat().st_mtime_ns == profile
