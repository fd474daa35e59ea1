"""Lay the Triton kernels out as Hugging Face's `kernels` loads them, in build/hf-kernels, ready to upload.

python -m tools.hf_kernels

The folder is the whole repository of a kernel on the Hub: README.md and, for each maker of GPUs, a build variant, which
is `rfclip_kernels` with a metadata.json. It is loaded under the name `_rfclip_kernels_cuda_` and a digest of its files,
so that a process can hold two versions, and an installed `rfclip_kernels` next to them.
"""

import hashlib
import json
import shutil
from pathlib import Path

import rfclip_kernels

NAME, VERSION = "rfclip-kernels", 1  # the version rises when a function changes what it takes or returns
BACKENDS = "cuda", "rocm"
SOURCE = Path(rfclip_kernels.__file__).parent
README = """---
library_name: kernels
license: mit
tags: [kernels, triton, clip, segmentation]
---
# {name}

The operations of RF-CLIP (https://arxiv.org/abs/2511.16170) and of its peers as Triton kernels, for NVIDIA and AMD
GPUs. They need no more than PyTorch with Triton.

```python
from kernels import get_kernel

kernel = get_kernel("OWNER/{name}", version={version}, trust_remote_code=True)
out = kernel.refocused_attention(q, k, v, distraction, target, 0.7)  # q, k, v: [B, H, T, D] on a GPU
```

Each function checks its arguments; `help(kernel.refocused_attention)` says what they are. The operations are:

{operations}
"""


def lay_out(folder: Path) -> None:
    """Write the repository's files into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    for backend in BACKENDS:
        variant = folder / f"build/torch-{backend}"
        shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__"))
        files = b"".join(path.read_bytes() for path in sorted(variant.iterdir()))
        unique = hashlib.blake2b(files, digest_size=4).hexdigest()
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{unique}",
            "version": VERSION,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    operations = "\n".join(f"- `{name}`" for name in rfclip_kernels.__all__)
    (folder / "README.md").write_text(README.format(name=NAME, version=VERSION, operations=operations), "utf-8")


if __name__ == "__main__":
    lay_out(Path("build/hf-kernels"))
