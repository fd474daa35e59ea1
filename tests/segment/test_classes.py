"""Lists of class names: their formats, and what is refused."""

import warnings

import pytest

from rfclip.segment.classes import parse_classes
from rfclip.tiny.scenes import CLASSES


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["cat", "dog"], [("cat",), ("dog",)]),
        (["cat, kitten", "dog"], [("cat", "kitten"), ("dog",)]),
        ([["cat", "kitten"], "dog"], [("cat", "kitten"), ("dog",)]),
        ((("cat",), ("fire hydrant",)), [("cat",), ("fire hydrant",)]),
        ("cat, dog ,  grass", [("cat",), ("dog",), ("grass",)]),
        ("cat, kitten; dog", [("cat", "kitten"), ("dog",)]),
        ("cat", [("cat",)]),
    ],
    ids=str,
)
def test_parse_classes(given, want):
    assert parse_classes(given) == want


def test_parse_classes_from_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sky, wall\n\nchêne\nfire hydrant\n", "utf-8")
    want = [("sky", "wall"), ("chêne",), ("fire hydrant",)]
    assert parse_classes(path) == parse_classes(str(path)) == want
    for missing in (tmp_path / "nowhere.txt", str(tmp_path / "nowhere"), "nowhere.txt"):
        with pytest.raises(ValueError, match="nowhere"):
            parse_classes(missing)
    path.write_text("cat\ndog\n", "utf-8-sig")
    assert parse_classes(path) == [("cat",), ("dog",)]
    path.write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(ValueError, match="classes file"):
        parse_classes(path)


@pytest.mark.parametrize("given", [[], "", "cat,,dog", [[]], ["cat", ""], [["cat", " "]]], ids=str)
def test_empty_names_are_refused(given):
    with pytest.raises(ValueError, match="at least one class and no empty names"):
        parse_classes(given)


def test_other_class_errors():
    with pytest.raises(ValueError, match="'cat' given more than once"):
        parse_classes(["cat", ["dog", "cat"]])
    with pytest.raises(ValueError, match="expected a name or a list of names"):
        parse_classes([["cat", 3]])
    with pytest.raises(ValueError, match="got 65535, at most 65534"):
        parse_classes([str(i) for i in range(65535)])


def test_names_never_trained_on_get_a_warning(segmenter):
    with pytest.warns(UserWarning, match="never trained on 'unicorn', 'grassland'; it knows: cat, dog,.*brick"):
        segmenter.text_embeddings(("cat", "unicorn", "grassland"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter.text_embeddings((*CLASSES, "Cat"))
