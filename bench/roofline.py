"""Projected, not measured: the least time that the launches of the Triton kernels can take on GPUs not available here.

The time of an operation is the longer of its matrix operations at the peak rate and its bytes at the peak bandwidth.
Both are counted from the launches that it makes, see `tools.kernel_report.launches`. Other arithmetic, latencies and
launches count as nothing, so that every kernel will be slower than this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rfclip_kernels.registry import Example
from tools.kernel_report import forward
from tools.kernel_report.forward import GPU, GPUS
from tools.kernel_report.launches import OPS, Shape, record


@dataclass(frozen=True)
class Work:
    """Matrix operations, and bytes moved."""

    operations: float
    moved: float

    def seconds(self, gpu: GPU) -> float:
        return max(self.operations / gpu.flops, self.moved / gpu.bandwidth)


@dataclass(frozen=True)
class Projection:
    """A line of the report: projected seconds by GPU."""

    name: str
    model: str
    image: str
    seconds: dict[str, float]


def count(op: Example, shape: Shape) -> Work:
    """The work of one call; where it depends on how many keys are targets, the mean."""
    recording = record(op, shape)
    return Work(sum(step.operations for step in recording.steps), recording.moved)


def project(shapes: Iterable[Shape]) -> Iterator[Projection]:
    """Every operator and both towers at every shape."""
    for shape in shapes:
        counted = {op.name: count(op, shape) for op in OPS}
        rows = {name: [work] for name, work in counted.items()}
        for name, steps in zip(("plain tower", "RF-CLIP tower"), forward.count(shape, 1), strict=True):
            rows[name] = [Work(step.operations, step.moved) for step in steps]
        for name, works in rows.items():
            seconds = {gpu: sum(work.seconds(peak) for work in works) for gpu, peak in GPUS.items()}
            yield Projection(name, shape.model, shape.image, seconds)


def peak_of(device_name: str) -> GPU | None:
    """The peaks of the GPU that PyTorch calls so, if known."""
    return next((gpu for gpu in GPUS.values() if gpu.torch in device_name), None)
