"""The Python of docs/kernels.md, as it stands."""

from documentation import ROOT, run_page


def test_the_python_of_the_page():
    names = run_page(ROOT / "docs" / "kernels.md")
    assert names["out"].shape == names["q"].shape
    assert names["out"].isfinite().all()
