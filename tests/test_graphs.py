"""The graphs of a refocused tower: when they are captured, replayed, dropped and left alone.

No GPU is needed. In place of CUDA graphs there are tapes, which also hold what they record to the memory that it used:
a tape sees a weight that is changed in place, and goes on with the old one where it is exchanged.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import numpy as np
import pytest
import torch
from miniatures import SCENE
from PIL import Image
from refocusing import DEFAULT, differs
from small_models import pictures, small_clip, to_hugging_face
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import rfclip
from rfclip.graphs import PATIENCE, SHAPES, Graphs, Recording, Snapshot
from rfclip.methods.base import Method
from rfclip.plugin import installed
from rfclip.towers import read_tower

pytestmark = pytest.mark.usefixtures("no_grad")
every_method = pytest.mark.parametrize("method", ["clip", "naclip", "kk-mean", "sclip"])  # none branches on values


def in_place(tree):
    """The same tensors by other objects, which keep the memory that they have now."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


class Tape(TorchDispatchMode):
    """The operations that run under it, to be run again on the same memory."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = in_place((args, kwargs or {}))
        out = function(*args, **(kwargs or {}))
        self.steps.append((function, *given, in_place(out)))
        return out

    @torch.inference_mode()  # which a device knows nothing of
    def replay(self):
        for function, args, kwargs, before in self.steps:
            for old, new in zip(tree_leaves(before), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """What `rfclip.graphs.Pool` is to CUDA graphs. It counts, and refuses two turns at a time."""

    device_type = "cpu"
    recorded = replayed = drained = 0
    taken = False

    def __init__(self, device):
        assert device.type == "cpu"

    def record(self, function, x):
        tape = Tape()
        with torch.inference_mode(False):
            given = torch.empty_like(x)
        given.copy_(x)
        with tape:
            result = function(given)
        type(self).recorded += 1
        return Recording(self, given, result, tape.replay)

    @contextmanager
    def turn(self, device):
        assert not self.taken
        self.taken = True
        yield
        type(self).replayed += 1
        self.taken = False

    def drain(self):
        assert not self.taken
        type(self).drained += 1


@pytest.fixture
def tapes(monkeypatch):
    class Counted(Tapes):
        pass

    monkeypatch.setattr(Graphs, "pool_type", Counted)
    monkeypatch.setattr(Method, "capturable", True)
    return Counted


def eager(model, images, method="naclip"):
    """The features of a copy, refocused anew and without graphs."""
    twin = copy.deepcopy(model)
    vars(twin.visual).pop("forward", None)
    with rfclip.refocus(twin, method=method, cuda_graphs=False):
        return rfclip.dense_features(twin, images)


@every_method
def test_a_replay_equals_a_call(model, tapes, method):
    first, second = pictures(seed=0), pictures(seed=1)
    want = [eager(model, images, method) for images in (first, second)]
    assert differs(*want)
    with rfclip.refocus(model, method=method):
        got = [rfclip.dense_features(model, images) for images in (first, second, first)]
        with torch.inference_mode():
            got.append(rfclip.dense_features(model, second))
        got.append(rfclip.dense_features(model, first))
    for features, expected in zip(got, [*want, *want, want[0]], strict=True):  # none is overwritten by a later one
        assert torch.equal(features, expected)
        assert features.stride() == expected.stride()
    assert not got[-1].is_inference()
    assert (tapes.recorded, tapes.replayed) == (1, 4)


def test_captured_in_inference_mode_replayed_in_any(model, tapes):
    want = eager(model, pictures())
    with rfclip.refocus(model, method="naclip"):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                got = rfclip.dense_features(model, pictures())
            assert torch.equal(got, want)
            assert got.is_inference() == (mode is torch.inference_mode)
    assert (tapes.recorded, tapes.replayed) == (1, 2)


# Weights that change --------------------------------------------------------------------------------------------------


def set_in_place(visual):
    visual.transformer.resblocks[1].mlp.c_fc.weight.mul_(1.5)


def load(visual):
    visual.load_state_dict(small_clip(seed=1).visual.state_dict())


def half(visual):
    visual.half()


def there_and_back(visual):
    visual.half().double()


def set_data(visual):
    weight = visual.transformer.resblocks[0].attn.out_proj.weight
    weight.data = 2 * weight.data


def transpose_data(visual):
    weight = visual.transformer.resblocks[0].attn.out_proj.weight
    weight.data = weight.data.t()  # the same memory, shape and dtype


def new_parameter(visual):
    visual.proj = nn.Parameter(-visual.proj)


def no_bias(visual):
    visual.transformer.resblocks[0].mlp.c_fc.bias = None


def setting(visual):
    visual.ln_post.eps = 0.5


def other_class(visual):
    visual.transformer.resblocks[2].mlp.gelu.__class__ = nn.Tanh


def own_forward(visual):
    visual.transformer.resblocks[0].mlp.c_proj.forward = lambda x: 0 * x[..., :48]


def hook(visual):
    visual.transformer.resblocks[0].mlp.c_proj.register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook(visual):
    visual.ln_post.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


CHANGES = {  # whether the graph goes on, whether the tower can have another, and the replays until it is noticed
    set_in_place: (True, True, 0),
    load: (True, True, 0),
    half: (False, True, 0),
    there_and_back: (False, True, 0),
    set_data: (False, True, 0),
    transpose_data: (False, True, 0),
    new_parameter: (False, True, 0),
    no_bias: (False, True, 0),
    setting: (False, True, 1),  # which reads memory that is still there, and whose result is thrown away
    other_class: (False, True, 1),
    own_forward: (False, False, 1),
    hook: (False, False, 1),
    pre_hook: (False, False, 1),
}
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@every_change
def test_a_change_is_seen(model, tapes, change):
    goes_on, another, in_vain = CHANGES[change]
    images, before = pictures(), eager(model, pictures())
    with rfclip.refocus(model, method="naclip"):
        for _ in range(2):
            assert torch.equal(rfclip.dense_features(model, images), before)
        change(model.visual)
        want = eager(model, images)
        assert not torch.equal(before, want)
        for _ in range(3):
            assert torch.equal(rfclip.dense_features(model, images), want)
    assert tapes.recorded == (1 if goes_on or not another else 2)
    assert tapes.replayed == (4 if goes_on else (3 if another else 1) + in_vain)


@pytest.mark.parametrize("change", [change for change, (goes_on, *_) in CHANGES.items() if not goes_on])
def test_a_tape_that_is_kept_does_not_see_it(model, tapes, monkeypatch, change):
    """So that the test above shows what the comparison is for."""
    monkeypatch.setattr(Snapshot, "lies", lambda seen: True)
    monkeypatch.setattr(Snapshot, "holds", lambda seen, tower: True)
    images = pictures()
    with rfclip.refocus(model, method="naclip"):
        before = rfclip.dense_features(model, images)
        patches = installed(model).tower.patches(images)
        change(model.visual)
        assert torch.equal(installed(model).dense(patches), before)


READINGS = {
    "dtype": lambda data: data.view(torch.int64),
    "transposed": torch.t,
    "shape": lambda data: data.view(24, 96),
    "less": lambda data: data[:47],
    "expanded": lambda data: data[:1].expand(48, 48),
}


@pytest.mark.parametrize("reading", READINGS)
def test_the_same_memory_read_in_another_way(model, reading):
    tower, weight = read_tower(model), model.visual.transformer.resblocks[0].attn.out_proj.weight.requires_grad_(False)
    seen, place = Snapshot(tower), weight.data_ptr()
    assert seen.lies()
    weight.data = READINGS[reading](weight.data)
    assert weight.data_ptr() == place
    assert seen.holds(tower)
    assert not seen.lies()


def test_the_projection_of_hugging_faces_model(tapes):
    model = to_hugging_face(small_clip())
    with rfclip.refocus(model, method="naclip"):
        before = [rfclip.dense_features(model, pictures()) for _ in range(2)][1]
        model.visual_projection = copy.deepcopy(model.visual_projection)
        model.visual_projection.weight.neg_()
        assert torch.equal(rfclip.dense_features(model, pictures()), -before)
    assert (tapes.recorded, tapes.replayed) == (2, 2)  # the last one in vain


def test_a_global_hook(model, tapes):
    with rfclip.refocus(model, method="naclip"):
        before = rfclip.dense_features(model, pictures())
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        assert torch.equal(rfclip.dense_features(model, pictures()), before)
        handle.remove()
    assert model.visual.ln_post in seen
    assert (tapes.recorded, tapes.replayed) == (1, 1)  # in vain


class Scaled(torch.Tensor):
    """A tensor whose memory is not all there is to it."""


@pytest.mark.parametrize("strange", ["module", "weight"])
def test_what_is_not_the_librarys_own_runs_without(model, tapes, strange):
    if strange == "module":
        model.visual.transformer.resblocks[0].mlp.gelu = type("Adapter", (nn.GELU,), {})()
    else:
        model.visual.proj = nn.Parameter(model.visual.proj.data.as_subclass(Scaled))
    with rfclip.refocus(model, method="naclip"):
        assert torch.equal(*(rfclip.dense_features(model, pictures()) for _ in range(2)))
    assert tapes.recorded == 0


# Shapes, memory and threads -------------------------------------------------------------------------------------------


def test_the_number_of_shapes_is_bounded(model, tapes):
    """The graph that was not used for longest makes way, and only from time to time, since a capture takes long."""
    sizes = [8 * (2 + number) for number in range(SHAPES + 2)]
    batches = [pictures(count=1, width=size) for size in sizes]
    want = [eager(model, images) for images in batches]

    def run(number):
        recorded, replayed = tapes.recorded, tapes.replayed
        assert torch.equal(rfclip.dense_features(model, batches[number]), want[number])
        return tapes.recorded - recorded, tapes.replayed - replayed

    with rfclip.refocus(model, method="naclip"):
        assert [run(number) for number in range(SHAPES)] == SHAPES * [(1, 0)]
        assert run(0) == (0, 1)  # from now on the second is the one not used for longest
        found = [run(SHAPES + number % 2) for number in range(PATIENCE)]
        assert found == (PATIENCE - 1) * [(0, 0)] + [(1, 0)]
        assert tapes.drained == 1
        assert run(SHAPES + (PATIENCE - 1) % 2) == (0, 1)
        assert [run(number) for number in range(SHAPES)] == [(0, 1), (0, 0), *(SHAPES - 2) * [(0, 1)]]
        assert len(installed(model).graphs._recordings) == SHAPES


def test_removing_drops_them_and_copies_have_none(model, tapes):
    handle = rfclip.refocus(model, method="naclip")
    method = installed(model)
    want = rfclip.dense_features(model, pictures())
    twin = copy.deepcopy(model)
    assert len(method.graphs._recordings) == 1
    assert not installed(twin).graphs._recordings
    handle.remove()
    assert not method.graphs._recordings
    assert tapes.drained == 1
    twin.visual.proj.neg_()
    for _ in range(2):
        assert torch.equal(rfclip.dense_features(twin, pictures()), -want)
    assert tapes.recorded == 2


def test_threads_take_turns(model, tapes):
    sizes = [(32, 32), (24, 48), (40, 16), (32, 8)]
    batches = [pictures(count=2, height=height, width=width) for height, width in sizes]
    want = [eager(model, images) for images in batches]
    barrier = Barrier(2 * len(sizes))

    def work(number):
        barrier.wait()
        with torch.no_grad():
            return [rfclip.dense_features(model, batches[number % len(sizes)]) for _ in range(5)]

    with rfclip.refocus(model, method="naclip"), ThreadPoolExecutor(2 * len(sizes)) as pool:
        for number, results in enumerate(pool.map(work, range(2 * len(sizes)))):
            for features in results:
                assert torch.equal(features, want[number % len(sizes)])
    assert (tapes.recorded, tapes.replayed) == (len(sizes), 9 * len(sizes))


# Where none is captured -----------------------------------------------------------------------------------------------


SITUATIONS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_it_runs_without(tapes, situation):
    model, images = small_clip(dtype=torch.float32), pictures().float()
    images.requires_grad_(situation == "gradients")
    with rfclip.refocus(model, method="naclip"):
        rfclip.dense_features(model, images.detach())
        with SITUATIONS[situation]() as mode:
            features = rfclip.dense_features(model, images)
    assert (tapes.recorded, tapes.replayed) == (1, 0)
    assert features.requires_grad == (situation == "gradients")
    if situation == "a dispatch mode":
        assert mode.get_total_flops() > 0


def test_it_is_not_asked_for(model, tapes):
    with rfclip.refocus(model, method="naclip", cuda_graphs=False):
        rfclip.dense_features(model, pictures())
    rfclip.dense_features(model, pictures(), method="naclip")  # this once
    assert tapes.recorded == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compilers_see_none_of_it(model, tapes):
    with rfclip.refocus(model, method="naclip"):
        want = rfclip.dense_features(model, pictures())
        compiled = torch.compile(rfclip.dense_features, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(model, pictures()), want)
    assert (tapes.recorded, tapes.replayed) == (1, 0)


def test_only_the_kernels_without_a_draw_on_the_host_are_captured(model):
    random = rfclip.RefocusConfig(DEFAULT.distraction_dims, tokens="random")
    for config, backend in ((DEFAULT, "eager"), (DEFAULT, "reference"), (random, "eager")):
        with rfclip.refocus(model, config, backend=backend):
            method = installed(model)
            assert not method.capturable
            method._chosen = *method._chosen[:2], type("Kernels", (), {"name": "triton"})
            assert method.capturable == (config is DEFAULT)


def test_a_capture_that_fails_is_told_once(model, tapes, monkeypatch):
    def record(pool, function, x):
        try:
            raise RuntimeError("no such launch\nand more")
        finally:
            raise ValueError("the capture is broken")

    monkeypatch.setattr(tapes, "record", record)
    images, others = pictures(), pictures(count=1)
    want = eager(model, images), eager(model, others)
    with rfclip.refocus(model, method="naclip"):
        message = r"\(ValueError: the capture is broken, after RuntimeError: no such launch\).*cuda_graphs=False"
        with pytest.warns(UserWarning, match=message) as told:
            assert torch.equal(rfclip.dense_features(model, images), want[0])
        assert len(told) == 1
        assert told[0].filename == __file__
        monkeypatch.undo()  # it would work now, and is not tried for this shape
        monkeypatch.setattr(Graphs, "pool_type", tapes)
        monkeypatch.setattr(Method, "capturable", True)
        for _ in range(2):
            assert torch.equal(rfclip.dense_features(model, images), want[0])
            assert torch.equal(rfclip.dense_features(model, others), want[1])
    assert (tapes.recorded, tapes.replayed) == (1, 1)


def test_an_error_of_the_call_is_no_failed_capture(model, tapes):
    with rfclip.refocus(model, method="naclip"):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                installed(model).dense(torch.zeros(1, 7, 4, 4, dtype=torch.float64))
        model.train()
        with pytest.raises(RuntimeError, match="training mode"):
            rfclip.dense_features(model, pictures())
    assert tapes.recorded == 0


# The segmenter --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:rfclip-tiny")
@pytest.mark.parametrize("graphs", [True, False])
def test_a_segmenter(tapes, graphs):
    picture, turned = Image.fromarray(SCENE.image[:130]), Image.fromarray(SCENE.image[129::-1].copy())
    names = ["dog", "cactus, octopus", "sky"]
    with rfclip.Segmenter(method="naclip", cuda_graphs=False) as segmenter:
        want = [segmenter(each, names, probabilities=True) for each in (picture, turned)]
    with rfclip.Segmenter(method="naclip", cuda_graphs=graphs) as segmenter:
        for each, expected in zip((picture, turned, picture), [*want, want[0]], strict=True):
            found = segmenter(each, names, probabilities=True)
            np.testing.assert_array_equal(found.labels, expected.labels)
            np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert (tapes.recorded, tapes.replayed) == ((1, 2) if graphs else (0, 0))


@pytest.mark.filterwarnings("ignore:rfclip-tiny")
def test_a_segmenter_uploads_the_same_classes_once():
    """Classes of the same names in other groups are other classes."""
    picture = Image.fromarray(SCENE.image[:130])
    lists = ["dog; sky; grass", "dog; sky, grass", "dog; sky", "dog; sky; grass"]
    with rfclip.Segmenter() as segmenter:
        for names in lists:
            found = segmenter(picture, names)
            kept = segmenter._uploaded
            with rfclip.Segmenter() as another:
                np.testing.assert_array_equal(found.labels, another(picture, names).labels)
            segmenter(picture, names)
            assert segmenter._uploaded is kept
