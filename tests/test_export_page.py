"""The page "Compile and export": its snippets as they stand, and the numbers where there is something to refocus."""

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from small_models import DIMS, PATCH, Dense, pictures, small_clip
from torch.export import Dim

import rfclip
from rfclip.methods import METHODS

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX's packages are not installed")

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text("utf-8")
SNIPPETS = re.findall(r"^## (.+?)\n[^#]*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
SIZES = [(2, 32, 32), (3, 40, 48)]  # batch, height and width; the first is the example, on the trained grid
ONE_BLOCK = rfclip.RefocusConfig(DIMS, tau=3.0, layers=(2,))
pytestmark = pytest.mark.usefixtures("fresh_compiler")
backends = pytest.mark.parametrize("backend", ["eager", "reference"])


def example(size):
    count, height, width = size
    return pictures(count=count, height=height, width=width, dtype=torch.float32)


def open_shapes():
    rows, columns = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
    return {"images": {0: Dim("batch", max=64), 2: PATCH * rows, 3: PATCH * columns}}


def export(model, size=SIZES[0]):
    return torch.export.export(Dense(model).eval(), (example(size),), dynamic_shapes=open_shapes())


def test_the_snippets_give_the_features_of_the_uncompiled_model(folder):
    setup, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(setup, names)
    with rfclip.refocus(names["model"], backend="eager"), torch.no_grad():
        want = rfclip.dense_features(names["model"], names["images"])
    assert [title for title, _ in SNIPPETS] == ["torch.compile", "torch.export", "AOTInductor", "ONNX"]
    assert PAGE.count("```python") == 1 + len(SNIPPETS)
    for title, code in SNIPPETS:
        names.pop("features", None)
        exec(compile(code, title, "exec"), names)
        assert_close(torch.as_tensor(names["features"]), want, 1e-5)


@backends
def test_one_graph_for_all_sizes_but_the_trained_one(backend):
    model, graphs = small_clip(dtype=torch.float32), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(Dense(model), fullgraph=True, dynamic=True, backend=keep)
    with rfclip.refocus(model, ONE_BLOCK, backend=backend), torch.no_grad():
        for size in ((2, 56, 40), (3, 40, 48)):
            images = example(size)
            assert_close(compiled(images), rfclip.dense_features(model, images), 1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("method", ["rf-clip", "released"])
@backends
def test_exported_with_open_batch_and_size(backend, method):
    """The authors' code resizes positions by other factors, except to the trained size, which is among these."""
    model = small_clip(dtype=torch.float32)
    with rfclip.refocus(model, ONE_BLOCK, method=method, backend=backend), torch.no_grad():
        want = [rfclip.dense_features(model, example(size)) for size in SIZES]
        program = export(model).module()
    for size, features in zip(SIZES, want, strict=True):  # the program keeps the method that it traced
        assert_close(program(example(size)), features, 1e-5)


@pytest.mark.parametrize("method", ["naclip", "kk-mean", "clip", "sc-clip"])
def test_peers_exported_with_open_batch_and_size(method):
    model = small_clip(dtype=torch.float32, layers=max(4, METHODS[method].blocks))
    with rfclip.refocus(model, method=method, backend="eager"), torch.no_grad():
        program = export(model, size=(2, 48, 48)).module()
        for size in ((3, 40, 56), (1, 40, 48)):
            assert_close(program(example(size)), rfclip.dense_features(model, example(size)), 1e-5)


def test_onnx_with_a_graph_cut_and_open_batch_and_size(folder):
    model = small_clip(dtype=torch.float32)
    with rfclip.refocus(model, ONE_BLOCK, backend="eager"), torch.no_grad():
        want = [rfclip.dense_features(model, example(size)) for size in SIZES]
        images = (example(SIZES[0]),)
        torch.onnx.export(Dense(model).eval(), images, "dense.onnx", dynamic_shapes=open_shapes(), dynamo=True)
    session = onnxruntime.InferenceSession("dense.onnx")
    for size, features in zip(SIZES, want, strict=True):
        (got,) = session.run(None, {"images": example(size).numpy()})
        assert_close(torch.from_numpy(got), features, 1e-5)


def test_random_tokens_are_refused_at_an_open_size():
    model, config = small_clip(dtype=torch.float32), rfclip.RefocusConfig(DIMS, tokens="random")
    with (
        rfclip.refocus(model, config, backend="eager"),
        torch.no_grad(),
        pytest.raises(ValueError, match="export it at a fixed image size"),
    ):
        export(model)
