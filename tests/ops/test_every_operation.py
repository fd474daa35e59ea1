"""What all operations have in common: inputs left alone, batches, strides, scale, names."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits, clustered_similarity, differs, dtypes, qkv, score_dtype, some_masks, tokens
from helpers import rand, randn

from rfclip import reference

DIMS = (1, 4)
CALLS = {  # name: its tensors, batched along axis 0 (keys along axis 1), and how it is called on them
    "dimension_weights": (("x",), lambda impl, x: impl.dimension_weights(x)),
    "clamp_embeddings": (("x", "distraction"), lambda impl, x, mask: impl.clamp_embeddings(x, mask, DIMS)),
    "filter_embeddings": (("x", "distraction"), lambda impl, x, mask: impl.filter_embeddings(x, mask, (3, 4))),
    "filter_embeddings-median": (
        ("x", "distraction"),
        lambda impl, x, mask: impl.filter_embeddings(x, mask, (3, 4), statistic="median"),
    ),
    "distraction_scores": (("x",), lambda impl, x: impl.distraction_scores(x, DIMS)),
    "distraction_mask": (("x",), lambda impl, x: impl.distraction_mask(x, DIMS)),
    "received_attention": (("q", "k"), lambda impl, q, k: impl.received_attention(q, k)),
    "redistribute_embeddings": (
        ("x", "distraction"),
        lambda impl, x, mask: impl.redistribute_embeddings(x, mask, DIMS, (3, 4)),
    ),
    "key_similarity": (("k", "running"), lambda impl, k, running: impl.key_similarity(k, running, 2)),
    "fiedler_vector": (("similarity", "start"), lambda impl, S, start: impl.fiedler_vector(S, start)),
    "defocus_mask": (("y",), lambda impl, y: impl.defocus_mask(y)),
    "defocus_mask-otsu": (("y",), lambda impl, y: impl.defocus_mask(y, threshold="otsu")),
    "refocused_attention": (
        ("q", "k", "v", "distraction", "target"),
        lambda impl, *tensors: impl.refocused_attention(*tensors, 0.7),
    ),
    "proxy_attention": (("keys", "v"), lambda impl, keys, v: impl.proxy_attention(keys, v)),
    "self_attention": (("q", "v"), lambda impl, q, v: impl.self_attention(q, v)),
    "pamr": (("image", "scores"), lambda impl, image, scores: impl.pamr(image, scores, 2, (1, 2))),
}
PICTURE_CALLS = {  # the same for functions of a single picture
    "average_windows": (
        ("windows",),
        lambda impl, windows: impl.average_windows(windows, [(0, 0), (0, 2), (1, 1), (1, 0), (1, 2)], 3, (4, 5)),
    ),
    "class_probabilities": (
        ("logits",),
        lambda impl, x: impl.class_probabilities(x, (5, 6), 4.0, torch.tensor([1, 0, 1], device=x.device), 2),
    ),
    "upsample_argmax": (
        ("logits",),
        lambda impl, x: impl.upsample_argmax(x, (5, 6), 4.0, torch.tensor([1, 0, 1], device=x.device), 0.5),
    ),
}
every_call = pytest.mark.parametrize("call", CALLS | PICTURE_CALLS)
batched_call = pytest.mark.parametrize("call", CALLS)


def example(call, dtype=torch.float64, B=3):
    """The arguments of one call: 3 x 4 patches, 2 heads of 5 dimensions."""
    N = 12
    q, k, v = qkv(B, 2, N + 1, 5, dtype)
    distraction, target = some_masks(B, N)
    inputs = {
        "x": tokens(B, N, 10, dtype),
        "q": q,
        "k": k,
        "v": v,
        "keys": torch.stack([k, q]),
        "distraction": distraction,
        "target": target,
        "running": clustered_similarity(B, N, score_dtype(dtype)),
        "similarity": clustered_similarity(B, N, dtype),
        "start": randn(B, N, seed=6, dtype=dtype),
        "y": randn(B, N, seed=7, dtype=dtype),
        "image": rand(B, 3, 3, 4, seed=11).to(dtype),
        "scores": rand(B, 2, 3, 4, seed=12).to(dtype),
        "windows": randn(5, 2, 2, 3, seed=9, dtype=dtype),
        "logits": randn(3, 3, 4, seed=10, dtype=dtype),
    }
    names, function = (CALLS | PICTURE_CALLS)[call]
    return {name: inputs[name] for name in names}, function


@every_call
@dtypes()
def test_inputs_are_not_modified_and_results_are_new(impl, call, dtype):
    tensors, function = example(call, dtype)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    out = function(impl, *tensors.values())
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert out.untyped_storage().data_ptr() not in storages
    # Heads may be laid out as the output projection reads them.
    assert out.is_contiguous() or out.transpose(1, 2).is_contiguous()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


@dtypes()
def test_in_place(impl, dtype):
    tensors, _ = example("redistribute_embeddings", dtype)
    x, mask = tensors.values()
    want = impl.redistribute_embeddings(x, mask, DIMS, (3, 4))
    view = F.pad(x, (0, 0, 1, 0))[:, 1:]  # the patches of a block's input
    assert impl.redistribute_embeddings(view, mask, DIMS, (3, 4), inplace=True) is view
    assert_same_bits(view, want)
    tensors, _ = example("key_similarity", dtype)
    k, running = tensors.values()
    want = impl.key_similarity(k, running, 2)
    assert impl.key_similarity(k, running, 2, inplace=True) is running
    assert_same_bits(running, want)
    assert_same_bits(impl.key_similarity(k, inplace=True), impl.key_similarity(k))


@batched_call
@dtypes()
def test_a_batch_equals_its_images_one_by_one(impl, call, dtype):
    tensors, function = example(call, dtype)
    batch = function(impl, *tensors.values())
    for b in range(3):
        image = [t[:, b : b + 1] if name == "keys" else t[b : b + 1] for name, t in tensors.items()]
        torch.testing.assert_close(function(impl, *image), batch[b : b + 1])
    assert not torch.equal(batch[0], batch[1])


@every_call
def test_strided_inputs(impl, call):
    tensors, function = example(call)
    strided = [torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0] for t in tensors.values()]
    crossed = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors.values()]
    want = function(impl, *tensors.values())
    for variant in (strided, crossed):
        assert not any(t.is_contiguous() for t in variant)
        torch.testing.assert_close(function(impl, *variant), want)


@batched_call
def test_an_empty_batch(impl, call):
    tensors, function = example(call)
    shape = function(impl, *tensors.values()).shape
    out = function(impl, *(t[:, :0] if name == "keys" else t[:0] for name, t in tensors.items()))
    assert out.shape == (0, *shape[1:])


@every_call
def test_the_reference_reads_nothing_back_from_the_device(call):
    tensors, function = example(call)
    want = function(reference, *tensors.values())
    out = function(reference, *(t.to("meta") for t in tensors.values()))  # a meta tensor has no values to read
    assert (out.shape, out.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_scale(impl, scale):
    q, k, v = qkv(2, 2, 9, 6)
    distraction, target = some_masks(2, 8)
    factor = scale * math.sqrt(6)  # queries times this, under the default scale, are queries under `scale`
    root = math.sqrt(factor)
    pairs = [
        (impl.received_attention, (q, k), (factor * q, k)),
        (impl.key_similarity, (k,), (root * k,)),
        (impl.proxy_attention, (k[None], v), (root * k[None], v)),
        (impl.refocused_attention, (q, k, v, distraction, target, 0.7), (factor * q, k, v, distraction, target, 0.7)),
    ]
    for function, arguments, scaled in pairs:
        got = function(*arguments, scale=scale)
        assert differs(got, function(*arguments))
        torch.testing.assert_close(got, function(*scaled))


def test_public_names(impl):
    assert sorted(reference.__all__) == sorted({call.split("-")[0] for call in CALLS | PICTURE_CALLS})
    for name in reference.__all__:
        parameters = inspect.signature(getattr(reference, name)).parameters
        assert list(inspect.signature(getattr(impl, name)).parameters) == list(parameters)
