"""Test-time registers: the method under every last block, and the search for its neurons."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from helpers import relative_error
from oracles.methods import FORMULAS, Plain, softmax, with_register
from small_models import REGISTERS, pictures, small_clip, to_hugging_face

import rfclip
from rfclip import RegisterConfig
from rfclip.methods import METHODS
from rfclip.registers import find_registers
from rfclip.simulated_distraction import inject_distraction, injected_registers
from rfclip.tiny.scenes import make_scene

pytestmark = pytest.mark.usefixtures("no_grad")

READOUTS = [name for name, card in METHODS.items() if not (card.configured or card.registers or card.sees_images)]


def tower(layers=12, **options):
    return small_clip(layers=layers, image_size=56, **options)


def features(model, images, registers, backend="auto"):
    with rfclip.refocus(model, method="registers", registers=registers, backend=backend):
        return rfclip.dense_features(model, images)


def formula(model, images, readout, per_neuron):
    """By formulas that do not name a place of CLS, which the oracle's register, its last token, would lack."""
    found = []
    for image in images:
        p = with_register(Plain(model, image), REGISTERS, per_neuron)
        z = torch.from_numpy(FORMULAS[readout](p)[1:-1])
        found.append((model.visual.ln_post(z) @ model.visual.proj).T.reshape(-1, *p.grid))
    return torch.stack(found)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("size", [(56, 56), (24, 80), (8, 8)], ids=str)
@pytest.mark.parametrize("readout", ["clip", "maskclip", "sclip", "clearclip", "cliptrase", "clip-surgery", "itaclip"])
def test_the_formula_under_other_last_blocks(readout, size, per_neuron, backend):
    images, registers = pictures(count=2, height=size[0], width=size[1]), RegisterConfig(REGISTERS, None, readout)
    got = features(tower(), images, dataclasses.replace(registers, per_neuron=per_neuron), backend)
    assert relative_error(got, formula(tower(), images, readout, per_neuron)) < 1e-10


def test_one_number_and_one_for_each_neuron_differ():
    images = pictures(count=1, height=56, width=56)
    one, each = (features(tower(), images, RegisterConfig(REGISTERS, per_neuron=which)) for which in (False, True))
    assert relative_error(one, each) > 1e-6


@pytest.mark.parametrize("readout", READOUTS)
def test_a_batch_equals_its_images_one_by_one(readout):
    model, images = tower(), pictures(count=3, height=40, width=56)
    with rfclip.refocus(model, method="registers", registers=RegisterConfig(REGISTERS, None, readout)):
        whole = rfclip.dense_features(model, images), model.encode_image(images)
        singles = [(rfclip.dense_features(model, image[None]), model.encode_image(image[None])) for image in images]
    for got, want in zip(whole, map(torch.cat, zip(*singles, strict=True)), strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize(
    "options", [{}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}], ids=str
)
def test_the_image_embedding(options):
    """The register is dropped before tokens are pooled."""
    model, images = tower(**options), pictures(height=40, width=56)
    with rfclip.refocus(model, method="registers"):
        got = model.encode_image(images)
    tokens = [with_register(Plain(model, image), REGISTERS).F[-1][:-1] for image in images]
    pooled, _ = model.visual._pool(torch.from_numpy(np.stack(tokens)))
    assert relative_error(got, pooled @ model.visual.proj) < 1e-12


def test_hugging_faces_tower():
    images = pictures(height=40, width=56)
    want = features(tower(), images, RegisterConfig(REGISTERS, None, "clearclip"))
    got = features(to_hugging_face(tower()), images, RegisterConfig(REGISTERS, None, "clearclip"))
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("readout", ["clearclip", "kk-mean"])
def test_without_neurons_it_is_its_readout(readout):
    model, images = tower(), pictures(height=40, width=56)
    got = features(model, images, RegisterConfig((), None, readout))
    assert torch.equal(got, rfclip.dense_features(model, images, method=readout))


def test_nothing_of_the_model_changes():
    model, images = tower(), pictures(height=56, width=56)
    before, state = model.encode_image(images), {name: value.clone() for name, value in model.state_dict().items()}
    features(model, images, None)
    assert torch.equal(model.encode_image(images), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_gradients_reach_the_images():
    model, images = tower(layers=4), pictures(count=1, height=16, width=16)
    with torch.enable_grad(), rfclip.refocus(model, method="registers"):

        def total(x):
            return rfclip.dense_features(model, x).square().mean()

        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total(x), x)
        direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        step = 1e-6 * direction
        change = (total((images + step).requires_grad_()) - total((images - step).requires_grad_())) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(change.item(), rel=1e-5)


# What is refused


def test_refusals():
    model = tower(layers=4)
    for neurons, said in (
        (((5, 0),), "unit 0 of block 5 does not exist: this tower has 4 blocks"),
        (((1, 96),), "unit 96 of block 1 does not exist: this tower has 96 hidden units"),
    ):
        with pytest.raises(ValueError, match=said):
            rfclip.refocus(model, method="registers", registers=RegisterConfig(neurons))
    for readout in ("rf-clip", "registers", "proxyclip", "lseg"):
        with pytest.raises(ValueError, match=f"readout='{readout}': expected one of clip, maskclip"):
            rfclip.refocus(model, method="registers", registers=RegisterConfig(REGISTERS, None, readout))
    with pytest.raises(ValueError, match="method 'sc-clip' needs 11 blocks"):
        rfclip.refocus(model, method="registers", registers=RegisterConfig(REGISTERS, None, "sc-clip"))
    with pytest.raises(ValueError, match="method 'kk' has no registers"):
        rfclip.refocus(model, method="kk", registers=RegisterConfig(REGISTERS))
    with pytest.raises(ValueError, match="got dict, expected a RegisterConfig"):
        rfclip.refocus(model, method="registers", registers={"neurons": REGISTERS})
    model.register_config = None
    with pytest.raises(ValueError, match="are not known: find them with `rfclip registers"):
        rfclip.refocus(model, method="registers")
    assert "forward" not in vars(model.visual)
    with rfclip.refocus(model, method="kk"), pytest.raises(ValueError, match="already refocused"):
        rfclip.Segmenter(model, registers=RegisterConfig(REGISTERS), tokenizer=lambda texts: None)


def test_an_mlp_that_shows_no_activations():
    model = tower(layers=2)
    model.visual.transformer.resblocks[1].mlp = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.GELU()).double()
    with pytest.raises(ValueError, match=r"hidden activations .*Linear, GELU.* expected two linear layers"):
        rfclip.refocus(model, method="registers")


@pytest.mark.parametrize(
    "fields",
    [
        *({"neurons": neurons} for neurons in (3, "12", [1], [[0, 1]], [[1, -1]], [[1, 2, 3]], [[1, 2.0]])),
        *({"neurons": neurons} for neurons in ([[1, True]], [[1, 2], [1, 2]], ["12"], {"1": 2}, None)),
        *({"neurons": [], "threshold": threshold} for threshold in (0, -1, "30", True, float("nan"))),
        {"neurons": [], "readout": 3},
        {"neurons": [], "per_neuron": 1},
    ],
    ids=str,
)
def test_settings_that_are_none(fields):
    with pytest.raises(ValueError, match=rf"^{list(fields)[-1]}=.*expected"):
        RegisterConfig(**fields)


def test_settings_as_json():
    config = RegisterConfig(((3, 1), (1, 2)), 30.0, "kk", True)
    assert config.neurons == ((1, 2), (3, 1))
    assert RegisterConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["neurons"] == [[1, 2], [3, 1]]
    assert RegisterConfig.from_json('{"neurons": []}') == RegisterConfig(())
    for text, said in (("{", "must be JSON"), ("[]", '"neurons"'), ('{"neurons": [], "dims": 1}', "unknown .*: dims")):
        with pytest.raises(ValueError, match=said):
            RegisterConfig.from_json(text)


# The search


def scores(model, images, threshold, blocks):
    """Every neuron's score, image by image and token by token, and how many images and tokens count."""
    total, counted, outliers = np.zeros((blocks, 96)), 0, 0
    for image in images:
        p = Plain(model, image)
        norms = [np.sqrt((token**2).sum()) for token in p.F[p.L]]
        limit = 2 * float(torch.tensor(norms[1:]).median()) if threshold is None else threshold
        over = [i for i, norm in enumerate(norms) if norm > limit]
        if not over:
            continue
        counted, outliers = counted + 1, outliers + len(over)
        for n in range(1, blocks + 1):
            q, k, v = p.qkv(n, p.F[n - 1])
            u = p.F[n - 1] + p.out(n, softmax(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5) @ v)
            h = p.block(n).mlp[:2](p.block(n).ln_2(torch.from_numpy(u))).numpy()
            for unit in range(96):
                if sum(value < 0.5 for value in h[:, unit]) >= len(h) / 2:
                    total[n - 1, unit] += np.mean([abs(h[i, unit]) for i in over])
    return total / max(1, counted), counted, outliers


@pytest.mark.parametrize("threshold, blocks", [(None, None), (60.0, 4), (25.0, 1)])
def test_the_search_against_loops(threshold, blocks):
    model, images = small_clip(), pictures(count=5, height=24, width=40, bright=0.3)
    images[3] = pictures(count=1, height=24, width=40, bright=0)[0]  # no outlier at the higher thresholds
    want, counted, outliers = scores(model, images, threshold, blocks or 2)
    best = sorted(((want[b, u], (b + 1, u)) for b, u in np.ndindex(want.shape)), reverse=True)[:10]
    found = find_registers(model, images, threshold=threshold, blocks=blocks)
    assert found.config == RegisterConfig(tuple(neuron for _, neuron in best), threshold)
    assert dict(zip(found.config.neurons, found.scores, strict=True)) == pytest.approx({n: s for s, n in best})
    assert (found.images, found.with_outliers, found.outliers) == (5, counted, outliers)
    assert counted > 0 and (counted < 5 or threshold == 25)
    assert f"{outliers} outliers in {counted} of them" in found.report()
    assert report_order(found) == [neuron for _, neuron in best]
    batches = find_registers(model, iter(images.split(2)), threshold=threshold, blocks=blocks)
    assert batches.config == found.config


def report_order(found):
    return [(int(b), int(u)) for b, u in re.findall(r"(\d+):(\d+) \(", found.report())]


def test_planted_neurons_are_found():
    """Red makes unit 0 fire from block 1 on, and green unit 1 from block 2 on."""
    for colour, neuron in ((0, (1, 0)), (1, (2, 1))):
        found = find_registers(small_clip(), pictures(bright=0.3, colours=(colour,)), count=1)
        assert found.config.neurons == (neuron,)


def test_a_model_without_outliers():
    found = find_registers(small_clip(planted=False), pictures(bright=0))
    assert found.config == RegisterConfig(())
    assert (found.outliers, found.with_outliers, found.scores) == (0, 0, ())
    assert "has no outliers: registers change nothing here" in found.report()
    assert f"{found.largest[1]:.1f}" in found.report()


def test_the_search_looks_at_the_plain_blocks():
    model, images = small_clip(), pictures(bright=0.3)
    want = find_registers(model, images)
    with rfclip.refocus(model, method="registers"):
        assert find_registers(model, images) == want


def test_what_the_search_refuses():
    model, images = small_clip(), pictures()
    for options, said in (
        ({"blocks": 5}, "blocks=5: expected 1 to 4"),
        ({"blocks": 0}, "blocks=0"),
        ({"count": 0}, "count=0"),
        ({"threshold": 0}, "threshold=0"),
    ):
        with pytest.raises(ValueError, match=said):
            find_registers(model, images, **options)
    with pytest.raises(ValueError, match="at least one"):
        find_registers(model, [])
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        find_registers(model, images)


# With simulated distraction


def test_the_search_finds_the_neuron_that_injects():
    model = rfclip.load_model()
    images = torch.stack([model.preprocess(make_scene((1, 0, number)).picture()) for number in range(4)])
    assert find_registers(model, images).config == model.register_config == RegisterConfig(())
    with inject_distraction(model, 0.1):
        found = find_registers(model, images, count=1)
    assert found.config == injected_registers(model)
    assert found.outliers == 4 * 20


def test_the_register_takes_what_is_injected():
    """Patches are then those of a tower without injection, up to what they learn of the register."""
    model = rfclip.load_model()
    images = torch.stack([model.preprocess(make_scene((1, 0, number)).picture()) for number in range(2)])
    clean = rfclip.dense_features(model, images, method="kk-mean")
    with inject_distraction(model, 0.1, attraction=0):
        hurt = rfclip.dense_features(model, images, method="kk-mean")
        mended = features(model, images, injected_registers(model))
    assert relative_error(mended, clean) < 0.5 * relative_error(hurt, clean)
