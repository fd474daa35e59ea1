"""Modules that do more than their library's class are refused, and exchanges after refocusing are noticed."""

import copy
import functools

import pytest
import torch
import transformers
from openai_models import small_openai
from refocusing import DEFAULT, assert_each_close, outputs, refocused
from small_models import DIMS, pictures, small_clip, to_hugging_face
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

import rfclip
from rfclip.towers import read_tower

pytestmark = pytest.mark.usefixtures("no_grad")


class LowRank(nn.Module):
    """An adapter around a module, as libraries inject it."""

    def __init__(self, base, width, dtype=torch.float64):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(width, 2, bias=False, dtype=dtype)
        self.up = nn.Linear(2, width, bias=False, dtype=dtype)

    def forward(self, x, *args, **kwargs):
        found = self.base_layer(x, *args, **kwargs)
        return (
            (found[0] + self.up(self.down(x)), *found[1:])
            if isinstance(found, tuple)
            else found + self.up(self.down(x))
        )


class Louder(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return (2 * super().forward(*args, **kwargs)[0], None)


def subclassed(model, block):
    block.attn.__class__ = Louder


def adapted(model, block):
    attn = block.attn
    block.attn = LowRank(attn, attn.embed_dim, attn.in_proj_weight.dtype)
    block.attn.in_proj_weight = attn.in_proj_weight  # as an adapter that passes attributes on
    block.attn.out_proj, block.attn.num_heads = attn.out_proj, attn.num_heads


def adapted_output(model, block):
    block.attn.out_proj = LowRank(block.attn.out_proj, block.attn.embed_dim)


def hooked(model, block):
    block.attn.register_forward_hook(lambda module, inputs, output: (2 * output[0], None))


def hooked_before(model, block):
    block.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def replaced(model, block):
    block.forward = functools.partial(lambda x, **kwargs: x, attn_mask=None)


def pruned(model, block):
    prune.l1_unstructured(block.attn, "in_proj_weight", amount=0.5)


def normalized(model, block):
    parametrizations.weight_norm(block.attn, "in_proj_weight")


def parametrized(model, block):
    class Flip(nn.Module):
        def forward(self, weight):
            return weight.flip(0)

    parametrize.register_parametrization(model.visual, "class_embedding", Flip())


def own_tower(model, block):
    class Other(type(model.visual)):
        def forward(self, x):
            return super().forward(x.flip(-1))

    model.visual.__class__ = Other


CHANGES = {
    "subclass": (subclassed, "attention of block 2 is of class .*Louder"),
    "adapter": (adapted, "attention of block 2 is of class .*LowRank"),
    "output-adapter": (adapted_output, "output projection of block 2 is of class .*LowRank"),
    "hook": (hooked, "attention of block 2 has the hook"),
    "pre-hook": (hooked_before, "block 2 has the hook"),
    "forward": (replaced, "block 2 has a forward of its own"),
    "pruning": (pruned, "attention of block 2 has the hook"),
    "weight-norm": (normalized, r"attention of block 2 is of class torch\.nn\.utils\.parametrize\.Parametrized"),
    "parametrization": (parametrized, r"its module is of class torch\.nn\.utils\.parametrize\.Parametrized"),
    "tower-subclass": (own_tower, "its module is of class .*Other"),
}


FAMILIES = {"open_clip": (small_clip, torch.float64), "openai": (small_openai, torch.float32)}
families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize("change", CHANGES)
def test_what_would_be_ignored_is_refused_by_name(change, family):
    """Each changes the plain model, so that reading the weights alone would give another model's result."""
    make, dtype = FAMILIES[family]
    model, images = make(), pictures(dtype=dtype)
    plain = model.encode_image(images)
    apply, words = CHANGES[change]
    apply(model, model.visual.transformer.resblocks[1])
    # nn.MultiheadAttention reads its output's weight and ignores an adapter; a new norm leaves the weight as it is.
    if change not in ("output-adapter", "weight-norm"):
        assert not torch.allclose(model.encode_image(images), plain, atol=1e-3)
    for call in (
        lambda: rfclip.refocus(model, DEFAULT),
        lambda: rfclip.dense_features(model, images, method="clip"),
        lambda: rfclip.calibrate(model, images),
    ):
        with pytest.raises(ValueError, match=f"{words}.*, which would be ignored"):
            call()


@families
@pytest.mark.parametrize(
    "change", [change for change in CHANGES if change not in ("parametrization", "tower-subclass")]
)
def test_changes_after_refocusing_are_noticed(change, family):
    make, dtype = FAMILIES[family]
    model, images = make(), pictures(dtype=dtype)
    want = refocused(model, images)
    apply, _ = CHANGES[change]
    with rfclip.refocus(model, DEFAULT):
        apply(model, model.visual.transformer.resblocks[1])
        for call in (lambda: rfclip.dense_features(model, images), lambda: model.encode_image(images)):
            with pytest.raises(RuntimeError, match=r"block 2 was changed after refocusing.*handle\.remove\(\)"):
                call()
    assert_each_close(refocused(make(), images), want)  # the class is as it was


def test_deleted_blocks_and_exchanged_towers_are_noticed():
    model, images = small_clip(), pictures()
    with rfclip.refocus(model, DEFAULT):
        del model.visual.transformer.resblocks[2]
        with pytest.raises(RuntimeError, match="resblocks was changed"):
            rfclip.dense_features(model, images)
    other = small_clip(seed=1)
    want = refocused(small_clip(seed=1), images)
    with rfclip.refocus(model, DEFAULT):
        model.visual = other.visual
        with pytest.raises(ValueError, match="this model is not refocused"):
            rfclip.dense_features(model, images)
    assert_each_close(refocused(model, images), want)


def test_a_segmenter_notices_an_exchanged_tower(picture_segmenter):
    segmenter, picture = picture_segmenter
    segmenter.model.visual = copy.deepcopy(segmenter.model.visual)
    del segmenter.model.visual.forward
    with pytest.raises(RuntimeError, match="its model was restored"):
        segmenter(picture, ["dog", "grass"])


@pytest.fixture
def picture_segmenter():
    from rfclip.towers.loading import tiny_folder

    with rfclip.Segmenter(cache=False) as segmenter:
        yield segmenter, tiny_folder() / "scene.png"


def merged(model, block):
    weight = block.attn.in_proj_weight
    weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()


def mlp_adapter(model, block):
    torch.manual_seed(0)
    block.mlp.c_proj = LowRank(block.mlp.c_proj, 96)
    block.mlp.c_proj.up = nn.Linear(2, 48, bias=False).double()


def made_permanent(model, block):
    pruned(model, block)
    prune.remove(block.attn, "in_proj_weight")


def permanent_norm(model, block):
    normalized(model, block)
    parametrize.remove_parametrizations(block.attn, "in_proj_weight")


@pytest.mark.parametrize("apply", [merged, mlp_adapter, made_permanent, permanent_norm])
def test_what_is_in_the_weights_or_in_modules_that_run_stays_right(apply):
    """Refocusing nothing is the plain tower: what `encode_image` gives with the change."""
    model, images = small_clip(), pictures()
    before = model.encode_image(images)
    apply(model, model.visual.transformer.resblocks[1])
    want = model.encode_image(images)
    if apply is not permanent_norm:
        assert not torch.allclose(want, before, atol=1e-3)
    with rfclip.refocus(model, rfclip.RefocusConfig((), proxy="none")):
        torch.testing.assert_close(model.encode_image(images), want, rtol=1e-10, atol=1e-10)


def doubled(mlp):
    mlp.register_forward_hook(lambda module, args, out: 2 * out)


def without_forward(mlp):
    mlp.forward = lambda x: 0 * x


def another_activation(mlp):
    mlp.gelu = nn.ReLU()


@pytest.mark.parametrize("apply", [doubled, without_forward, another_activation])
def test_an_mlp_is_taken_apart_as_it_was(apply):
    """What changes one before refocusing counts; afterwards it is refused, since its layers run one by one."""
    model, images = small_clip(), pictures()
    before = model.encode_image(images)
    apply(model.visual.transformer.resblocks[1].mlp)
    want = model.encode_image(images)
    assert not torch.allclose(want, before, atol=1e-3)
    plain = rfclip.RefocusConfig((), proxy="none")
    with rfclip.refocus(model, plain):
        torch.testing.assert_close(model.encode_image(images), want, rtol=1e-10, atol=1e-10)
    model = small_clip()
    with rfclip.refocus(model, plain):
        apply(model.visual.transformer.resblocks[1].mlp)
        with pytest.raises(RuntimeError, match="the MLP of block 2 was changed after refocusing"):
            model.encode_image(images)


def test_projections_of_hugging_face_run_as_modules():
    """An adapter there works, and one injected into a refocused model is noticed."""
    torch.manual_seed(0)
    model, images = to_hugging_face(small_clip()), pictures()
    attention = model.vision_model.encoder.layers[1].self_attn
    with rfclip.refocus(model, rfclip.RefocusConfig(DIMS)):
        attention.q_proj = LowRank(attention.q_proj, 48)
        with pytest.raises(RuntimeError, match="attention of layer 2 was changed after refocusing"):
            rfclip.dense_features(model, images)
    want = model.get_image_features(images, interpolate_pos_encoding=True)
    with rfclip.refocus(model, rfclip.RefocusConfig((), proxy="none")):
        found = model.get_image_features(images, interpolate_pos_encoding=True)
    torch.testing.assert_close(*(getattr(each, "pooler_output", each) for each in (found, want)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("part", ["embeddings", "encoder.layers.1", "encoder.layers.1.self_attn"])
def test_hugging_faces_modules_with_hooks_are_refused(part):
    model = to_hugging_face(small_clip())
    model.vision_model.get_submodule(part).register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="has the hook"):
        rfclip.refocus(model, rfclip.RefocusConfig(DIMS))


def test_sharded_blocks_are_refused(tmp_path):
    model = small_clip()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fully_shard(model.visual.transformer.resblocks[1], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"block 2 .*FSDP.*sharding"):
            rfclip.refocus(model, DEFAULT)
    finally:
        distributed.destroy_process_group()


def test_what_transformers_leaves_behind_is_no_hook():
    """Asking the plain model for hidden states leaves hooks that do nothing afterwards."""
    model, images = to_hugging_face(small_clip()), pictures()
    asked = {"output_hidden_states": True, "interpolate_pos_encoding": True}
    assert model.vision_model(images, **asked).hidden_states is not None
    read_tower(model)


@pytest.mark.parametrize(
    ("setting", "value"), [("output_attentions", True), ("output_hidden_states", True), ("return_dict", False)]
)
def test_a_config_that_asks_for_more_is_refused_where_it_matters(setting, value):
    model, images = to_hugging_face(small_clip(dtype=torch.float32)), pictures(dtype=torch.float32)
    assert isinstance(model, transformers.CLIPModel)
    with rfclip.refocus(model, rfclip.RefocusConfig(DIMS)):
        want = rfclip.dense_features(model, images)
    model.set_attn_implementation("eager")
    for config in (model.config, model.config.vision_config, model.config.text_config):
        setattr(config, setting, value)
    tower, tokens = read_tower(model), torch.tensor([[1, 5, 31, 0, 0, 0, 0, 0]])
    assert tower.encode_image(model, images).shape == (3, 20)
    assert tower.encode_text(model, tokens).shape == (1, 20)
    with rfclip.refocus(model, rfclip.RefocusConfig(DIMS)):
        torch.testing.assert_close(rfclip.dense_features(model, images), want)
        with pytest.raises(ValueError, match=f"{setting}={value}, as an argument or in the model's config"):
            model.vision_model(images)


def test_plain_features_are_asked_for_by_name():
    model, images = small_clip(), pictures()
    with pytest.raises(ValueError, match=r"not refocused: call rfclip\.refocus first, or pass method=.*'clip' is"):
        rfclip.dense_features(model, images)
    with pytest.raises(ValueError, match="method='banana': expected one of"):
        rfclip.dense_features(model, images, method="banana")
    plain = outputs(model, images)[0]
    model.refocus_config = DEFAULT
    once = rfclip.dense_features(model, images, method="rf-clip")
    assert not torch.allclose(once, plain, atol=1e-3)
    assert_each_close(refocused(model, images)[:1], [once])
    with rfclip.refocus(model, DEFAULT), pytest.raises(ValueError, match=r"already refocused, with 'rf-clip'"):
        rfclip.dense_features(model, images, method="clip")


@torch.enable_grad()
def test_features_require_gradients_only_if_the_images_do():
    model, images = small_clip(), pictures()
    with rfclip.refocus(model, DEFAULT):
        assert not rfclip.dense_features(model, images).requires_grad
        rfclip.dense_features(model, images).numpy()
        assert rfclip.dense_features(model, images.requires_grad_()).requires_grad
        with torch.no_grad():
            assert not rfclip.dense_features(model, images).requires_grad
