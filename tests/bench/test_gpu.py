"""`make gpu` without a GPU: its lines, its clock, and that one failure stops nothing else."""

import json
import subprocess
import sys
import time
import zipfile
from functools import partial

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import sections
from bench.gpu.lines import Line, append, markdown, read


def outcomes(path):
    return [(line.section, line.case, line.outcome) for line in read(path)]


def test_a_dry_run(tmp_path):
    arguments = ["--device", "cpu", "--only", "here", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments], cwd=command.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = read(tmp_path / "out/lines.jsonl")
    assert [line.case for line in lines] == ["device", "clocks", "versions", "host"]
    assert lines[2].figures["torch"] == torch.__version__.partition("+")[0]
    assert done.stdout.strip() == (tmp_path / "out/report.md").read_text("utf-8").strip()
    assert "no GPU: a dry run" in done.stdout and "can be pasted" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_stops(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), "--only", "here,tower"]) == 1
    assert "make gpu DEVICE=cpu" in capsys.readouterr().err
    assert {section for section, _, _ in outcomes(tmp_path / "lines.jsonl")} == {"here"}


def test_an_unknown_section_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "here,cells"])
    assert "--only cells" in capsys.readouterr().err


def test_a_failure_is_a_line_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken():
        raise ValueError("a | in its message")

    def absent():
        raise sections.Skip("not here")

    cases = {"one": dict, "two": broken, "three": absent, "four": lambda: {"ms": 1.5}}
    monkeypatch.setitem(sections.SECTIONS, "tower", lambda: iter(cases.items()))
    path = tmp_path / "lines.jsonl"
    sections.run("tower", path, time.time() + 60)
    assert [outcome for *_, outcome in outcomes(path)] == ["passed", "failed", "skipped", "passed"]
    assert "ValueError: a \\| in its message" in markdown({"tower": "The tower"}, read(path))
    sections.run("tower", path, time.time() - 1)
    assert [outcome for *_, outcome in outcomes(path)][4:] == 4 * ["dropped"]


def test_a_case_of_several_lines(tmp_path, monkeypatch):
    rows = sections.Rows({"one": {"ms": 1.0}, "other": {"ms": 2.0}})
    monkeypatch.setitem(sections.SECTIONS, "where", lambda: iter([("plain", lambda: rows)]))
    sections.run("where", tmp_path / "lines.jsonl", time.time() + 60)
    assert read(tmp_path / "lines.jsonl") == [
        Line("where", "plain: one", "measured", {"ms": 1.0}),
        Line("where", "plain: other", "measured", {"ms": 2.0}),
    ]


def test_where_the_time_goes():
    """All launches and all of the time, those that take the most first, and none below a hundredth."""
    (plain, run), (refocused, _), *_ = sections.where()
    assert plain == "32x32, batch 1, fp32, plain" and refocused == "32x32, batch 1, fp32, refocused"
    with torch.inference_mode():
        *rows, other, whole = run().values()
    assert len(rows) > 5 and rows == sorted(rows, key=lambda row: -row["µs a forward"])
    assert rows[-1]["µs a forward"] >= 0.01 * whole["µs a forward"]
    for figure in ("launches", "µs a forward"):
        assert sum(row[figure] for row in [*rows, other]) == pytest.approx(whole[figure])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cut_kernel", "cut_kernel"),
        ("Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD"),
        ("void at::native::(anonymous namespace)::cat<c10::Half, 4>(c10::Half*, int)", "cat<Half, 4>"),
        ("void gemm<" + 60 * "x" + ">(int)", "gemm<" + 55 * "x"),
    ],
)
def test_names_of_kernels_are_shortened(name, expected):
    assert sections.shortened(name) == expected


def test_goals_are_those_of_the_report():
    assert sections.GOALS[(224, 224), 1] == sections.GOALS[(224, 224), 32] == 1.05
    assert len(sections.GOALS) == 5


def test_a_peer_that_fails_is_left_out(monkeypatch):
    """Its failure is not this package's; a case of nothing else is skipped."""

    def prepare(name, how, sizes):
        if how == "flex_attention":
            return lambda: 1 / 0
        return lambda: torch.ones(2)

    monkeypatch.setattr(sections, "prepare", prepare)
    time_kernel = partial(sections._time_kernel, "self_attention", sizes=None, size="24x40")
    assert "reference, µs" in time_kernel(hows=["triton", "reference", "flex_attention"])
    with pytest.raises(sections.Skip, match="flex_attention fails: ZeroDivisionError"):
        time_kernel(hows=["triton", "flex_attention"])


def test_a_process_that_dies_or_hangs_is_a_line(tmp_path, monkeypatch):
    path, environment = tmp_path / "lines.jsonl", command.child_environment("cpu", tmp_path, tmp_path)
    command.run_section("no such section", time.time() + 60, path, environment)
    command.run_section("here", time.time() - 1, path, environment)
    monkeypatch.setattr(command, "GRACE", 0.1)
    began = time.time()
    command.run_section("here", time.time() + 0.1, path, environment)  # importing PyTorch takes longer
    assert time.time() - began < 5
    assert outcomes(path) == [
        ("no such section", "its process", "failed"),
        ("here", "all", "dropped"),
        ("here", "the rest", "dropped"),
    ]
    assert "KeyError" in read(path)[0].detail


def test_the_kernel_tests_stop_when_their_time_is_up(tmp_path):
    recorder = sections.Recorder(tmp_path / "lines.jsonl", time.time() - 1)
    with pytest.raises(pytest.exit.Exception):
        recorder.pytest_runtest_logfinish("a test")


def test_only_missing_packages_are_unpacked(tmp_path):
    for name in ("numpy-9.9-py3-none-any.whl", "not_installed-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name.partition('-')[0]}/__init__.py", "")
    site = command.unpack(tmp_path, tmp_path / "site")
    assert [path.name for path in site.iterdir()] == ["not_installed"]
    assert str(site) in command.child_environment("cuda", tmp_path, site)["PYTHONPATH"]


def test_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    tests = [Line("tests", f"test_a.py::test[{n}]", "passed", {"seconds": 1.0}) for n in range(3)]
    for line in [*tests, Line("tests", "test_a.py::test[3]", "failed", detail="wrong"), Line("here", "a", "measured")]:
        append(path, line)
    with path.open("a") as file:
        file.write(json.dumps({"section": "tests"})[:-5])  # of a process that was killed
    assert read(path)[:3] == tests and len(read(path)) == 5
    table = markdown({"tests": "Tests"}, read(path))
    assert "3 passed, 1 failed, 1 measured." in table
    assert "| test_a.py::test | passed | 3 |  |" in table
    assert "| test_a.py::test[3] | failed | - | wrong |" in table
