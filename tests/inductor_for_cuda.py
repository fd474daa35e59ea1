"""Compile a refocused tower by Inductor for a GPU that is not here, down to machine code.

python tests/inductor_for_cuda.py CAPABILITY

Prints the name of each Triton kernel of the generated code, Inductor's own and this package's, once it is compiled; its
machine code is then in TORCHINDUCTOR_CACHE_DIR. The model and its input are CUDA tensors without data, and what
Inductor and Triton ask a driver for comes from here. The generated code is loaded, which compiles its kernels, and not
run. This replaces parts of PyTorch, and so needs a process of its own.
"""

import sys
from unittest.mock import patch

import torch
from open_clip.model import CLIP
from small_models import DIMS, Dense
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode

import rfclip
from tools.kernel_report.inductor import compiled_by_inductor, device


def compile_kernel(self, name, source, *_, **__):
    """What generated code calls for each kernel."""
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    print(name)
    return kernel


def main(capability):
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    config = rfclip.RefocusConfig(distraction_dims=DIMS)
    with (
        device(capability),
        patch.object(AsyncCompile, "triton", compile_kernel),
        FakeTensorMode(),
        torch.no_grad(),
    ):
        torch.set_default_dtype(torch.float16)  # parameters without data cannot be exchanged by `half`
        with torch.device("cuda"):  # which PyTorch 2.11 cannot trace
            model, images = CLIP(20, vision, text).eval(), torch.empty(2, 3, 32, 40)
        with rfclip.refocus(model, config, backend="triton"):
            compiled = compiled_by_inductor(Dense(model))
            assert compiled(images).shape == (2, 20, 4, 5)


if __name__ == "__main__":
    main(int(sys.argv[1]))
