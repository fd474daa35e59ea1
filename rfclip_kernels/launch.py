"""What every launcher shares: the check of what kernels demand, the current device, and Triton's interpreter."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Function = TypeVar("Function", bound=Callable[..., Any])


def check_launch(D: int | None = None, **tensors: Tensor | None) -> None:
    """Refuse what the kernels cannot do: float64, gradients, two devices, a CPU, and heads of more than 128 dimensions.

    A CPU is accepted in Triton's interpreter, and so is any device for tensors without data, as a tracer passes them.

    Args:
        D: the head dimension, for kernels that multiply matrices.
        tensors: everything that is handed to the kernel, by name.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (leader, first), *_ = present.items()
    for name, tensor in present.items():
        if tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} is float64: the Triton kernels take float32, float16 or bfloat16; use the reference"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and the Triton kernels have none: use rfclip.reference, or run under "
                "torch.inference_mode()"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} and {leader} on {first.device}: expected one device")
        if tensor.device.type != "cuda" and not isinstance(tensor, FakeTensor) and not interpreted():
            raise ValueError(
                f"{name} is on {tensor.device}: the Triton kernels run on CUDA and ROCm devices, and in Triton's "
                "interpreter (set TRITON_INTERPRET=1 before the first import); use the reference"
            )
    if D is not None and D > 128:
        raise ValueError(f"the Triton kernels take heads of at most 128 dimensions, got {D}; use another backend")


def operator(name: str, *mutated: str) -> Callable[[Function], Function]:
    """Make a function one of PyTorch's operators, `<package>::<name>`, called as such only where that shows.

    PyTorch's dispatcher, in front of a function in Python, costs the host as much as half a launch.

    Args:
        mutated: the arguments that it writes to.
    """

    def made(function: Function) -> Function:
        registered = torch.library.triton_op(f"{__package__}::{name}", mutates_args=mutated)(function)
        places = [i for i, argument in enumerate(inspect.signature(function).parameters) if argument in mutated]

        @wraps(function)
        def call(*given: Any) -> Any:
            if watched() or not all(map(_is_plain, given)):
                return registered(*given)
            written = [given[place] for place in places if given[place] is not None]
            torch.autograd.graph.increment_version(written)  # so that a backward pass refuses what has changed
            with set_wrap_triton_enabled(False):
                return function(*given)

        return cast(Function, call)

    return made


def watched() -> bool:
    """Whether something sees the operators that are called: a compiler, an exporter, a tracer, a profiler or a mode."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is no tensor, or one whose memory a kernel may read: no subclass, and without a lazy minus."""
    if not isinstance(value, Tensor):
        return True
    return type(value) in (Tensor, nn.Parameter) and not value.is_neg() and not value._is_zerotensor()


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, where Triton launches, if there are several."""
    several = tensor.is_cuda and torch.cuda.device_count() > 1
    return torch.cuda.device(tensor.device) if several else nullcontext()


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """The strides of a tensor as arguments `stride_<name><axis>`."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, which refuses interpreted kernels before PyTorch 2.12."""
    return kernel if interpreted() else torch.library.wrap_triton(kernel)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    import triton

    return triton.knobs.runtime.interpret
