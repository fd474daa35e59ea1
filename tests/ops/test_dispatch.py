"""Which backend runs where, and what happens where Triton or a GPU is missing."""

import copy
import inspect
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import needs_triton
from open_clip.transformer import QuickGELU
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rfclip_kernels
from rfclip import reference
from rfclip.ops import choose, operations
from rfclip.ops.dispatch import backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that PyTorch takes to be there; the fixture is a function that sets its compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU of this test")

    def capability(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    capability(8, 0)
    return capability


def test_importing_loads_no_kernel():
    code = "import sys, rfclip.plugin; print(*(name for name in sys.modules if name.startswith('rfclip_kernels')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {
        "rfclip_kernels",
        *(
            f"rfclip_kernels.{name}"
            for name in ("checks", "cut_constants", "launch", "operations", "registry", "tiles")
        ),
    }


@needs_triton
def test_auto(gpu):
    assert choose("auto", GPU, torch.float16).backend == "triton"
    for device, dtype, reason in ((CPU, torch.float32, "is on cpu"), (GPU, torch.float64, "float64")):
        choice = choose("auto", device, dtype)
        assert choice.backend == "eager"
        assert reason in choice.reason
    gpu(7, 5)
    choice = choose("auto", GPU, torch.float16)
    assert choice.backend == "eager"
    assert "below 8.0" in choice.reason


@needs_triton
def test_a_named_backend_is_never_replaced(gpu):
    assert choose("triton", GPU, torch.bfloat16).backend == "triton"
    assert choose("reference", GPU, torch.bfloat16).backend == "reference"
    for device, dtype in ((CPU, torch.float32), (GPU, torch.float64)):
        with pytest.raises(ValueError, match='backend="triton": .*use backend="eager", or "auto"'):
            choose("triton", device, dtype)


@needs_triton
def test_the_kernels_have_the_references_names_and_signatures():
    ours = backend("triton")
    for name in rfclip_kernels.__all__:
        assert ours._run[name].__module__.startswith("rfclip_kernels.")
        assert ours._run[name].__name__ == f"launch_{name}"
        assert inspect.signature(getattr(rfclip_kernels, name)) == inspect.signature(getattr(reference, name))
    assert ours.borrowed == ["clamp_embeddings", "class_probabilities", "dimension_weights", "filter_embeddings"]
    assert backend("reference").borrowed == [] and "pamr" not in backend("eager").borrowed


@needs_triton
def test_operations_are_those_of_the_chosen_backend(gpu):
    assert operations().name == operations("eager").name == "eager"
    assert operations("auto", "cuda", torch.float16).name == "triton"
    assert operations("reference", GPU, torch.float16).name == "reference"


def test_backends_are_copied_by_name():
    assert pickle.loads(pickle.dumps(backend("eager"))) is copy.deepcopy(backend("eager")) is backend("eager")


@needs_triton
def test_the_kernels_refuse_the_cpu():
    with pytest.raises(ValueError, match="x is on cpu: the Triton kernels run on CUDA.*TRITON_INTERPRET=1"):
        rfclip_kernels.distraction_mask(torch.ones(1, 4, 8), [1], 0.5)
    with pytest.raises(ValueError, match="x is on cpu"):
        rfclip_kernels.distraction_mask(torch.nn.Parameter(torch.ones(1, 4, 8), requires_grad=False), [1], 0.5)


class Keeping(TorchDispatchMode):
    """Keeps what the products of linear layers were."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.kept.append((out, out.clone()))
        return out


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), QuickGELU()], ids=["gelu", "quick gelu"])
@pytest.mark.parametrize("seen", ["nothing", "hook", "global hook", "mode", "gradient", "no linear layer"])
def test_an_activation_writes_over_nothing_that_is_seen(activation, seen, monkeypatch):
    first, last = nn.Linear(4, 8), nn.Linear(8, 4)
    x, kept, mode, outputs, entered = (
        torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)),
        [],
        Keeping(),
        [],
        [],
    )
    layers, linear = [first, activation, last], nn.functional.linear

    def keep(module, inputs, output):
        if module is first:
            kept.append((output, output.clone()))

    def recorded(given, *arguments):
        entered.append(given.data_ptr())
        outputs.append(linear(given, *arguments))
        return outputs[-1]

    want = nn.Sequential(*layers)(x)
    monkeypatch.setattr(nn.functional, "linear", recorded)
    if seen == "no linear layer":
        x = first(x).detach()
        kept, layers = [(x, x.clone())], [nn.Identity(), activation, last]
    hooks = {"hook": first.register_forward_hook, "global hook": nn.modules.module.register_module_forward_hook}
    removed = hooks[seen](keep) if seen in hooks else None
    with torch.set_grad_enabled(seen == "gradient"), mode if seen == "mode" else nullcontext():
        got = backend("eager").mlp(layers, x)
    if removed is not None:
        removed.remove()
    kept += mode.kept
    assert len(kept) == {"nothing": 0, "gradient": 0, "mode": 2}.get(seen, 1)
    assert all(torch.equal(output, before) for output, before in kept)
    if seen == "nothing" and isinstance(activation, QuickGELU):
        assert not entered  # its factors are those of other products
    else:
        assert (entered[-1] == outputs[0].data_ptr()) is (seen == "nothing")  # what enters the last layer
    torch.testing.assert_close(got, want)
    if seen == "gradient":
        got.sum().backward()
        expected, first.weight.grad = first.weight.grad, None
        want.sum().backward()
        torch.testing.assert_close(first.weight.grad, expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "case",
    ["float32", "float64", "bfloat16", "autocast", "no bias", "sparse", "hook", "another layer", "layers after it"],
)
def test_products_that_take_the_factors_of_quick_gelu(case, monkeypatch):
    torch.manual_seed(0)
    layers, dtype = [nn.Linear(4, 8), QuickGELU(), nn.Linear(8, 4)], torch.float32
    if case in ("float64", "bfloat16"):
        dtype = getattr(torch, case)
    if case == "no bias":
        layers[2] = nn.Linear(8, 4, bias=False)
    elif case == "sparse":
        layers[2].weight = nn.Parameter(layers[2].weight.detach().to_sparse_csr())
    elif case == "hook":
        layers[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    elif case == "another layer":
        layers[0] = type("Adapter", (nn.Linear,), {"forward": lambda self, x: -super(type(self), self).forward(x)})(
            4, 8
        )
    elif case == "layers after it":
        layers += [nn.LayerNorm(4), nn.GELU()]
    model, x, called = nn.Sequential(*layers).to(dtype), torch.randn(2, 3, 4).mT.contiguous().mT.to(dtype), []
    linear = nn.functional.linear
    with torch.no_grad(), torch.autocast("cpu", enabled=case == "autocast"):
        want = model(x)
        monkeypatch.setattr(nn.functional, "linear", lambda *given: called.append(given) or linear(*given))
        got = backend("eager").mlp(layers, x)
    assert (len(called) == 0) is case.startswith(("float", "layers"))
    rounding = 8 * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
@pytest.mark.parametrize("everywhere", [False, True], ids=["its own hook", "global hook"])
def test_hooks_of_an_activation_run(activation, everywhere):
    module = activation()
    layers, x = [nn.Linear(4, 8), module, nn.Linear(8, 4)], torch.ones(1, 2, 4)
    register = nn.modules.module.register_module_forward_hook if everywhere else module.register_forward_hook
    removed = register(lambda hooked, inputs, output: 2 * output if hooked is module else output)
    with torch.no_grad():
        got, want = backend("eager").mlp(layers, x), nn.Sequential(*layers)(x)
    removed.remove()
    assert torch.equal(got, want)
