"""The environment of `make test`: around the PyTorch that is there, if that is recent enough."""

import os
import subprocess

import torch
from torch.torch_version import TorchVersion

from tools import environment


def test_it_sees_the_pytorch_that_is_there(tmp_path):
    environment.create(tmp_path / "env")
    python = tmp_path / ("env/bin/python" if os.name == "posix" else "env/Scripts/python.exe")
    ask = "import sys, torch; print(torch.__file__, sys.prefix, sep='\\n')"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [torch.__file__, str(tmp_path / "env")]


def test_an_old_pytorch_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1"))
    assert environment.present() == ""
    assert "2.7.1, and 2.8 is needed" in capsys.readouterr().out
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0+cu130"))
    assert environment.present()
