"""What every test in this folder runs under: a GPU or Triton's interpreter, poisoned outputs and checked addresses.

Without a GPU these tests need a process of their own, as in `make test`, since Triton reads the variable when it is
imported: TRITON_INTERPRET=1 pytest tests/kernels. Buffers that a kernel writes are poisoned with NaN and have guard
bands on either side. In the interpreter, every address that a kernel reads or writes is checked against the tensors
of its launch. (The tests themselves embed the inputs in NaN, so that a value read from outside shows in the result.)
"""

import math

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, GUARD
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@pytest.fixture(autouse=True, scope="session")
def somewhere_to_run():
    assert DEVICE == "cpu" or torch.cuda.is_available(), "no GPU: run as TRITON_INTERPRET=1 pytest tests/kernels"


@pytest.fixture(autouse=True, scope="session")
def patched_once():
    """Spare the interpreter a third of its time: it patches the language anew at every call of a device function."""
    patch_lang, launch, patched = interpreter._patch_lang, GridExecutor.__call__, set()

    def patch_once(function):
        if (place := id(function.__globals__)) not in patched:
            patched.add(place)
            return patch_lang(function)

    def launch_anew(executor, *arguments, **keywords):
        patched.clear()  # the end of a launch undoes it
        return launch(executor, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Poison what `new_empty` returns, and check afterwards that nothing was written next to it."""
    buffers = []
    original = torch.Tensor.new_empty

    def new_empty(tensor, shape, *, dtype=None, **options):
        if options:  # the interpreter's own, not a kernel's output
            return original(tensor, shape, dtype=dtype, **options)
        dtype = dtype or tensor.dtype
        shape = (shape,) if isinstance(shape, int) else shape
        count = math.prod(shape) * dtype.itemsize
        # 0xFF is NaN in every float dtype.
        buffer = torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=tensor.device)
        if not (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):  # or else it is filled at every replay
            buffers.append(buffer)
        return buffer[GUARD : GUARD + count].view(dtype).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield buffers
    for buffer in buffers:
        assert (buffer[:GUARD] == 0xFF).all()
        assert (buffer[-GUARD:] == 0xFF).all()


def extent(t):
    """How many values lie between a tensor's first and last one; rows that are padded to 16 values end after that."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    padding = -t.shape[-1] % 16 if t.ndim > 1 and t.stride(-1) == 1 else 0
    held = t.untyped_storage().nbytes() // t.itemsize - t.storage_offset()
    if padding and t.stride(-2) >= t.shape[-1] + padding and last + 1 + padding <= held:
        return last + 1 + padding
    return last + 1


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """Refuse every load and store outside the tensors of the kernel's launch, its masks and indices included."""
    if DEVICE != "cpu":
        return
    extents = []
    to_host = GridExecutor._init_args_hst

    def remember(executor, arguments, keywords):
        arguments, keywords = to_host(executor, arguments, keywords)
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)]
        extents[:] = [(t.data_ptr(), t.data_ptr() + t.itemsize * extent(t)) for t in tensors if t.numel()]
        return arguments, keywords

    def checked(name):
        original = getattr(InterpreterBuilder, name)

        def access(builder, pointers, *rest):
            mask = rest[0] if name == "create_masked_load" else rest[1]
            used = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
            used = used[np.broadcast_to(mask.data, used.shape).astype(bool)]
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            inside = np.zeros(used.shape, dtype=bool)
            for low, high in extents:
                inside |= (used >= low) & (used + size <= high)
            assert inside.all(), f"{name} outside every tensor"
            return original(builder, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", remember)
    checked("create_masked_load")
    checked("create_masked_store")
