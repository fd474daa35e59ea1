"""What all operations have in common: inputs left alone, batches, strides, scale, prefix, names."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits, differs, dtypes, qkv, some_masks
from oracles.operations import brute_apply, brute_weights

import rfclip
import rfclip_kernels
from rfclip import reference
from rfclip_kernels.operations import OPERATIONS, Operations
from rfclip_kernels.registry import EXAMPLES, KERNELS, Sizes

SIZES = {"B": 3, "H": 2, "D": 5, "L": 2, "grid": (3, 4), "names": 5, "patch": 2, "iterations": 2}
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
batched_example = pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if example.batched], ids=lambda example: example.name
)


def inputs_of(example, dtype=torch.float64, **sizes):
    """The arguments of an operation on small tensors."""
    return example.inputs(Sizes(dtype=dtype, **SIZES | sizes))


def call(impl, example, inputs):
    """What the operation returns, not in place."""
    return getattr(impl, example.operation)(**{name: value for name, value in inputs.items() if name != "inplace"})


def tensors(inputs):
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def results(out):
    """What an operation returned, as a tuple, as most return one tensor."""
    return out if isinstance(out, tuple) else (out,)


def of_images(inputs, images):
    """The inputs of some images of a batch."""
    layers = {"keys", "normalizers"} if "keys" in inputs else set()
    parts = {name: t[:, images] if name in layers else t[images] for name, t in tensors(inputs).items()}
    shared = [name for name, t in parts.items() if name == "weight" or name == "bias" and t.dim() < 3]
    return inputs | parts | {name: inputs[name] for name in shared}


@every_example
@dtypes()
def test_inputs_are_not_modified_and_results_are_new(impl, example, dtype):
    inputs = inputs_of(example, dtype)
    before = {name: tensor.clone() for name, tensor in tensors(inputs).items()}
    out = call(impl, example, inputs)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(inputs).values()}
    for each in results(out):
        assert each.untyped_storage().data_ptr() not in storages
        # Heads may be laid out as the output projection reads them.
        assert each.is_contiguous() or each.transpose(1, 2).is_contiguous()
    for name, tensor in tensors(inputs).items():
        assert torch.equal(tensor, inputs["k"] if name == "copy" else before[name]), name


@dtypes()
def test_in_place(impl, dtype):
    (repair,) = (example for example in EXAMPLES if example.name == "redistribute_embeddings")
    inputs = inputs_of(repair, dtype)
    want, view = call(impl, repair, inputs), F.pad(inputs["x"], (0, 0, 1, 0))[:, 1:]  # the patches of a block's input
    assert impl.redistribute_embeddings(**inputs | {"x": view}, inplace=True) is view
    assert_same_bits(view, want)
    (blend,) = (example for example in EXAMPLES if example.name == "blend_embeddings")
    inputs = inputs_of(blend, dtype)
    want, view = call(impl, blend, inputs), F.pad(inputs["x"], (0, 0, 1, 0))[:, 1:]
    assert impl.blend_embeddings(**inputs | {"x": view}, inplace=True) is view
    assert_same_bits(view, want)
    x = inputs["x"]
    for values in (x, x.transpose(1, 2)):
        view, want = values.clone(memory_format=torch.preserve_format), impl.quick_gelu(values)
        assert impl.quick_gelu(view, inplace=True) is view
        torch.testing.assert_close(view, want)  # PyTorch takes other instructions where values are not side by side
    (later,) = (example for example in EXAMPLES if example.name == "key_similarity, later block")
    inputs = inputs_of(later, dtype) | {"inplace": True}
    want = call(impl, later, inputs)
    assert impl.key_similarity(**inputs) is inputs["running"]
    assert_same_bits(inputs["running"], want)
    assert_same_bits(impl.key_similarity(inputs["k"], inplace=True), impl.key_similarity(inputs["k"]))
    (later,) = (example for example in EXAMPLES if example.name == "key_affinity, later block")
    inputs = inputs_of(later, dtype) | {"inplace": True}
    want = call(impl, later, inputs)
    assert impl.key_affinity(**inputs) is inputs["running"]
    assert_same_bits(inputs["running"], want)


@batched_example
@dtypes()
def test_a_batch_equals_its_images_one_by_one(impl, example, dtype):
    inputs = inputs_of(example, dtype)
    batch = call(impl, example, inputs)
    for b in range(3):
        alone = call(impl, example, of_images(inputs, slice(b, b + 1)))
        for got, want in zip(results(alone), results(batch), strict=True):
            torch.testing.assert_close(got, want[b : b + 1])
    assert not any(torch.equal(each[0], each[1]) for each in results(batch))


@every_example
def test_strided_inputs(impl, example):
    inputs = inputs_of(example)
    given, want = tensors(inputs), call(impl, example, inputs)
    strided = {name: torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0] for name, t in given.items()}
    crossed = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in given.items() if t.dim() > 1}
    for variant in (strided, crossed):
        assert not any(t.is_contiguous() for t in variant.values())
        torch.testing.assert_close(call(impl, example, inputs | variant), want)


@batched_example
def test_an_empty_batch(impl, example):
    inputs = inputs_of(example)
    empty = call(impl, example, of_images(inputs, slice(0, 0)))
    for got, full in zip(results(empty), results(call(impl, example, inputs)), strict=True):
        assert got.shape == (0, *full.shape[1:])


@every_example
def test_the_reference_reads_nothing_back_from_the_device(example):
    inputs = inputs_of(example)
    want = call(reference, example, inputs)
    meta = {name: tensor.to("meta") for name, tensor in tensors(inputs).items()}  # which has no values to read
    out = call(reference, example, inputs | meta)
    assert [(t.shape, t.dtype) for t in results(out)] == [(t.shape, t.dtype) for t in results(want)]


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


@pytest.mark.parametrize("prefix", [0, 2, 4])
def test_prefix(impl, prefix):
    """Without a class token or with registers: rows and columns of the prefix are what the oracles say they are."""
    N, T = 6, 6 + prefix
    q, k, v = qkv(2, 2, T, 5)
    dis, tgt = some_masks(2, N)
    A = brute_weights(q, k)
    torch.testing.assert_close(impl.received_attention(q, k, prefix=prefix), A[:, :, prefix:, prefix:].mean(dim=(1, 2)))
    S = brute_weights(k, k)[:, :, prefix:, prefix:]
    torch.testing.assert_close(impl.key_similarity(k, prefix=prefix), S.mean(dim=1))
    torch.testing.assert_close(impl.proxy_attention(k[None], v, prefix=prefix), brute_apply(S, v[:, :, prefix:]))
    given = tgt & ~dis
    over_all = torch.cat([torch.arange(prefix).expand(2, -1) == 1, given], dim=1)  # with one token of the prefix
    for target, wanted in ((tgt, F.pad(given, (prefix, 0))), (over_all, over_all)):
        moved = A.clone()
        for b in range(2):
            S_, T_ = prefix + dis[b].nonzero()[:, 0], wanted[b].nonzero()[:, 0]
            rows = A[b, :, prefix:]
            omega, mass = 0.7 * rows[..., S_].sum(-1, keepdim=True), rows[..., T_].sum(-1, keepdim=True)
            moved[b, :, prefix:, S_] = 0.3 * rows[..., S_]
            moved[b, :, prefix:, T_] = rows[..., T_] * (1 + omega / mass)
        got = impl.refocused_attention(q, k, v, dis, target, 0.7, prefix=prefix)
        torch.testing.assert_close(got, brute_apply(moved, v))
    bias = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # of a grid of 2 x 3
    logits = brute_weights(q, q).log()
    for i in range(N):
        for j in range(N):
            logits[..., prefix + i, prefix + j] += bias[i // 3 - j // 3 + 1, i % 3 - j % 3 + 2]
    got = impl.self_attention(q, q, v, bias, prefix=prefix)
    torch.testing.assert_close(got, brute_apply(logits.softmax(dim=-1), v))


def test_a_prefix_leaves_at_least_one_patch(impl):
    q = torch.zeros(1, 1, 4, 2)
    for prefix in (4, -1, 1.0):
        with pytest.raises(ValueError, match="T>=5|prefix must be an integer of at least 0"):
            impl.received_attention(q, q, prefix=prefix)


def test_public_names(impl):
    assert {example.operation for example in EXAMPLES} == set(OPERATIONS) == set(reference.__all__)
    assert set(rfclip_kernels.__all__) == set(KERNELS)
    for name in OPERATIONS:
        contract = inspect.signature(getattr(Operations, name)).replace(return_annotation=None)
        parameters = list(contract.parameters)[1:]
        for found in (getattr(impl, name), getattr(rfclip.reference, name)):
            assert list(inspect.signature(found).parameters) == parameters
