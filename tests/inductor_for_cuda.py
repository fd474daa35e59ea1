"""Compile a refocused tower by Inductor for a GPU that is not here, down to machine code.

python tests/inductor_for_cuda.py CAPABILITY

Prints the name of each Triton kernel of the generated code, Inductor's own and this package's, once it is compiled; its
machine code is then in TORCHINDUCTOR_CACHE_DIR. The model and its input are CUDA tensors without data, and what
Inductor and Triton ask a driver for comes from here. The generated code is loaded, which compiles its kernels, and not
run. This replaces parts of PyTorch, and so needs a process of its own.
"""

import contextlib
import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._inductor.scheduler
import triton
from open_clip.model import CLIP
from small_models import DIMS, Dense
from torch._dynamo.device_interface import (
    CudaInterface,
    caching_worker_current_devices,
    caching_worker_device_properties,
)
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import rfclip


@contextlib.contextmanager
def device(capability):
    """What Inductor and Triton ask of a GPU, with the properties of an H100 but for the compute capability."""
    found = SimpleNamespace(
        name="a GPU that is not here",
        **{"major": capability // 10, "minor": capability % 10, "warp_size": 32, "total_memory": 80 << 30},
        **{"multi_processor_count": 132, "regs_per_multiprocessor": 65536, "shared_memory_per_block": 48 << 10},
        **{"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
        **{"shared_memory_per_block_optin": 227 << 10},
    )
    answers = {
        "get_device_capability": lambda device=None: (found.major, found.minor),
        "get_device_properties": lambda device=None: found,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
    }
    caching_worker_device_properties["cuda"], caching_worker_current_devices["cuda"] = [found], 0
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_device_interface=lambda: torch.cuda,
        )
    )
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        for name in ("get_device_properties", "current_device"):
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(answers[name])))
        stack.enter_context(patch.object(torch._inductor.scheduler, "has_triton", lambda *_: True))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(patch.object(AsyncCompile, "triton", compile_kernel))
        yield


def compile_kernel(self, name, source, *_, **__):
    """What generated code calls for each kernel."""
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    print(name)
    return kernel


def compile_graph(graph, inputs, **options):
    """Inductor's compilation of a graph, which runs without it afterwards."""
    compile_fx_inner(graph, inputs, **options)
    return graph


def main(capability):
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    config = rfclip.RefocusConfig(distraction_dims=DIMS)
    with (
        device(capability),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
        FakeTensorMode(),
        torch.device("cuda"),
        torch.no_grad(),
    ):
        torch.set_default_dtype(torch.float16)  # parameters without data cannot be exchanged by `half`
        model, images = CLIP(20, vision, text).eval(), torch.empty(2, 3, 32, 40)
        with rfclip.refocus(model, config, backend="triton"):
            compiled = torch.compile(
                Dense(model),
                fullgraph=True,
                backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=compile_graph),
            )
            assert compiled(images).shape == (2, 20, 4, 5)


if __name__ == "__main__":
    main(int(sys.argv[1]))
