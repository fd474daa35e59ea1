"""What the kernels refuse, empty batches, and the guards under which every kernel test runs."""

import inspect
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, GUARD, randn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import InterpreterError

import rfclip_kernels
from rfclip_kernels.launch import operator


@triton.jit
def copy_kernel(x_ptr, out_ptr, N, BN: tl.constexpr):
    o_n = tl.arange(0, BN)
    tl.store(out_ptr + o_n, tl.load(x_ptr + o_n, mask=o_n < N), mask=o_n < N)


@pytest.mark.skipif(DEVICE != "cpu", reason="addresses are checked in Triton's interpreter only")
@pytest.mark.parametrize("lengths", [(5, 4), (4, 5)], ids=["read", "written"])
def test_an_access_outside_of_the_tensors_is_caught(lengths):
    x, out = (torch.zeros(8, dtype=torch.int32)[8 - length :] for length in lengths)
    copy_kernel[(1,)](x, out, 4, BN=8)
    with pytest.raises(InterpreterError, match="outside every tensor"):
        copy_kernel[(1,)](x, out, 5, BN=8)


def test_the_guards_catch_a_stray_write(guarded):
    torch.zeros(1, device=DEVICE).new_empty((3,))
    guarded[0][GUARD - 1] = 0
    with pytest.raises(AssertionError):
        assert (guarded[0][:GUARD] == 0xFF).all()
    guarded.clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no graphs")
def test_buffers_of_a_graph_are_poisoned_when_it_is_replayed(guarded):
    """Their memory is the graph's own: before a replay it holds anything, and after one it may be another tensor's."""
    x, kept = torch.zeros(1, device=DEVICE), []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.append(x.new_empty((3,)))
    assert not guarded
    graph.replay()
    assert kept[0].isnan().all()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func.name())
        return func(*args, **(kwargs or {}))


DISPATCHED = []


@operator("add_one_", "out")
def add_one_(x: torch.Tensor, out: torch.Tensor | None) -> None:
    DISPATCHED.append(any("custom_ops" in frame.filename for frame in inspect.stack()))
    if out is not None:
        out.data.copy_(x.data + 1)


@pytest.mark.filterwarnings("ignore")  # what is traced is deprecated, and what vmap calls one after another is slow
def test_a_mode_sees_an_operator():
    x = randn(2, 1, 3, 8, seed=0)

    def scores(x):
        return rfclip_kernels.distraction_scores(x, [1, 5])

    with Seen() as seen:
        scores(x[0])
    assert "rfclip_kernels::distraction_scores" in seen.operators
    assert torch.equal(torch.vmap(scores)(x)[:, 0], scores(x[:, 0]))
    assert torch.jit.trace(scores, x[0], check_trace=False).graph.findNode("rfclip_kernels::distraction_scores")
    graph = make_fx(scores, pre_dispatch=True)(x[0]).graph
    assert any("distraction_scores" in f"{node.target}" for node in graph.nodes)
    with torch.profiler.profile() as profile:
        scores(x[0])
    assert any(event.name == "rfclip_kernels::distraction_scores" for event in profile.events())
    minus = torch.complex(x, x).conj().imag  # whose memory holds x
    assert torch.equal(scores(minus[0]), scores(minus[0].resolve_neg()))


def test_the_dispatcher_is_left_out_where_nothing_sees_it():
    x, out = torch.ones(2), torch.zeros(2)
    DISPATCHED.clear()
    add_one_(x, out)
    with Seen():
        add_one_(x, out)
    with torch.overrides.BaseTorchFunctionMode():
        add_one_(x, out)
    assert DISPATCHED == [False, True, True]


@pytest.mark.parametrize("seen", [False, True])
def test_autograd_knows_what_an_operator_writes(seen):
    x, out, weight = torch.ones(2), torch.zeros(2), torch.ones(2, requires_grad=True)
    product = (weight * out).sum()
    with Seen() if seen else nullcontext():
        add_one_(x, None)
        add_one_(x, out)
    assert out.tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def joint_repair(x, y, before, candidates, q):
    weight = torch.ones(x.shape[2], device=DEVICE)
    grid = candidates.shape[1], 1
    return rfclip_kernels.joint_repair(x, y, before, candidates, q, q, weight, weight, [1], 0.1, grid)


def test_what_the_kernels_refuse():
    q, mask = randn(1, 1, 3, 32, seed=0), torch.zeros(1, 2, dtype=torch.bool, device=DEVICE)
    x = randn(1, 2, 8, seed=0)
    calls = [
        lambda t: rfclip_kernels.refocused_attention(t(q), q.to(t(q).dtype), q.to(t(q).dtype), mask, mask, 0.7),
        lambda t: rfclip_kernels.proxy_attention(t(q)[None], q.to(t(q).dtype)),
        lambda t: rfclip_kernels.self_attention(t(q), t(q), q.to(t(q).dtype)),
        lambda t: rfclip_kernels.key_similarity(t(q)),
        lambda t: rfclip_kernels.received_attention(t(q), q.to(t(q).dtype)),
        lambda t: joint_repair(t(x), t(x), t(x)[:, 1:, [1]], mask[:, 1:], q[:, :, 1:].to(t(x).dtype)),
        lambda t: rfclip_kernels.project_tokens(t(x), mask, x[0], None, x[..., :2], prefix=0),
        lambda t: rfclip_kernels.distraction_scores(t(x), [1]),
        lambda t: rfclip_kernels.distraction_mask(t(x), [1], 0.5),
        lambda t: rfclip_kernels.redistribute_embeddings(t(x), mask, [1], (1, 2)),
        lambda t: rfclip_kernels.blend_embeddings(t(x), mask, (1, 2)),
        lambda t: rfclip_kernels.cosine_aggregation(t(x), x.to(t(x).dtype), 0.4),
        lambda t: rfclip_kernels.fiedler_vector(t(q)[0, :, :3, :3]),
        lambda t: rfclip_kernels.defocus_mask(t(q)[0, 0]),
        lambda t: rfclip_kernels.average_windows(t(q), [(0, 0)], (2, 2), (2, 2)),
        lambda t: rfclip_kernels.upsample_argmax(t(x), (2, 2), 1.0, torch.zeros(1, dtype=torch.int64, device=DEVICE)),
        lambda t: rfclip_kernels.pamr(t(q), q, 1),
        lambda t: rfclip_kernels.pamr(q, t(q), 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is float64: the Triton kernels take.*use the reference"):
            call(torch.Tensor.double)
        with pytest.raises(ValueError, match="requires a gradient.*rfclip.reference"):
            call(lambda t: t.clone().requires_grad_())
        with torch.no_grad():
            call(lambda t: t.clone().requires_grad_())
        with pytest.raises(ValueError, match="must be a floating-point"):
            call(torch.Tensor.int)


def test_heads_too_wide_are_refused():
    q, mask = randn(1, 1, 3, 160, seed=0), torch.zeros(1, 2, dtype=torch.bool, device=DEVICE)
    for call in (
        lambda: rfclip_kernels.refocused_attention(q, q, q, mask, mask, 0.7),
        lambda: rfclip_kernels.self_attention(q, q, q),
        lambda: rfclip_kernels.proxy_attention(q[None], q),
        lambda: rfclip_kernels.key_similarity(q),
        lambda: rfclip_kernels.received_attention(q, q),
        lambda: joint_repair(q[0], q[0], q[0, :, 1:, [1]], mask, q),
    ):
        with pytest.raises(ValueError, match="at most 128 dimensions, got 160"):
            call()


def test_an_empty_batch():
    q, x = randn(0, 2, 5, 32, seed=0), randn(0, 4, 8, seed=0)
    mask = torch.zeros(0, 4, dtype=torch.bool, device=DEVICE)
    assert rfclip_kernels.refocused_attention(q, q, q, mask, mask, 0.7).shape == (0, 2, 5, 32)
    assert rfclip_kernels.proxy_attention(q[None], q).shape == (0, 2, 4, 32)
    assert rfclip_kernels.self_attention(q, q, q).shape == (0, 2, 5, 32)
    assert rfclip_kernels.key_similarity(q).shape == (0, 4, 4)
    assert rfclip_kernels.fiedler_vector(q[:, 0, :4, :4]).shape == (0, 4)
    assert rfclip_kernels.defocus_mask(q[:, 0, :, 0]).shape == (0, 5)
    assert rfclip_kernels.defocus_mask(x[..., 0], mask, threshold="otsu").shape == (0, 4)
    assert rfclip_kernels.received_attention(q, q).shape == (0, 4)
    assert joint_repair(q[:, 0], q[:, 1], q[:, 0, 1:, [1]], mask, q)[2].shape == (0, 4)
    assert rfclip_kernels.project_tokens(q[:, 0], mask, x.new_zeros(9, 32), None, randn(0, 5, 9, seed=0)).shape[2] == 9
    assert rfclip_kernels.distraction_mask(x, [1], 0.5).shape == (0, 4)
    assert rfclip_kernels.redistribute_embeddings(x, mask, [1], (2, 2)).shape == (0, 4, 8)
    assert rfclip_kernels.blend_embeddings(x, mask, (2, 2)).shape == (0, 4, 8)
    assert rfclip_kernels.cosine_aggregation(x, x, 0.4).shape == (0, 4, 8)
    assert rfclip_kernels.pamr(q, q, 2).shape == (0, 2, 5, 32)
