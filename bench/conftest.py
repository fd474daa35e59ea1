"""What every benchmark shares: where it runs, in which dtype, and what its clock measures."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def pytest_report_header():
    if DEVICE == "cuda":
        return f"timed on the device, by its own events: {torch.cuda.get_device_name()}"
    return "no GPU here: nothing is timed on a device; times are of the CPU, and the Triton kernels are skipped"


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda":
        clock = DeviceClock()
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=clock))


class DeviceClock:
    """Seconds on the device's own timeline."""

    def __init__(self):
        self.start = torch.cuda.Event(enable_timing=True)
        self.start.record()

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self.start.elapsed_time(now) / 1000


@pytest.fixture
def timed(benchmark):
    """Time a function without arguments; on a GPU as a CUDA graph, if asked to."""

    def run(function, group, graph=False):
        benchmark.group = f"{group}, {DEVICE}, {str(DTYPE).removeprefix('torch.')}"
        graph = graph and DEVICE == "cuda"
        benchmark.extra_info["cuda_graph"] = graph
        with torch.inference_mode():
            function = captured(function) if graph else function
            benchmark.pedantic(function, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=2)

    return run


def captured(function):
    """The function as a CUDA graph, so that the host's launching of its kernels is not what is timed."""
    function()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
