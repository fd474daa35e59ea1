"""What the benchmarks of single operations share: the clock that times them."""

import pytest
import torch

from bench.measure import DEVICE, DTYPE_NAME, DeviceClock, captured


def pytest_report_header():
    if DEVICE == "cuda":
        return f"timed on the device, by its own events: {torch.cuda.get_device_name()}"
    return "no GPU: times are of the CPU, and the Triton kernels are skipped"


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda":
        clock = DeviceClock()
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def timed(benchmark):
    """Time a function without arguments; on a GPU as a CUDA graph, on request."""

    def run(function, group, graph=False):
        benchmark.group = f"{group}, {DEVICE}, {DTYPE_NAME}"
        benchmark.extra_info["cuda_graph"] = graph and DEVICE == "cuda"
        with torch.inference_mode():
            function = captured(function) if graph else function
            benchmark.pedantic(function, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=2)

    return run
