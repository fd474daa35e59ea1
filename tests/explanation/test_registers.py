"""Distraction tokens beside outliers: `compare_registers`, its figure, and `rfclip explain --compare registers`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.methods import Plain, softmax, with_register
from PIL import Image
from small_models import DIMS, REGISTERS
from typer.testing import CliRunner

import rfclip
from rfclip import RefocusConfig, RegisterConfig
from rfclip.app.cli import app
from rfclip.explanation import explain, figures
from rfclip.explanation.registers import compare_registers
from rfclip.towers import read_tower
from rfclip.towers.loading import tiny_folder
from rfclip.towers.preprocess import Preprocess

CONFIG = RefocusConfig(DIMS, tau=3.0)

pytestmark = pytest.mark.usefixtures("no_grad")


def last(p, F):
    """Norms of the patches that leave the last block, and what CLS attends to in it, mean over heads."""
    q, k, _ = p.qkv(p.L, F[p.L - 1])
    return np.sqrt((F[p.L] ** 2).sum(axis=1)), softmax(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5)[:, 0].mean(axis=0)


@pytest.mark.parametrize("threshold", [None, 40.0])
def test_the_comparison(model, picture, threshold):
    """Against the tower's own blocks and the oracle's register, its last token; T_dis is that of `explain`."""
    found = compare_registers(model, picture, CONFIG, RegisterConfig(REGISTERS, threshold), short_side=24)
    pixels = Preprocess.of(read_tower(model)).normalized(picture).double()
    p = Plain(model, pixels)
    norms, attention = last(p, p.F)
    limit = 2 * float(torch.tensor(norms[1:]).median()) if threshold is None else threshold
    assert found.threshold == pytest.approx(limit, rel=1e-5)
    moved_norms, moved = last(p, with_register(p, REGISTERS).F)
    np.testing.assert_allclose(found.norms, [norms[1:], moved_norms[1:-1]], rtol=1e-5)
    np.testing.assert_allclose(found.attention[:2], [attention[1:], moved[1:-1]], rtol=1e-4, atol=1e-7)
    assert found.register == pytest.approx(moved[-1], rel=1e-4)
    assert np.array_equal(found.outliers, found.norms > limit) and found.outliers[0].any()
    seen = explain(model, picture, CONFIG, short_side=24, layers=[4])
    assert np.array_equal(found.distraction, seen.distraction.any(axis=0)) and found.distraction.any()
    np.testing.assert_allclose(found.attention[2], seen.after.attention[4][0, 1:], rtol=1e-4, atol=1e-7)
    assert "forward" not in vars(model.visual)


def test_the_numbers(model, picture):
    found = compare_registers(model, picture, CONFIG, short_side=24)
    distraction, (before, after) = found.distraction, found.outliers
    both, either = set(np.flatnonzero(distraction)) & set(np.flatnonzero(before)), distraction | before
    numbers = json.loads(found.to_json())
    assert numbers["overlap"] == len(both) / either.sum()
    for name, tokens in (("distraction", distraction), ("outliers", before), ("outliers_with_registers", after)):
        assert numbers[name]["count"] == tokens.sum()
        for row, who in enumerate(("plain", "registers", "refocused")):
            assert numbers[name]["cls_attention"][who] == pytest.approx(found.attention[row][tokens].sum())
    empty = replace(found, distraction=np.zeros(15, bool), outliers=np.zeros((2, 15), bool))
    assert empty.overlap is None and empty.numbers()["overlap"] is None


def test_the_tint_is_on_the_tokens(model, picture):
    found = compare_registers(model, picture, CONFIG, short_side=24)
    figure = figures.draw_registers(found)
    assert len(figures.png(figure)) > 1000
    plain = np.asarray(found.image.convert("L").convert("RGB")).astype(int)
    panels = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    for panel, mask, channel in ((0, found.distraction, 0), (1, found.outliers[0], 2), (5, found.outliers[1], 2)):
        tint = (panels[panel][..., :3].astype(int) - plain).reshape(3, 8, 5, 8, 3).mean(axis=(1, 3)).reshape(15, 3)
        assert (tint[mask].argmax(axis=1) == channel).all()
        assert not tint[~mask].any()
    nothing = replace(found, distraction=np.zeros(15, bool), outliers=np.zeros((2, 15), bool))
    assert "overlap" not in figures.draw_registers(nothing).axes[0].get_title()


def test_the_command(tmp_path):
    """With simulated distraction, both explanations name the same patches, and the register takes what makes them."""
    scene, out = str(tiny_folder() / "scene.png"), tmp_path / "out"
    given = ["explain", scene, "--layers", "6", "--out", str(out), "--inject-distraction", "0.1", "-c", "dog, grass"]
    done = CliRunner().invoke(app, [*given, "--compare", "registers"])
    assert done.exit_code == 0, done.output
    numbers = json.loads((out / "scene/registers.json").read_text())
    assert (numbers["distraction"]["count"], numbers["outliers"]["count"], numbers["overlap"]) == (20, 20, 1.0)
    assert numbers["outliers_with_registers"]["count"] == 0
    assert Image.open(out / "scene/registers.png").width > 500
    assert "test-time registers take" in (out / "scene/report.html").read_text()


def test_what_the_command_refuses(tmp_path):
    scene, file = str(tiny_folder() / "scene.png"), tmp_path / "registers.json"
    file.write_text("{}")
    for given, said in (
        (["--registers", str(file)], "it is for the method registers"),
        (["--compare", "registers", "--registers", str(file)], '"neurons"'),
    ):
        done = CliRunner().invoke(app, ["explain", scene, *given, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2 and said in done.output
    assert not (tmp_path / "out").exists()
    model = rfclip.load_model()
    model.register_config = None
    with pytest.raises(ValueError, match="find them with `rfclip registers"):
        compare_registers(model, scene)
