"""The tiles of the kernels that multiply matrices: by kernel, dtype, head dimension, patches and GPU, from a table.

A table is a JSON file, {"format": "rfclip tiles 1", "entries": [...]}, each entry an object with the attributes of
`Entry`, those of its `Tiles` among them. The one of this package is tiles.json; `make report` compiles each kernel with
it for every architecture, and fails on spills. `python -m rfclip_kernels.autotune` writes one on a GPU, and `use_tiles`
puts it first.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import interpreted

FORMAT = "rfclip tiles 1"
SHIPPED = Path(__file__).with_name("tiles.json")
KERNELS = (
    "row_logsumexp",
    "key_similarity",
    "key_affinity",  # the same kernel, where it makes W
    "received_attention",
    "refocused_attention",
    "self_attention",
    "proxy_attention",
    "cosine_aggregation",
)
DTYPES = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "fp32"}
DIMS = (32, 64, 128)
PATCHES = (256, 1024, 4096)
ALLOWED = {
    "kernel": KERNELS,
    "dtype": ("half", "fp32"),
    "dims": (*DIMS, None),
    "patches": (*PATCHES, None),
    "rows": (16, 32, 64, 128, 256),
    "columns": (16, 32, 64, 128, 256),
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 5, 6),
}
ARCHITECTURE = re.compile(r"sm_[0-9]+|gfx[0-9a-f]+")


@dataclass(frozen=True)
class Tiles:
    """How a kernel is launched.

    Attributes:
        rows, columns: of a tile of products, BM and BN.
        warps: of a program.
        stages: of the pipeline that loads run in; 1 on AMD, and 2 on NVIDIA, let no load run ahead of a product.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {"BM": self.rows, "BN": self.columns, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class Entry:
    """Which launches use tiles.

    Attributes:
        kernel: one of `KERNELS`.
        dtype: "half", which is float16 and bfloat16, or "fp32".
        dims: the largest head dimension, one of `DIMS`, or None for any.
        patches: the most patches, one of `PATCHES`, or None for any number: N where a program makes a tile of S or W,
            and B N elsewhere.
        architectures: of GPUs, such as "sm_90" and "gfx942".
        tiles: what they use.
    """

    kernel: str
    dtype: str
    dims: int | None
    patches: int | None
    architectures: tuple[str, ...]
    tiles: Tiles

    def __str__(self) -> str:
        limits = {"D": self.dims, "patches": self.patches}
        return " ".join([self.kernel, self.dtype, *(f"{name}<={most}" for name, most in limits.items() if most)])


SIDES = [field.name for field in fields(Tiles)]
LAUNCHES = [field.name for field in fields(Entry) if field.name != "tiles"]
_used: tuple[Entry, ...] = ()


def read(path: str | Path) -> tuple[Entry, ...]:
    """The entries of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table of tiles; the message says what was expected where.
    """
    try:
        table = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("entries"), list):
        raise ValueError(f'{path}: expected {{"format": "{FORMAT}", "entries": [...]}}, got {_shown(table)}')
    return tuple(_entry(f"{path}: entry {number}", given) for number, given in enumerate(table["entries"]))


def _entry(where: str, given: Any) -> Entry:
    """An entry of a file, checked."""
    if not isinstance(given, dict) or given.keys() != {*LAUNCHES, *SIDES}:
        raise ValueError(f"{where}: expected an object with {', '.join(LAUNCHES + SIDES)}, got {_shown(given)}")
    for name, allowed in ALLOWED.items():
        if given[name] not in allowed or isinstance(given[name], (bool, float)):  # True == 1 and 64.0 == 64
            raise ValueError(f"{where}: {name} must be one of {_shown(allowed)}, got {_shown(given[name])}")
    names = given["architectures"]
    if not isinstance(names, list) or not all(isinstance(each, str) and ARCHITECTURE.fullmatch(each) for each in names):
        raise ValueError(f'{where}: architectures must be a list such as ["sm_90", "gfx942"], got {_shown(names)}')
    if given["kernel"] in ("key_similarity", "key_affinity") and given["columns"] > given["rows"]:
        raise ValueError(f"{where}: columns must not exceed rows, got {given['columns']} and {given['rows']}")
    launches = {name: given[name] for name in LAUNCHES} | {"architectures": tuple(names)}
    return Entry(**launches, tiles=Tiles(*(given[name] for name in SIDES)))


def _shown(value: object) -> str:
    """As JSON, cut off."""
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def text(entries: Iterable[Entry]) -> str:
    """A file with these entries, each on a line."""
    flat = [asdict(each) for each in entries]
    lines = [json.dumps(each | each.pop("tiles")) for each in flat]
    return f'{{"format": "{FORMAT}", "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def use(entries: Sequence[Entry]) -> None:
    """Put entries before those of the package, in this process, in place of earlier ones."""
    global _used
    _used = tuple(entries)
    _chosen.cache_clear()


def use_tiles(path: str | Path) -> dict[str, list[str]]:
    """Use a file that `python -m rfclip_kernels.autotune` wrote, in this process, before the package's own table.

    Its entries hold for the architectures that they name, and no others. What torch.compile or a CUDA graph has
    captured keeps its tiles.

    Returns:
        The entries for each architecture, in words such as "key_affinity half D<=64 patches<=1024".

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table of tiles; the message says what was expected where.
    """
    entries = read(path)
    use(entries)
    names = dict.fromkeys(name for each in entries for name in each.architectures)
    return {name: [str(each) for each in entries if name in each.architectures] for name in names}


@cache
def architecture(device: torch.device) -> str:
    """What kernels are compiled for on a device, such as "sm_90" or "gfx942".

    In the interpreter, and for tensors without data where there is no GPU, it is the oldest one of the table: sm_80,
    or gfx942 where PyTorch was built for ROCm.
    """
    if interpreted() or not torch.cuda.is_available():
        return "sm_80" if torch.version.hip is None else "gfx942"
    if torch.version.hip is None:
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def limit(kernel: str, images: int, patches: int) -> int | None:
    """`Entry.patches` for a launch: the lowest of `PATCHES` that N, or B N, does not exceed."""
    alone = ("key_similarity", "key_affinity", "refocused_attention")
    count = patches if kernel in alone else images * patches
    return next((most for most in PATCHES if count <= most), None)


def choose(kernel: str, x: Tensor, images: int, patches: int, dims: int | None = None) -> Tiles:
    """The tiles of a launch on x's device and in its dtype.

    Args:
        kernel: one of `KERNELS`.
        x: one of the matrices that are multiplied.
        images, patches: B and N; for a few, tiles are small, so that there are enough programs for a GPU.
        dims: the head dimension, for kernels that have one.
    """
    return _chosen(kernel, DTYPES[x.dtype], dims, limit(kernel, images, patches), architecture(x.device))


@cache
def _chosen(kernel: str, dtype: str, dims: int | None, patches: int | None, architecture: str) -> Tiles:
    """Those of the entry that holds and has the lowest limits, that of the patches first."""

    def holding(table: Sequence[Entry], architecture: str) -> list[Entry]:
        return [
            each
            for each in table
            if (each.kernel, each.dtype) == (kernel, dtype)
            and architecture in each.architectures
            and _within(dims, each.dims)
            and _within(patches, each.patches)
        ]

    found = holding(_used, architecture) or holding(shipped(), nearest(architecture))
    return min(found, key=lambda each: (each.patches or math.inf, each.dims or math.inf)).tiles


def _within(value: int | None, most: int | None) -> bool:
    return most is None or (value is not None and value <= most)


@cache
def shipped() -> tuple[Entry, ...]:
    """The table of this package."""
    return read(SHIPPED)


def nearest(architecture: str) -> str:
    """The architecture of the package's table that code for another is likeliest to be like.

    That is itself, or the newest one before it, or else the oldest, of the same maker.
    """
    maker, number = _version(architecture)
    known = {_version(each)[1]: each for entry in shipped() for each in entry.architectures if each.startswith(maker)}
    return known[max((each for each in known if each <= number), default=min(known))]


def _version(architecture: str) -> tuple[str, int]:
    """The maker's prefix and a number that grows with time."""
    maker = architecture.rstrip("0123456789abcdef")
    return maker, int(architecture.removeprefix(maker), 16)
