"""The names that README and docs use, as attributes of a bare `import rfclip` and by import statements."""

import importlib.util
import os
import subprocess
import sys

import pytest

import rfclip

ATTRIBUTES = [
    *(f"rfclip.{name}" for name in rfclip.__all__),
    "rfclip.methods.METHODS",
    "rfclip.presets.PRESETS",
    "rfclip.outputs.read_masks",
    "rfclip.reference.key_similarity",
    "rfclip.reference.pamr",
]
STATEMENTS = [
    "from rfclip import Segmenter, refocus, dense_features, calibrate, explain, load_model, RefocusConfig",
    "from rfclip import reference, methods, outputs, config",
    "from rfclip.methods import METHODS, Protocol, find_method",
    "from rfclip.reference import distraction_mask, fiedler_vector, upsample_argmax",
    "from rfclip.outputs import read_masks",
    "from rfclip.config import RefocusConfig",
    "from rfclip.presets import PRESETS",
    "import rfclip.plugin, rfclip.calibration, rfclip.explanation; rfclip.refocus, rfclip.calibrate, rfclip.explain; "
    "assert callable(rfclip.explain) and callable(rfclip.calibrate) and callable(rfclip.refocus)",
]
if importlib.util.find_spec("triton"):
    STATEMENTS.append("from rfclip_kernels import refocused_attention, proxy_attention, average_windows")
FORKS = """
import os, sys
import open_clip
for statement in sys.argv[1:]:
    if not (child := os.fork()):
        exec(f"import rfclip\\n{statement}")
        print(statement, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_each_name_after_a_bare_import():
    """Each in the same fresh process, first the last, so that no name depends on another."""
    code = "import rfclip\n" + "\n".join(reversed(ATTRIBUTES)) + "\nprint('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_import_statements():
    """Each in a process that has imported nothing of this package, but open_clip, which takes seconds."""
    done = subprocess.run([sys.executable, "-c", FORKS, *STATEMENTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, STATEMENTS), done.stderr


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'segmenter'"):
        rfclip.segmenter  # noqa: B018
    assert set(rfclip.__all__) <= set(dir(rfclip))
