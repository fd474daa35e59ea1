"""Create a virtual environment that sees the PyTorch of the Python that runs this, or else holds a new one.

python tools/environment.py FOLDER
"""

import subprocess
import sys
import venv
from pathlib import Path

FLOOR = "2.8"
PAIR = Path(__file__).parent / "requirements-torch.txt"


def present() -> str:
    """The folders in which this Python finds its packages, if PyTorch is among them and recent enough; else nothing."""
    try:
        import torch
        import torchvision  # noqa: F401  fails where it does not match torch
    except Exception as error:  # of any kind: a broken installation is as good as none
        print(f"installing PyTorch (3 GB), since this Python has none that works: {error}")
        return ""
    if torch.__version__ < FLOOR:
        print(f"installing PyTorch (3 GB), since this Python's is {torch.__version__}, and {FLOOR} is needed")
        return ""
    print(f"using PyTorch {torch.__version__} of {sys.prefix}")
    return "\n".join(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))


def create(folder: Path) -> None:
    if folder.is_symlink():  # another checkout's, which would be emptied
        raise SystemExit(f"{folder} is a link to {folder.resolve()}: remove the link, or run make there")
    found = present()
    venv.create(folder, clear=True, with_pip=True)
    python = next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())
    if found:
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
        Path(packages, "present.pth").write_text(found + "\n", "utf-8")
    else:
        install = (python, "-m", "pip", "install", "--quiet", "--no-compile")  # Python compiles what it imports
        subprocess.run([*install, "--requirement", PAIR], check=True)


if __name__ == "__main__":
    create(Path(sys.argv[1]))
