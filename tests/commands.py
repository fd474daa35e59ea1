"""The `rfclip` command within the tests' process, and what its results must be."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import rfclip
from rfclip.app.cli import app

NAMES = ["cat", "grass", "sky"]


def run(*arguments):
    """The outcome of the command with these arguments; it never ends in a traceback."""
    try:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        logging.disable(logging.NOTSET)  # the command assumes a process of its own, which it does not have here
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def segment(*arguments, classes="cat, grass, sky"):
    """`rfclip segment` with the bundled model if no other is given, whatever the pictures."""
    model = () if "--model" in arguments else ("--model", "rfclip-tiny")
    return run("segment", *arguments, *model, "--classes", classes)


def refused(result, *words):
    """Assert that the command stopped with a single message, which contains these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.lstrip().startswith("error: ")  # Rich 13 ends a spinner with an empty line
    assert "\n\n" not in result.stderr
    for word in words:
        assert word in result.stderr


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def state(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def check_result(stem, picture, classes):
    """Assert that mask, overlay and record agree with each other; returns the labels and the record."""
    mask, overlay = Image.open(f"{stem}.mask.png"), Image.open(f"{stem}.overlay.png")
    record = json.loads(Path(f"{stem}.json").read_text("utf-8"))
    assert (mask.format, mask.mode, mask.size) == ("PNG", "P", picture.size)
    assert (overlay.format, overlay.mode) == ("PNG", "RGB")
    assert overlay.width >= picture.width and overlay.height >= picture.height
    assert [entry["index"] for entry in record["classes"]] == list(range(len(classes)))
    assert [[entry["name"], *entry["synonyms"]] for entry in record["classes"]] == classes
    labels = np.asarray(mask)
    for entry in record["classes"]:
        assert entry["share"] == pytest.approx(np.mean(labels == entry["index"]), abs=1e-12)
    shares = sum(entry["share"] for entry in record["classes"]) + np.mean(labels == record["nothing"])
    assert shares == pytest.approx(1)
    assert (record["width"], record["height"]) == picture.size
    assert record["seconds"] > 0
    assert record["rfclip"] == rfclip.__version__
    return labels, record
