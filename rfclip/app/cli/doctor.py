"""`rfclip info` and `rfclip doctor`."""

from __future__ import annotations

import typer
from rich.table import Column, Table

from rfclip import __version__
from rfclip.app.cli import common

# What decides how rfclip runs, then what its extras bring.
PACKAGES = ("torch", "torchvision", "triton", "open_clip_torch", "timm", "transformers", "numpy", "pillow", "tifffile")
EXTRAS = ("gradio", "matplotlib", "scipy", "scikit-learn", "torchmetrics", "pyarrow", "ray", "av", "rasterio")


def info(device: common.Device = "cpu", backend: common.Backend = "auto", as_json: common.Json = False) -> None:
    """Say what is installed, which backend runs on a device, and why."""
    with common.clear_errors():
        facts = _facts(device, backend)
        if as_json:
            common.answer_json(facts)
        else:
            _print(facts)


def doctor(device: common.Device = "cpu", backend: common.Backend = "auto", as_json: common.Json = False) -> None:
    """Check every operation on a device against the reference, in seconds; what it prints belongs in a bug report."""
    with common.clear_errors():
        import torch

        from rfclip.ops import choose
        from rfclip.ops.selftest import check_operations

        facts = _facts(device, backend)
        place = common.available(device)
        chosen = choose(backend, place, torch.float32).backend
        dtypes = [torch.float32, torch.float16] if place.type == "cuda" else [torch.float32]
        checked, faults = 0, {}
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            largest = 0.0
            with common.console.status(f"checking the operations in {kind}"):
                for outcome in check_operations(chosen, place, dtype):
                    checked += 1
                    if outcome.fault:
                        faults[f"{outcome.name}, {kind}"] = outcome.fault
                    else:
                        largest = max(largest, outcome.error)
            facts[f"largest error in {kind}"] = f"{largest:.1e}"
        facts["self-test"] = f"{checked - len(faults)} of {checked} operations agree with the reference"
        if as_json:
            common.answer_json(facts | {"faults": faults})
        else:
            _print(facts | {f"fault in {name}": fault for name, fault in faults.items()})
    raise typer.Exit(1 if faults else 0)


def _facts(device: str, backend: str) -> dict[str, str]:
    import os
    from importlib.metadata import PackageNotFoundError, version
    from platform import platform, python_version

    import torch

    from rfclip.ops import choose
    from rfclip.ops.dispatch import backend as find_backend

    facts = {"rfclip": __version__, "python": f"{python_version()}, {platform()}"}
    for package in (*PACKAGES, *EXTRAS):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    gpus = [
        f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).total_memory >> 30} GiB, "
        f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability(index)))}"
        for index in range(torch.cuda.device_count())
    ]
    facts["GPUs"] = "; ".join(gpus) or "none that PyTorch can use"
    facts["CUDA, ROCm"] = f"{torch.version.cuda or '-'}, {torch.version.hip or '-'}"
    facts["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in PyTorch"
    chosen = choose(backend, common.available(device), torch.float32)
    facts[f"backend on {device}"] = f"{chosen.backend}: {chosen.reason}"
    facts["operations it takes from the reference"] = ", ".join(find_backend(chosen.backend).borrowed) or "none"
    return facts


def _print(facts: dict[str, str]) -> None:
    table = Table(*(Column(overflow="fold") for _ in range(2)), show_header=False)
    for name, fact in facts.items():
        table.add_row(name, fact)
    common.out_console.print(table)
