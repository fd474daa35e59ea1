"""Compile every kernel for real GPUs, without one, and print what the compiler made of it.

python -m rfclip_kernels.report

A line is a kernel, a head dimension, a dtype and an architecture: registers a thread, spilled bytes, shared memory, and
tensor-core instructions. The exit code is 1 where a kernel fails to compile, spills, or multiplies matrices without
tensor cores. Arguments are specialized as a launch would: pointers and strides that are multiples of 16, unit strides
of the last axis.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from rfclip_kernels import attention, distraction, similarity

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = (32, 64, 80, 96, 128)
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|v_mfma\w*)\b")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "order_ptr": "*i32",
    "taken_ptr": "*i1",
    "count_ptr": "*i32",
    "mask_ptr": "*i1",
    "lse_ptr": "*fp32",
    "running_ptr": "*fp32",
}


@dataclass(frozen=True)
class Variant:
    """A kernel with the constants and options of one launch."""

    kernel: triton.runtime.JITFunction
    name: str
    dtype: str
    constants: dict[str, object]
    options: dict[str, int]
    multiplies: bool = True
    output: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a variant: `spilled` in bytes a thread, `shared` in bytes a program."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: int

    def faults(self, variant: Variant) -> list[str]:
        faults = [f"spills {self.spilled} bytes"] if self.spilled else []
        return faults + ["no tensor cores"] if variant.multiplies and not self.tensor_cores else faults


def variants(target: str) -> Iterator[Variant]:
    """Every kernel as it is launched on `target`."""
    for dtype in DTYPES:
        common = {"DIMS": (4, 162, 189, 326, 429, 474, 633, 713), "BN": distraction.BLOCK_TOKENS, "stride_xd": 1}
        scores = common | {"SHIFTED": True, "BD": distraction.BLOCK_WIDTH}
        kernel = distraction.distraction_scores_kernel
        yield Variant(kernel, "distraction_scores", dtype, scores | {"MASK": False}, {}, False, "*fp32")
        yield Variant(kernel, "distraction_mask", dtype, scores | {"MASK": True}, {}, False, "*i1")
        window = common | {"SIZE": 3, "stride_mn": 1}
        yield Variant(distraction.redistribute_kernel, "redistribute_embeddings", dtype, window, {}, False)
    for dtype, D in ((dtype, D) for dtype in DTYPES for D in HEAD_DIMS):
        hip = TARGETS[target].backend == "hip"
        tiles = attention.launch_options(D, DTYPES[dtype], hip)
        options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
        units = {f"stride_{name}d": 1 for name in "qkv"}
        constants = tiles | units | {"D": D, "PRECISION": attention.precision(hip)}
        for module, name, output in (
            (attention, "refocused_attention", None),
            (attention, "proxy_attention", None),
            (similarity, "row_logsumexp", "*fp32"),
            (similarity, "key_similarity", "*fp32"),
            (similarity, "received_attention", "*fp32"),
        ):
            kernel = getattr(module, f"{name}_kernel")
            used = {key: value for key, value in constants.items() if key in kernel.arg_names}
            yield Variant(kernel, f"{name} D={D}", dtype, used, options, output=output)


def compile_variant(variant: Variant, target: GPUTarget) -> CompiledKernel:
    signature, attributes = {}, {}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            default = variant.output if name == "out_ptr" and variant.output else f"*{variant.dtype}"
            signature[name] = POINTERS.get(name, default)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("beta", "scale", "threshold"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_") and name[-2] in "qkvx":
                attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {(variant.kernel.arg_names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=variant.options)


def inspect(compiled: CompiledKernel) -> Outcome:
    """Read registers, spills and instructions out of the machine code."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Outcome(registers, 4 * spilled, shared, len(TENSOR_CORES.findall(text)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Outcome(registers, stack, shared, len(TENSOR_CORES.findall(code)))


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> int:
    print("| kernel | dtype | target | registers | spilled bytes | shared bytes | tensor-core instructions |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    faults = []
    for name, target in TARGETS.items():
        for variant in variants(name):
            label = f"{variant.name}, {variant.dtype}, {name}"
            try:
                outcome = inspect(compile_variant(variant, target))
            except Exception as error:  # any kind, from any compiler: it is what this report is for
                faults.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            o = outcome
            row = (variant.name, variant.dtype, name, o.registers, o.spilled, o.shared, o.tensor_cores)
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            faults += [f"{label}: {fault}" for fault in outcome.faults(variant)]
    print("\n".join(faults) or "No failed compile, no spill, tensor cores in every matrix kernel.", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
