"""`refocus` on a model: there and back to the bit, handles, copies, threads, and what it refuses."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from oracles.tower import brute_tower
from refocusing import DEFAULT, NO_DIMS, TOWERS, assert_each_close, assert_each_equal, differs, outputs, refocused
from small_models import pictures, small_clip

import rfclip

pytestmark = pytest.mark.usefixtures("no_grad")


# There and back -------------------------------------------------------------------------------------------------------


def footprint(model):
    attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    return attributes, [(name, id(value)) for name, value in model.named_parameters()]


@pytest.mark.parametrize("way", ["remove", "with", "exception"])
@pytest.mark.parametrize("tower", ["clip", "sequence-first", "custom-block", "next-release"])
def test_back_to_the_bit(tower, way):
    model, images = small_clip(**TOWERS[tower]), pictures()
    state, before, print_before = copy.deepcopy(model.state_dict()), outputs(model, images), footprint(model)
    if way == "remove":
        handle = rfclip.refocus(model, DEFAULT)
        assert differs(model.encode_image(images), before[1])
        handle.remove()
        handle.remove()
    elif way == "with":
        with rfclip.refocus(model, DEFAULT) as handle:
            assert differs(model.encode_image(images), before[1])
            assert_each_equal(model.state_dict().values(), state.values())
            assert list(model.state_dict()) == list(state)
            handle.remove()
            assert_each_equal(outputs(model, images), before)
    else:
        with pytest.raises(ZeroDivisionError), rfclip.refocus(model, DEFAULT):
            model.encode_image(images)
            raise ZeroDivisionError
    assert_each_equal(outputs(model, images), before)
    assert_each_equal(model.state_dict().values(), state.values())
    assert list(model.state_dict()) == list(state)
    assert footprint(model) == print_before
    assert "forward" not in vars(model.visual)


def test_weights_are_shared_and_read_at_each_call(model):
    images = pictures()
    with rfclip.refocus(model, DEFAULT):
        model.load_state_dict(small_clip(seed=1).state_dict())
        assert_each_close(outputs(model, images), brute_tower(small_clip(seed=1), images, DEFAULT))
        model.float()
        assert [part.dtype for part in outputs(model, images)] == [torch.float32] * 2


def test_another_model_is_left_alone(model):
    other, images = small_clip(), pictures()
    before = outputs(other, images)
    with rfclip.refocus(model, DEFAULT):
        assert_each_equal(outputs(other, images), before)
        with rfclip.refocus(other, NO_DIMS):
            assert_each_close(outputs(model, images), brute_tower(model, images, DEFAULT))
            assert_each_close(outputs(other, images), brute_tower(other, images, NO_DIMS))


def test_twice_is_an_error_and_changes_nothing(model):
    images = pictures()
    with rfclip.refocus(model, DEFAULT):
        before = outputs(model, images)
        with pytest.raises(RuntimeError, match="already refocused"):
            rfclip.refocus(model, NO_DIMS)
        assert_each_equal(outputs(model, images), before)
    rfclip.refocus(model, NO_DIMS).remove()


def test_an_old_handle_does_not_undo_a_later_refocus(model):
    old = rfclip.refocus(model, NO_DIMS)
    old.remove()
    with rfclip.refocus(model, DEFAULT):
        old.remove()
        assert_each_close(outputs(model, pictures()), brute_tower(model, pictures(), DEFAULT))


def test_a_forward_patched_by_others_is_kept(model):
    patched = model.visual.forward = lambda images: images
    with pytest.raises(RuntimeError, match="another library"):
        rfclip.refocus(model, DEFAULT)
    assert model.visual.forward is patched


@pytest.mark.parametrize("part", ["model", "visual"])
def test_training_mode_is_an_error(model, part):
    (model if part == "model" else model.visual).train()
    with pytest.raises(RuntimeError, match=r"training mode.*model\.eval\(\)"):
        rfclip.refocus(model, DEFAULT)
    assert "forward" not in vars(model.visual)


@pytest.mark.parametrize("tower", ["clip", "custom-block", "next-release"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_refocused_model(way, tower):
    model, images = small_clip(**TOWERS[tower]), pictures()
    with rfclip.refocus(model, DEFAULT):
        want = outputs(model, images)
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_each_equal(outputs(twin, images), want)  # still refocused when the original is not
    twin.visual.proj.zero_()
    twin.visual.transformer.resblocks[0].attn.in_proj_weight.zero_()
    assert rfclip.dense_features(twin, images).abs().max() == 0
    assert_each_equal(refocused(model, images), want)


def test_a_copied_handle_undoes_its_own_copy(model):
    images, before = pictures(), outputs(model, pictures())
    with rfclip.refocus(model, DEFAULT) as handle:
        twin, twins_handle = copy.deepcopy((model, handle))
        twins_handle.remove()
        assert_each_equal(outputs(twin, images), before)
        assert differs(model.encode_image(images), before[1])


def test_config_none_takes_the_models_own(model):
    model.refocus_config = DEFAULT
    with rfclip.refocus(model):
        assert_each_close(outputs(model, pictures()), brute_tower(model, pictures(), DEFAULT))


@pytest.mark.parametrize("workers", [2, 5])
def test_threads_share_a_refocused_model(model, workers):
    sizes = [(32, 32), (24, 48), (40, 16), (32, 8), (16, 40)][:workers]
    batches = [pictures(count=2, height=h, width=w, seed=w) for h, w in sizes]
    barrier = Barrier(workers)

    def work(images):
        barrier.wait()
        with torch.no_grad():
            return [outputs(model, images) for _ in range(6)]

    with rfclip.refocus(model, DEFAULT):
        want = [outputs(model, images) for images in batches]
        with ThreadPoolExecutor(workers) as pool:
            for results, expected in zip(pool.map(work, batches), want, strict=True):
                for result in results:
                    assert_each_equal(result, expected)


def test_threads_race_to_refocus(model):
    barrier = Barrier(6)

    def work(_):
        barrier.wait()
        try:
            return rfclip.refocus(model, DEFAULT)
        except RuntimeError:
            return None

    with ThreadPoolExecutor(6) as pool:
        handles = [handle for handle in pool.map(work, range(6)) if handle]
    assert len(handles) == 1
    handles[0].remove()
    assert "forward" not in vars(model.visual)


# What it refuses ------------------------------------------------------------------------------------------------------


def test_a_model_whose_config_is_not_known(model):
    with pytest.raises(ValueError, match="config=None.*rfclip calibrate"):
        rfclip.refocus(model)
    model.refocus_config = None  # what load_model leaves on a checkpoint that it does not know
    with pytest.raises(ValueError, match="config=None.*rfclip calibrate"):
        rfclip.refocus(model, None)


@pytest.mark.parametrize("backend", ["cuda", "", None], ids=["cuda", "empty", "none"])
def test_unknown_backend(model, backend):
    with pytest.raises(ValueError, match="backend=.*auto, eager, reference, triton"):
        rfclip.refocus(model, DEFAULT, backend=backend)


def test_backends(model):
    images = pictures()
    with rfclip.refocus(model, DEFAULT, backend="reference"):
        want = outputs(model, images)
    with rfclip.refocus(model, DEFAULT, backend="auto"):
        assert_each_close(outputs(model, images), want)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"distraction_dims": (5, 48)}, ["distraction_dims [48]", "at most 47"]),
        ({"layers": (1, 5, 6)}, ["layers [5, 6]", "4 blocks", "at most 4"]),
    ],
    ids=["dims", "layers"],
)
def test_a_config_that_does_not_fit_the_tower(model, changes, words):
    with pytest.raises(ValueError) as error:
        rfclip.refocus(model, replace(DEFAULT, **changes))
    for word in words:
        assert word in str(error.value)
    assert "forward" not in vars(model.visual)
