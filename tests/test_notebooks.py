"""The notebooks run from top to bottom without a network, and are stored with what they show."""

import nbformat
import pytest
from documentation import ROOT, name_of
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes


def shown(notebook):
    """The kinds of output of each cell of code, such as text/plain and image/jpeg."""
    return [
        [kind for output in cell.outputs for kind in output.get("data", {output.get("name"): None})]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert path.stat().st_size <= LARGEST
    assert "stderr" not in sum(shown(stored), [])
    run = nbformat.read(path, as_version=4)
    for cell in run.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(run, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    pictures = [
        [sum(kind in ("image/png", "image/jpeg") for kind in kinds) > 0 for kinds in shown(notebook)]
        for notebook in (stored, run)
    ]
    assert any(pictures[0])
    assert pictures[0] == pictures[1]
