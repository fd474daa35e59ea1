"""Compile every kernel for real GPUs, without one, and count what each launch computes and moves.

python -m tools.kernel_report [--summary] [--targets sm_90,gfx942] [--gpu NAME --peak SHARE --bandwidth SHARE
                              --launch US --graph-launch US]

Everything comes from the launches that `tools.kernel_report.launches` records, specialized as Triton would on the GPU.
The report has four tables: a line for each kernel (all that --summary prints), a line for each compilation, operations
and bytes relative to the least possible, and whole forwards beside plain CLIP's, with their projected time.

The exit code is 1 if a kernel fails to compile, spills in a loop, does not fit, or multiplies matrices without tensor
cores, if an attention sweep misses a goal (1.15 times the operations of plain flash attention, 1.10 times the least
bytes), or if a forward misses its goal: launches, passes over the similarity, and projected time over plain CLIP,
both in graphs.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from rfclip_kernels.registry import Example
from tools.kernel_report.forward import FORWARDS, GPUS, Assumptions, Forward, compare
from tools.kernel_report.inductor import in_its_own_process
from tools.kernel_report.launches import OPS, SHAPES, Cost, Launch, Shape, cost, record

HEAD_DIMS = (32, 64, 80, 96, 128)
SIZES = ((224, 224), (336, 448), (672, 896), (1024, 2048))  # of images; each has more patches than a limit of the tiles
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")
# In Triton's GPU code: a loop, a wait for all but the last groups of copies, a load into registers, a store of these in
# shared memory, and where a product ends (a tcgen05.mma at a barrier).
LOOP = re.compile(r"^(?=( *)\S[^\n]*scf\.for [^\n]*\n(.*?)^\1})", re.MULTILINE | re.DOTALL)
WAIT = re.compile(r"async_wait .*num = (\d+)")
LOAD = re.compile(r"(%\w+) = (?:tt\.load|amdg\.buffer_load) ")
STORE = re.compile(r"local_store (%\w+)")
PRODUCT = re.compile(r"tt\.dot |ttng\.warp_group_dot |ttng\.wait_barrier ")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

KERNELS_TITLE = "Ranges over all compilations: head dimensions, dtypes, shapes and targets."
KERNELS_HEADS = "kernel | compilations | registers | spilled bytes | tensor cores | occupancy, NVIDIA | occupancy, AMD"
LINES_TITLE = """\
The worst of each line's compilations. Tensor-core instructions are counted in the PTX (v_mfma in the AMD assembly).
Prefetch is how many products of a loop, or slices of one, end between the start of a load and the wait for it, at
least; 0 means that no load overlaps a product. Occupancy is an estimate: resident warps over the most that an SM (CU)
holds."""
LINES_HEADS = (
    "kernel | dtype | D | target | registers | spilled bytes | shared bytes | tensor-core instructions | prefetch | "
    "occupancy"
)
COSTS_TITLE = """\
Counted, not measured: fp16, batch 1, with the tiles of the CUDA launch. Operations are those of matrix products, with
padding, relative to plain flash attention's with the same tiles (mean and worst over the number of target keys) and to
the least, without padding. Bytes are those of every tensor that a launch or a PyTorch operator reads or writes, once
each, relative to those of the inputs and outputs, once each."""
FORWARDS_TITLE = """\
Whole forwards in fp16, counted: launches of plain CLIP (open_clip with PyTorch's attention and QuickGELU), of the same
under torch.compile, and of RF-CLIP by Triton and by PyTorch, whose operators count as one each; passes over the
similarity in a block, at most, each of 4 N^2 bytes an image. The times are projected, not measured, for {gpu}: each
step takes as long as its operations at {peak:.0%} of the peak rate or its bytes at {bandwidth:.0%} of the bandwidth,
and {launch:.1f} us more, or {graph_launch:.1f} us in a CUDA graph."""
FORWARDS_HEADS = (
    "model | image | batch | plain | compiled | Triton | PyTorch | a block | passes | bytes over plain | "
    "time over plain | in graphs | in graphs, over compiled | goal, in graphs"
)
COSTS_HEADS = "operator | model | image | over flash | worst | over the least | bytes over the least"


@dataclass(frozen=True)
class Target:
    """A GPU architecture, and what one of its SMs (CUs) holds: `shared` in KiB, `registers` of 32 bits.

    Registers are allocated to a warp in multiples of `unit`, from one of four partitions; each program takes `reserved`
    bytes of shared memory.
    """

    gpu: GPUTarget
    warps: int
    programs: int
    shared: int
    registers: int = 65536
    unit: int = 256
    reserved: int = 1024

    def occupancy(self, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> float:
        """Resident warps over the most possible, for programs of `warps` warps; 0 if not even one fits."""
        per_warp = triton.cdiv(registers * self.gpu.warp_size, self.unit) * self.unit
        by_registers = 4 * (self.registers // 4 // per_warp)
        programs = min(self.programs, min(self.warps, by_registers) // warps)
        if shared + self.reserved:
            programs = min(programs, self.shared * 1024 // (shared + self.reserved))
        if tensor_memory:  # columns of sm_100, of which there are 512
            programs = min(programs, 512 // tensor_memory)
        return programs * warps / self.warps


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the register unit and the
# reserved shared memory are those of cuda_occupancy.h, which has the programs of sm_120, too. AMD: the Instinct MI300
# and CDNA 4 ISA guides and LLVM's AMDGPU usage guide: 4 SIMDs of 8 waves, each SIMD with 512 vector registers of 64
# lanes, in units of 8 registers; 64 KiB of shared memory, and 160 on gfx950.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), warps=64, programs=32, shared=164),
    "sm_86": Target(GPUTarget("cuda", 86, 32), warps=48, programs=16, shared=100),
    "sm_89": Target(GPUTarget("cuda", 89, 32), warps=48, programs=24, shared=100),
    "sm_90": Target(GPUTarget("cuda", 90, 32), warps=64, programs=32, shared=228),
    "sm_100": Target(GPUTarget("cuda", 100, 32), warps=64, programs=32, shared=228),
    "sm_120": Target(GPUTarget("cuda", 120, 32), warps=48, programs=24, shared=100),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 32, 32, 64, registers=4 * 512 * 64, unit=8 * 64, reserved=0),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), 32, 32, 160, registers=4 * 512 * 64, unit=8 * 64, reserved=0),
}


@dataclass(frozen=True)
class Job:
    """One compilation, described so that another process can do it."""

    target: str
    module: str
    name: str
    products: str  # "counted" by the registry, "few", or "unknown"
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]


def specialize(launch: Launch, target: str) -> Job:
    """The launch as Triton's own launcher would specialize it, with tensors aligned to 16 bytes."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target].gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    known = "few" if launch.products.few else "unknown" if launch.products.tiles is None else "counted"
    return Job(target, kernel.__module__, kernel.__name__, known, signature, constants, attributes, options)


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a job: `spilled` in bytes per thread, `shared` in bytes per program.

    `tensor_cores` counts instructions of each kind; `prefetch` is None where no loop multiplies.
    """

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_cores: dict[str, int] = field(default_factory=dict)
    prefetch: int | None = None
    occupancy: float = 0.0
    faults: tuple[str, ...] = ()


def compile_job(job: Job) -> Outcome:
    """Compile, and look at the code."""
    kernel = getattr(importlib.import_module(job.module), job.name)
    try:
        source = ASTSource(kernel, job.signature, job.constants, job.attributes)
        compiled = triton.compile(source, target=TARGETS[job.target].gpu, options=job.options)
        return _inspect(compiled, job)
    except Exception as error:  # of any kind, from any compiler: reporting it is the point
        return Outcome(faults=(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",))


def _inspect(compiled: CompiledKernel, job: Job) -> Outcome:
    """Read registers, spills and instructions out of the code."""
    meta, multiplies = compiled.metadata, job.products == "counted" or "tt.dot" in compiled.asm["ttir"]
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        found = [int(re.findall(rf"\.{key}:\s*(\d+)", code)[0]) for key in ("vgpr_count", "vgpr_spill_count")]
        registers, spilled = found[0], 4 * found[1]
        looping = spilled > 0  # or not: this assembly is not looked through
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = (TOOLS / "cuobjdump", "-res-usage", file.name)
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            registers, spilled = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
            looping = spilled > 0 and spills_in_a_loop(Path(file.name))
        code = compiled.asm["ptx"]
    tensor_cores, tensor_memory = Counter(TENSOR_CORES.findall(code)), getattr(meta, "tmem_size", None) or 0
    occupancy = TARGETS[job.target].occupancy(registers, meta.shared, meta.num_warps, tensor_memory)
    faults = {
        f"spills {spilled} bytes": looping,
        "no tensor cores": multiplies and not tensor_cores and job.products != "few",
        "its operations are not counted": multiplies and job.products == "unknown",
        "does not fit": occupancy == 0,
    }
    named = tuple(name for name, found in faults.items() if found)
    ahead = prefetch(compiled.asm["ttgir"])
    return Outcome(registers, spilled, meta.shared, tensor_cores, ahead, occupancy, named)


def spills_in_a_loop(cubin: Path) -> bool:
    """Whether registers are stored to local memory, or loaded from there, between a branch back and its target."""
    command = (TOOLS / "cuobjdump", "-sass", cubin)
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spills, loops = [], []
    for place, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code):
        if re.search(r"\b(STL|LDL)\b", instruction):
            spills.append(int(place, 16))
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if back and int(back[1], 16) < int(place, 16):
            loops.append((int(back[1], 16), int(place, 16)))
    return any(first <= spill <= last for spill in spills for first, last in loops)


def prefetch(code: str) -> int | None:
    """How many products end between the start of a load and the wait for it, at least, in the innermost loops.

    Triton's GPU code copies in groups in the background, or loads into registers that it stores in shared memory later.
    None if no loop multiplies.
    """
    least = []
    for _indent, body in LOOP.findall(code):
        if "scf.for " in body or not PRODUCT.search(body):
            continue
        products, copied, loaded, found = 0, [], {}, []  # when each group of copies, and each load, began
        for line in 8 * body.splitlines():  # no load is so many iterations ahead
            if PRODUCT.search(line):
                products += 1
            elif "async_commit_group" in line:
                copied.append(products)
            elif load := LOAD.search(line):
                loaded[load[1]] = products
            elif (store := STORE.search(line)) and loaded:  # of a value with another name: the last load's
                found.append(products - loaded.get(store[1], max(loaded.values())))
            elif wait := WAIT.search(line):
                done = max(0, len(copied) - int(wait[1]))
                found += [products - start for start in copied[:done]]
                copied = copied[done:]
        least.append(min(found, default=0))
    return min(least, default=None)


@dataclass(frozen=True)
class Line:
    """A line of the second table, for all compilations that agree in everything named here."""

    kernel: str
    dtype: str
    D: object
    target: str

    def __str__(self) -> str:
        return f"{self.kernel} | {self.dtype} | {self.D} | {self.target}"


def jobs(targets: Iterable[str] = TARGETS) -> dict[Line, list[Job]]:
    """Every distinct compilation, with each target's tiles.

    Of all sizes in fp16 for each head dimension; in fp32 at the smallest and the largest size, and in bf16, which has
    the tiles of fp16, for 64 dimensions. Those that differ only in what is known to be divisible by 16 are all compiled
    for the towers' own shapes, and once for others.
    """
    lines: dict[Line, dict[str, Job]] = defaultdict(dict)
    found: dict[Line, set[str]] = defaultdict(set)
    widths = [
        Shape("ViT-B/16", size, dtype, D)
        for size in SIZES
        for dtype in DTYPES
        for D in HEAD_DIMS
        if dtype == torch.float16 or (size in (SIZES[0], SIZES[-1]) and (dtype == torch.float32 or D == 64))
    ]
    calls = [
        (op, shape) for op in OPS for shape in SHAPES + widths if shape.D == 64 or (op.sweep and op.sweep.head_dims)
    ]
    for name in targets:
        recorded = [(shape, launch) for op, shape in calls for launch in record(op, shape, name).launches]
        for shape, launch in recorded:
            first = next(value for value in launch.arguments.values() if isinstance(value, MockTensor))
            D = "-" if launch.products.tiles is None else launch.arguments.get("D", "-")
            job = specialize(launch, name)
            line = Line(launch.kernel.__name__.removesuffix("_kernel"), DTYPES.get(first.dtype, "-"), D, name)
            alike = repr(replace(job, attributes={}))
            if shape in SHAPES or alike not in found[line]:
                lines[line][repr(job)] = job
            found[line].add(alike)
    return {line: list(each.values()) for line, each in lines.items()}


def compile_all(lines: dict[Line, list[Job]]) -> dict[Line, list[Outcome]]:
    """Compile on all cores."""
    todo = [job for found in lines.values() for job in found]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(todo)), get_context("spawn")) as pool:
        outcomes = pool.map(compile_job, todo, chunksize=4)
        return {line: [next(outcomes) for _ in found] for line, found in lines.items()}


def kernel_rows(compiled: dict[Line, list[Outcome]]) -> list[tuple]:
    """The first table."""
    rows = []
    for kernel in dict.fromkeys(line.kernel for line in compiled):
        found = [(line, one) for line, outcomes in compiled.items() if line.kernel == kernel for one in outcomes]
        nvidia, amd = (
            [one.occupancy for line, one in found if line.target.startswith("sm") == is_sm] for is_sm in (True, False)
        )
        tensor_cores = [bool(one.tensor_cores) for _, one in found]
        rows.append(
            (
                kernel,
                len(found),
                _span([one.registers for _, one in found]),
                max(one.spilled for _, one in found),
                "yes" if all(tensor_cores) else "not all" if any(tensor_cores) else "-",
                _span(nvidia, "{:.0%}"),
                _span(amd, "{:.0%}"),
            )
        )
    return rows


def _span(values: list[float], form: str = "{}") -> str:
    ends = dict.fromkeys(form.format(end(values)) for end in (min, max)) if values else ["-"]
    return "-".join(ends)


def line_rows(compiled: dict[Line, list[Outcome]]) -> list[tuple]:
    """The second table: the worst of each line's compilations."""
    rows = []
    for line, found in compiled.items():
        registers, spilled, shared = (
            max(getattr(one, name) for one in found) for name in ("registers", "spilled", "shared")
        )
        kinds = dict.fromkeys(kind for one in found for kind in one.tensor_cores)
        counts = ", ".join(f"{min(one.tensor_cores.get(kind, 0) for one in found)} {kind}" for kind in kinds)
        ahead = min((one.prefetch for one in found if one.prefetch is not None), default="-")
        occupancy = min(one.occupancy for one in found)
        rows.append((line, registers, spilled, shared, counts or "-", ahead, f"{occupancy:.0%}"))
    return rows


def cost_rows(costs: dict[tuple[Example, Shape], Cost]) -> list[tuple]:
    """The third table."""
    rows = []
    for (op, shape), found in costs.items():
        ratios = (found.flash, found.flash_worst, found.least, found.moved)
        shown = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        rows.append((op.name, shape.model, shape.image, *shown))
    return rows


def forward_rows(forwards: list[Forward], assumed: Assumptions) -> list[tuple]:
    """The last table."""
    rows = []
    for each in forwards:
        shape, (own, others) = each.goal.shape, each.launches
        moved = sum(step.moved for step in each.refocused) / sum(step.moved for step in each.plain)
        times = [
            assumed.seconds(each.refocused, graph=graph) / assumed.seconds(baseline, graph=graph)
            for baseline, graph in ((each.plain, False), (each.plain, True), (each.compiled, True))
        ]
        launches = len(each.plain), len(each.compiled), own, others, f"{(own + others) / shape.sizes.L:.0f}"
        ratios = [f"{each.passes:.1f}", *(f"{ratio:.2f}" for ratio in (moved, *times))]
        rows.append((shape.model, shape.image, each.goal.batch, *launches, *ratios, each.goal.time or "-"))
    return rows


def table(title: str, heads: str, rows: Iterable[tuple]) -> str:
    """A Markdown table below its title."""
    lines = [f"| {heads} |", f"|{' --- |' * (heads.count('|') + 1)}"]
    return "\n".join([f"{title}\n", *lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""])


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_report", description=__doc__.splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="print only the first table, a line for each kernel")
    parser.add_argument("--targets", default=",".join(TARGETS), help="what kernels are compiled for")
    assumed = Assumptions()
    parser.add_argument("--gpu", choices=GPUS, default=assumed.gpu, help="of the projection")
    parser.add_argument("--peak", type=float, default=assumed.peak, help="share of the peak rate that is reached")
    parser.add_argument("--bandwidth", type=float, default=assumed.bandwidth, help="share of the bandwidth")
    parser.add_argument("--launch", type=float, default=assumed.launch, help="microseconds that a launch costs")
    parser.add_argument("--graph-launch", type=float, default=assumed.graph_launch, help="the same in a CUDA graph")
    given = vars(parser.parse_args(arguments))
    summary, targets = given.pop("summary"), given.pop("targets").split(",")
    if unknown := set(targets) - TARGETS.keys():
        parser.error(f"--targets {', '.join(sorted(unknown))}: expected some of {', '.join(TARGETS)}")
    assumed = Assumptions(**given)
    generated = in_its_own_process()  # beside the others, since it takes long
    compiled = compile_all(jobs(targets))
    costs = {(op, shape): cost(op, shape) for op in OPS for shape in SHAPES}
    print(table(KERNELS_TITLE, KERNELS_HEADS, kernel_rows(compiled)))
    forwards = [compare(*each) for each in zip(FORWARDS, generated(), strict=True)]
    if not summary:
        print(table(LINES_TITLE, LINES_HEADS, line_rows(compiled)))
        print(table(COSTS_TITLE, COSTS_HEADS, cost_rows(costs)))
        print(table(FORWARDS_TITLE.format(**vars(assumed)), FORWARDS_HEADS, forward_rows(forwards, assumed)))
    faults = [f"{line}: {fault}" for line, found in compiled.items() for one in found for fault in one.faults]
    for (op, shape), found in costs.items():
        missed = found.missed() if op.sweep and op.sweep.goal else []
        faults += [f"{op.name} | {shape.model} | {shape.image}: {goal}" for goal in missed]
    for each in forwards:
        name = f"{each.goal.shape.model} | {each.goal.shape.image} | batch {each.goal.batch}"
        faults += [f"{name}: {missed}" for missed in each.missed(assumed)]
    clean = "No failed compile, no spill in a loop, tensor cores in every matrix kernel, goals met."
    print("\n".join(faults) or clean, file=sys.stderr)
    return 1 if faults else 0
