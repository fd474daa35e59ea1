"""Projected, not measured: the least time that the launches of the Triton kernels can take on GPUs not available here.

The time of an operation is the longer of its matrix operations at the peak rate and its bytes at the peak bandwidth.
Both are counted from the launches that it makes, see `tools.kernel_report.launches`. Other arithmetic, latencies and
launches count as nothing, so that every kernel will be slower than this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rfclip_kernels.registry import Example
from tools.kernel_report.launches import OPS, SHAPES, Shape, record


@dataclass(frozen=True)
class GPU:
    """`flops`: dense fp16 products summed in fp32, a second; `bandwidth`: bytes a second; `torch`: part of its name."""

    flops: float
    bandwidth: float
    torch: str


# NVIDIA's "Ampere GA102 GPU Architecture" whitepaper (RTX 3090: 71 TFLOPS with FP32 accumulate, 936 GB/s), the A100
# data sheet (SXM, 80 GB: 312 TFLOPS, 2039 GB/s) and the H100 data sheet (SXM: 1979 TFLOPS with sparsity, so half of it
# without, and 3.35 TB/s).
GPUS = {
    "RTX 3090": GPU(71e12, 936e9, "RTX 3090"),
    "A100 SXM 80 GB": GPU(312e12, 2039e9, "A100-SXM4-80GB"),
    "H100 SXM": GPU(989.5e12, 3350e9, "H100 80GB HBM3"),
}


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
    matrix = (launch for launch in recording.launches if launch.products.tiles is not None)
    return Work(sum(float(launch.operations.mean()) for launch in matrix), recording.moved)


def linear(rows: int, inputs: int, outputs: int) -> Work:
    """A linear layer in fp16."""
    return Work(2.0 * rows * inputs * outputs, 2.0 * (rows * inputs + inputs * outputs + rows * outputs))


def block(shape: Shape, whole: bool = True) -> list[Work]:
    """The linear layers of one block, or of the last one, from which dense features take only the attention's."""
    T, d = shape.sizes.T, shape.sizes.d
    attention = [linear(T, d, 3 * d), linear(T, d, d)]
    return attention + [linear(T, d, 4 * d), linear(T, 4 * d, d)] if whole else attention


def plain_tower(shape: Shape) -> list[Work]:
    """The linear layers, and flash attention that reads q, k and v once and writes as much as one of them."""
    tokens, d = shape.sizes.T, shape.sizes.d
    attention = Work(4.0 * tokens**2 * d, 2.0 * 4 * tokens * d)
    return shape.sizes.L * [*block(shape), attention]


def refocused_tower(shape: Shape, counted: dict[str, Work]) -> list[Work]:
    """The linear layers and the operators that `rfclip.dense_features` calls with the preset of the model."""
    L = shape.sizes.L
    calls = {
        "distraction_mask": L,
        "redistribute_embeddings": L,
        "received_attention": L if shape.model == "ViT-L/14" else 0,
        "key_similarity, first block": 1,
        "key_similarity, later block": L - 2,
        "fiedler_vector": L - 1,
        "defocus_mask": L - 1,
        "refocused_attention": L - 1,
        "proxy_attention": 1,
    }
    linears = (L - 1) * block(shape) + block(shape, whole=False)
    return linears + [counted[name] for name, times in calls.items() for _ in range(times)]


def project() -> Iterator[Projection]:
    """Every operator and both towers at every shape."""
    for shape in SHAPES:
        counted = {op.name: count(op, shape) for op in OPS}
        rows = {name: [work] for name, work in counted.items()}
        rows |= {"plain tower": plain_tower(shape), "RF-CLIP tower": refocused_tower(shape, counted)}
        for name, works in rows.items():
            seconds = {gpu: sum(work.seconds(peak) for work in works) for gpu, peak in GPUS.items()}
            yield Projection(name, shape.model, shape.image, seconds)


def peak_of(device_name: str) -> GPU | None:
    """The peaks of the GPU that PyTorch calls so, if known."""
    return next((gpu for gpu in GPUS.values() if gpu.torch in device_name), None)
