"""A method's forward as CUDA graphs: one for each shape, captured when the shape first occurs, replayed from then on.

A graph is a list of launches with their addresses. It computes with whatever the weights' memory holds when it is
replayed, so that it sees weights that were changed in place; whatever else the launches depend on is compared at every
call, and a difference drops all graphs: where each weight lies, before a replay, which thus reads nothing that has been
freed; and the modules, their settings and hooks, while the device computes what is then returned or thrown away. That
takes the host 0.04 + 0.03 ms for ViT-B/16, with 139 modules and 152 tensors, and twice that for ViT-L/14 (on one core).
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import assert_size_stride
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rfclip.ops.numerics import autocasting
from rfclip.towers import Tower
from rfclip.towers.base import first_line

SHAPES = 8  # the most graphs
PATIENCE = 16  # calls without a graph before one takes another's place: a capture costs as much as several calls
DTYPE = attrgetter("dtype")
Function = Callable[[Tensor], Tensor]


class Recording(NamedTuple):
    """A function of one tensor, recorded: `replay` computes `result` from `given`, both at fixed addresses."""

    pool: Pool
    given: Tensor
    result: Tensor
    replay: Callable[[], None]

    def run(self, x: Tensor) -> Tensor:
        """What the function makes of x, a tensor of its own."""
        with self.pool.turn(x.device):
            self.given.copy_(x)
            self.replay()
            return self.result.clone()


class Pool:
    """CUDA graphs on one device that share their memory, which is sound because they take turns.

    What a graph leaves in that memory is read by no other graph, and its result is copied within its turn.
    """

    device_type: ClassVar[str] = "cuda"
    _capturing: ClassVar[threading.Lock] = threading.Lock()  # a capture forbids others to synchronize, as captures do

    def __init__(self, device: torch.device) -> None:
        self._stream, self._done = torch.cuda.Stream(device), torch.cuda.Event()
        with torch.cuda.device(device):
            self._memory = torch.cuda.graph_pool_handle()

    def record(self, function: Function, x: Tensor) -> Recording:
        """Capture a function of tensors like x, which it has been called with before."""
        graph = torch.cuda.CUDAGraph()
        with self._capturing:
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            # Leaving this also restores the current stream if the capture fails, which torch.cuda.graph does not.
            with torch.cuda.stream(self._stream):
                with torch.inference_mode(False):  # or else it could be written to in that mode only
                    given = torch.empty_like(x)
                function(given.copy_(x))  # for what PyTorch makes once for a stream
                try:
                    with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                        # PyTorch before 2.15 keeps a workspace of cuBLAS for each stream: the graph gets its own.
                        torch._C._cuda_clearCublasWorkspaces()
                        result = function(given)
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
        return Recording(self, given, result, graph.replay)

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """The current stream first waits for the last turn, on whatever stream that was."""
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self._done)
        yield
        self._done.record(stream)

    def drain(self) -> None:
        """Wait until the device has finished the last turn."""
        self._done.synchronize()


class Graphs:
    """Runs a function of one tensor by graphs where that is possible, and calls it elsewhere.

    It is called where gradients, autocast, a dispatch mode (which wants to see every operation) or another capture are
    active, and for towers with modules or weights that are not the library's own, whose state is not known here. Copies
    start without graphs.
    """

    pool_type: ClassVar[type[Pool]] = Pool

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warned = False
        self._forget()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def _forget(self) -> None:
        self._seen: Snapshot | None = None
        self._pool: Pool | None = None
        self._recordings: OrderedDict[tuple[object, ...], Recording | None] = OrderedDict()  # None: it cannot be
        self._misses = 0

    def clear(self) -> None:
        """Release all graphs and their memory."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        for recording in filter(None, self._recordings.values()):
            recording.pool.drain()
        self._forget()

    def __call__(self, function: Function, x: Tensor, tower: Tower) -> Tensor:
        """function(x), a tensor of the caller's own.

        Args:
            function: depends on nothing but x and the tower, changes nothing, and never waits for the device.
            x: its input.
            tower: what it runs.
        """
        if not self._applies(x):
            return function(x)
        key = x.shape, x.dtype, x.device
        with self._lock:
            lies = self._seen is not None and self._seen.lies()
            recording = self._recordings.get(key) if lies else None
            found = None if recording is None else recording.run(x)  # what it reads is there; is it what is wanted?
            if self._seen is None or not lies or not self._seen.holds(tower):  # while the device computes
                self._drop()
                self._seen, found = Snapshot(tower), None
            if found is not None:
                self._recordings.move_to_end(key)
                return found
            if key not in self._recordings and self._seen.plain and self._make_room():
                result = function(x)  # raises what it has to, so that what fails after it is the capture
                self._recordings[key] = self._record(function, x)
                return result
        return function(x)

    def _applies(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor
            and x.device.type == self.pool_type.device_type
            and not torch.is_grad_enabled()
            and not autocasting(x.device)
            and _get_current_dispatch_mode() is None
            and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _make_room(self) -> bool:
        """Whether there is room for another graph; if all places are taken, only from time to time."""
        if len(self._recordings) < SHAPES:
            return True
        self._misses += 1
        if self._misses % PATIENCE:
            return False
        _, recording = self._recordings.popitem(last=False)
        if recording is not None:
            recording.pool.drain()  # before its memory goes to another
        return True

    def _record(self, function: Function, x: Tensor) -> Recording | None:
        """None, and a warning the first time, if the capture fails."""
        try:
            self._pool = self._pool or self.pool_type(x.device)
            return self._pool.record(function, x)
        except Exception as error:  # of any kind, from whatever cannot be captured
            self._pool = None  # a broken capture may leave it unusable; graphs that are there keep theirs
            reasons: list[str] = []  # the end of a broken capture only says that it is broken
            reason: BaseException | None = error
            while reason is not None:
                reasons.append(f"{type(reason).__name__}: {first_line(reason)}")
                reason = reason.__context__
            if not self._warned:
                warnings.warn(
                    f"a CUDA graph of this tower could not be captured ({', after '.join(reasons)}), so that it runs "
                    "without one; rfclip.refocus(..., cuda_graphs=False) does not try",
                    stacklevel=5,
                )
            self._warned = True
            return None


class Snapshot:
    """What a graph of a tower depends on, except for the values of the weights.

    Attributes:
        plain: whether that is all: modules and weights are PyTorch's and the tower's library's own, without hooks.
    """

    def __init__(self, tower: Tower) -> None:
        self._roots = tower.roots
        self._modules = [module for root in self._roots for module in root.modules()]
        self._types = [*map(type, self._modules)]
        hooks = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        state = [d for m in self._modules for d in (vars(m), m._modules, m._forward_pre_hooks, m._forward_hooks)]
        self._empty = [d for d in (*hooks, *state) if not d]  # most of them, and the quickest to look at
        self._state: list[Mapping[Any, Any]] = [d for d in (*hooks, *state) if d]
        self._copies = [{**d} for d in self._state]
        self._tensors = [held for m in self._modules for held in (m._parameters, m._buffers) if held]
        self._kinds, tensors = self._held()
        self._places, self._dtypes = [*map(Tensor.data_ptr, tensors)], [*map(DTYPE, tensors)]
        self._shapes, self._strides = [tuple(t.shape) for t in tensors], [t.stride() for t in tensors]
        self.plain = (
            not any(hooks)
            and not any(map(tower.beyond, self._modules))
            and {*self._kinds} <= {nn.Parameter, Tensor, type(None)}
        )

    def _held(self) -> tuple[list[type], list[Tensor]]:
        """The types of all weights that modules have or could have, and the weights."""
        held = [tensor for each in self._tensors for tensor in each.values()]
        return [*map(type, held)], [tensor for tensor in held if tensor is not None]

    def lies(self) -> bool:
        """Whether each weight lies where it did, and as it did: then nothing that a graph reads has been freed."""
        try:
            kinds, tensors = self._held()
            return (
                kinds == self._kinds
                and [*map(Tensor.data_ptr, tensors)] == self._places
                and [*map(DTYPE, tensors)] == self._dtypes
                and all(map(assert_size_stride, tensors, self._shapes, self._strides))
            )
        except (AssertionError, RuntimeError, TypeError):  # it lies in another way, or does not tell
            return False

    def holds(self, tower: Tower) -> bool:
        """Whether all but the weights is as it was."""
        try:
            return (
                tower.roots == self._roots
                and [*map(type, self._modules)] == self._types
                and not any(self._empty)
                and self._state == self._copies  # values are compared only if they are other objects
            )
        except (RuntimeError, ValueError, TypeError):  # tensors and arrays that cannot be compared are others
            return False
