"""The refocused tower on the Triton kernels as PyTorch's tools see it: traced, exported, compiled, and never waiting.

No GPU is needed: the model and its input are CUDA tensors without data. The reference runs, on the CPU.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import needs_triton
from open_clip.model import CLIP
from refocusing import DEFAULT, VARIANTS
from small_models import DIMS, Dense, pictures, small_clip
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rfclip
import rfclip_kernels
from rfclip.methods import METHODS
from rfclip.plugin import installed

GATHERED = {"rfclip_kernels.key_normalizers", "rfclip_kernels.proxy_attention"}
PAPER = {"rfclip_kernels.layer_norm", "rfclip_kernels.refocused_attention"} | GATHERED
CUT = PAPER | {"rfclip_kernels.key_similarity_", "rfclip_kernels.defocused_tokens"}
LOCATED = {"rfclip_kernels.distraction_scores"}  # where that is not in a norm
JOINT = {"rfclip_kernels.received_attention", "rfclip_kernels.joint_repair_", "rfclip_kernels.project_tokens_"}
ORDERED = {"rfclip_kernels.order_patches"}  # where that is not in the cut
OTHER_CUT = {"rfclip_kernels.key_similarity_", "rfclip_kernels.fiedler_vector", "rfclip_kernels.defocus_mask"}
CONFIGS = {
    "paper": ({}, CUT),
    "received": ({"tau_attn": 1.0}, CUT | JOINT),
    "received, mean": ({"tau_attn": 1.0, "embedding": "mean"}, CUT | LOCATED | {"rfclip_kernels.received_attention"}),
    "otsu": ({"cut_threshold": "otsu", "similarity": "vv", "layers": (2,)}, PAPER | OTHER_CUT | ORDERED),
    "clamp": ({"embedding": "clamp"}, CUT | LOCATED),
    "rest": ({"target": "rest"}, PAPER | ORDERED),
}
pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_config = pytest.mark.parametrize("case", CONFIGS)


class NeverWaits(TorchDispatchMode):
    """Refuse every transfer between device and host, which no CUDA graph could capture."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        places = [
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.dim()}
            for tree in ((args, kwargs), out)
        ]
        assert "cpu" not in places[0] | places[1], f"{function} on {places}"
        return out


@pytest.fixture
def tower(monkeypatch):
    """A model and images as CUDA tensors without data, and the mode to run them in."""
    if torch.__version__ < "2.11":
        pytest.skip("PyTorch before 2.11 needs a GPU's driver to make CUDA tensors, even without data")
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is built without CUDA")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode() as mode, torch.device("cuda"):
        return clip(3), torch.empty(2, 3, 32, 40), mode  # a first block, one in between and a last one


def clip(layers):
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": layers, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    return CLIP(20, vision, text).eval()


def operators(graph):
    names = {str(node.target) for node in graph.nodes}
    return {name.removesuffix(".default") for name in names if name.startswith("rfclip_kernels.")}


@needs_triton
@every_config
def test_nothing_waits_for_the_device(tower, case):
    model, images, mode = tower
    config = rfclip.RefocusConfig(distraction_dims=DIMS, **CONFIGS[case][0])
    with rfclip.refocus(model, config, backend="triton"), mode, torch.no_grad(), NeverWaits():
        assert rfclip.dense_features(model, images).shape == (2, 20, 4, 5)
        assert model.encode_image(images).shape == (2, 20)


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_configs_that_never_wait_may_be_captured(tower, variant):
    _, images, mode = tower
    with mode, torch.device("cuda"):
        model = clip(4)  # of which some variants name the last block
    config = replace(DEFAULT, **VARIANTS[variant])
    with rfclip.refocus(model, config, backend="triton"), mode, torch.no_grad(), NeverWaits():
        waits = nullcontext() if installed(model).capturable else pytest.raises(AssertionError, match="cpu")
        with waits:
            rfclip.dense_features(model, images)


@needs_triton
@pytest.mark.parametrize("method", [name for name, card in METHODS.items() if not card.sees_images])
def test_what_a_graph_may_capture_never_waits(tower, method):
    _, images, mode = tower
    with mode, torch.device("cuda"):
        model = clip(max(4, METHODS[method].blocks))
    config = DEFAULT if METHODS[method].configured else None
    registers = rfclip.RegisterConfig([(1, 3), (1, 5)]) if METHODS[method].registers else None
    refocused = rfclip.refocus(model, config, method=method, backend="triton", registers=registers)
    with refocused, mode, torch.no_grad(), NeverWaits():
        assert installed(model).capturable
        assert rfclip.dense_features(model, images).shape == (2, 20, 4, 5)


def test_what_waiting_looks_like(tower):
    _, images, mode = tower
    with mode, NeverWaits():
        for call in (lambda: images.sum().item(), lambda: images[images > 0], lambda: images.nonzero()):
            with pytest.raises((DataDependentOutputException, RuntimeError)):
                call()
        for call in (images.cpu, lambda: images[0, 0, [1, 2]], lambda: torch.ones(3).cuda()):
            with pytest.raises(AssertionError, match="cpu"):
                call()


@needs_triton
def test_two_devices_are_refused(tower):
    *_, mode = tower
    with mode:
        q = torch.empty(1, 2, 5, 16, device="cuda")
        mask = torch.zeros(1, 4, dtype=torch.bool, device="cuda")
        with pytest.raises(ValueError, match="target is on cuda:1 and q on cuda:0: expected one device"):
            rfclip_kernels.refocused_attention(q, q, q, mask, mask.to("cuda:1"), 0.7)
        with pytest.raises(ValueError, match="mask is on cpu and x on cuda:0"):
            rfclip_kernels.redistribute_embeddings(q[0], mask[:, :1].cpu().expand(2, 5), [1], (1, 5))


@needs_triton
@every_config
def test_export(tower, case):
    model, images, mode = tower
    changes, expected = CONFIGS[case]
    config = rfclip.RefocusConfig(distraction_dims=DIMS, **changes)
    with rfclip.refocus(model, config, backend="triton"), mode, torch.no_grad():
        exported = torch.export.export(Dense(model), (images,))
    assert operators(exported.graph) == expected


# The blocks are the same for both; what the last one gathers and does not need for an image depends on the cut.
@needs_triton
@pytest.mark.parametrize(
    ("function", "case"),
    [*(("dense_features", case) for case in CONFIGS), ("encode_image", "received"), ("encode_image", "rest")],
)
def test_compile_in_one_graph(tower, case, function):
    model, images, mode = tower
    changes, expected = CONFIGS[case]
    module = Dense(model) if function == "dense_features" else model.visual
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph

    config = rfclip.RefocusConfig(distraction_dims=DIMS, **changes)
    with rfclip.refocus(model, config, backend="triton"), mode, torch.no_grad():
        torch.compile(module, fullgraph=True, backend=keep)(images)
    assert len(graphs) == 1
    if function == "encode_image":
        expected = expected - (
            {"rfclip_kernels.proxy_attention"} if "rfclip_kernels.key_similarity_" in expected else GATHERED
        )
    assert operators(graphs[0]) == expected


@needs_triton
def test_the_released_code(tower):
    model, images, mode = tower
    expected = {
        "rfclip_kernels.distraction_scores",
        "rfclip_kernels.blend_embeddings_",
        "rfclip_kernels.layer_norm",
        "rfclip_kernels.self_attention_",
    }
    expected |= GATHERED
    config = rfclip.RefocusConfig(distraction_dims=DIMS)
    with rfclip.refocus(model, config, method="released", backend="triton"), mode, torch.no_grad():
        with NeverWaits():
            assert rfclip.dense_features(model, images).shape == (2, 20, 4, 5)
        exported = torch.export.export(Dense(model), (images,))
    assert operators(exported.graph) == expected | {"rfclip_kernels.cosine_aggregation"}


@needs_triton
def test_compile_down_to_single_operators(tower):
    model, images, mode = tower
    config = rfclip.RefocusConfig(distraction_dims=DIMS)
    with rfclip.refocus(model, config, backend="triton"), mode, torch.no_grad():
        compiled = torch.compile(Dense(model), fullgraph=True, backend="aot_eager")
        assert compiled(images).shape == (2, 20, 4, 5)


@needs_triton
def test_inductors_code_compiles_for_a_gpu_that_is_not_here(tower, tmp_path):
    """Down to machine code: Inductor's own kernels, and every kernel that the tower launches without it."""
    from tools.kernel_report.launches import recording

    torch.set_default_dtype(torch.float16)  # as the script does
    try:
        with recording() as found, torch.device("cuda"), torch.no_grad():
            model = clip(2)
            with rfclip.refocus(model, rfclip.RefocusConfig(DIMS), backend="triton"):
                rfclip.dense_features(model, torch.empty(2, 3, 32, 40))
    finally:
        torch.set_default_dtype(torch.float32)
    tests = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, tests / "inductor_for_cuda.py", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = set(done.stdout.split())
    assert compiled == {path.stem for path in tmp_path.rglob("*.cubin")}
    own = {name for name in compiled if not name.startswith("triton_")}
    assert own == {launch.kernel.__name__ for launch in found.launches}
    assert len(compiled) > len(own) > 0


@pytest.mark.parametrize("method", ["rf-clip", "released"])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_other_backends_compile_and_export(backend, method):
    model, images = small_clip(), pictures(count=1)
    config = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, tau_attn=1.0, layers=(2,))
    with rfclip.refocus(model, config, method=method, backend=backend), torch.no_grad():
        want = rfclip.dense_features(model, images)
        compiled = torch.compile(Dense(model), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), want)
        torch.testing.assert_close(torch.export.export(Dense(model), (images,)).module()(images), want)
