"""What `torch.compile` makes of plain CLIP: its kernels and the bytes they move, for a GPU that is not here.

python -m tools.kernel_report.inductor

Prints a JSON list for each forward of the report: the bytes of every kernel that Inductor generates, in order.
Products, convolution and attention stay calls of libraries, as in `tools.kernel_report.forward`, and are not listed.
The generated code is not run. This replaces parts of PyTorch, and so needs a process of its own.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.scheduler
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._dynamo.device_interface import (
    CudaInterface,
    caching_worker_current_devices,
    caching_worker_device_properties,
)
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime import triton_helpers
from torch._inductor.scheduler import FusedSchedulerNode, Scheduler, SchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from tools.kernel_report.forward import FORWARDS, plain_model

CAPABILITY = 90


@contextlib.contextmanager
def device(capability: int) -> Iterator[None]:
    """What Inductor and Triton ask of a GPU, with the properties of an H100 but for the compute capability."""
    found = SimpleNamespace(
        name="a GPU that is not here",
        **{"major": capability // 10, "minor": capability % 10, "warp_size": 32, "total_memory": 80 << 30},
        **{"multi_processor_count": 132, "regs_per_multiprocessor": 65536, "shared_memory_per_block": 48 << 10},
        **{"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
        **{"shared_memory_per_block_optin": 227 << 10},
    )
    answers: dict[str, Any] = {
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
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield


def compile_graph(graph: Any, inputs: Any, **options: Any) -> Any:
    """Inductor's compilation of a graph, which runs without it afterwards."""
    compile_fx_inner(graph, inputs, **options)
    return graph


def compiled_by_inductor(module: Any) -> Any:
    """`torch.compile` of a module whose code is generated, and not run."""
    backend = lambda graph, inputs: compile_fx(graph, inputs, inner_compile=compile_graph)  # noqa: E731
    return torch.compile(module, fullgraph=True, backend=backend)


@torch.library.custom_op("kernel_report::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention as one call; on a GPU that does not exist it is taken apart."""
    raise NotImplementedError


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def generated_kernels() -> list[list[int]]:
    """The bytes of each kernel that Inductor generates, for each forward."""
    found: list[list[int]] = []
    codegen = Scheduler.codegen

    def look(scheduler: Scheduler) -> None:
        generated = [node for node in scheduler.nodes if isinstance(node, FusedSchedulerNode | SchedulerNode)]
        found.append([node.get_read_write_buffers_sizes() for node in generated])
        codegen(scheduler)

    with (
        device(CAPABILITY),
        FakeTensorMode(),
        torch.device("cuda"),
        torch.no_grad(),
        patch.object(Scheduler, "codegen", look),
        patch.object(AsyncCompile, "triton", lambda self, name, *_, **__: name),
        patch.object(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: attention(q, k, v)),
    ):
        for goal in FORWARDS:
            torch._dynamo.reset()
            model, images = plain_model(goal.shape, goal.batch)
            compiled_by_inductor(model.visual)(images)
    return found


def in_its_own_process() -> Callable[[], list[list[int]]]:
    """Start `generated_kernels` in a fresh process; the function returned waits for its result."""
    process = subprocess.Popen([sys.executable, "-m", __name__], stdout=subprocess.PIPE, text=True)

    def wait() -> list[list[int]]:
        printed, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"python -m {__name__} failed with exit code {process.returncode}")
        return json.loads(printed)

    return wait


if __name__ == "__main__":
    print(json.dumps(generated_kernels()))
