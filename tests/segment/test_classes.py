"""Lists of class names: their formats, and what is refused."""

import warnings

import pytest

from rfclip.datasets import find_dataset, in_paper
from rfclip.datasets.names import class_list
from rfclip.segment.classes import GENERAL, Background, parse_classes, title, with_background
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


@pytest.mark.parametrize("given", [None, 5, [None], [3], [["cat", 3]], [["cat"], None]], ids=str)
def test_what_are_no_names_is_refused(given):
    with pytest.raises(ValueError, match="classes: got .*expected"):
        parse_classes(given)


def test_a_background_of_general_names():
    """By default beside one class; names that a class has are left out, in whatever case."""
    one, two = [("Sky", "cloud")], [("cat",), ("dog",)]
    found = with_background(one, None)
    assert found[0] == one[0] and isinstance(found[1], Background)
    assert found[1] == tuple(name for name in GENERAL if name not in ("sky", "cloud"))
    assert [title(names) for names in found] == ["Sky", "background"]
    assert with_background(one, False) == one
    assert with_background(two, None) == two
    assert with_background(two, True) == [*two, GENERAL]
    assert with_background([("background",)], None) == [("background",)]
    with pytest.raises(ValueError, match="there is such a class already"):
        with_background([("cat",), ("Background",)], True)
    with pytest.raises(ValueError, match="no name is left"):
        with_background([("grass", "sky")], None, ["sky", "grass"])


@pytest.mark.parametrize("name", in_paper())
def test_the_lists_of_datasets_by_name(name):
    """As the dataset has them, the general names of its background being a class of that name."""
    dataset = find_dataset(name)
    parsed = parse_classes(f" {name}")
    assert parsed == class_list(name, "official")
    assert (title(parsed[0]) == "background") == dataset.background
    assert with_background(parsed, None) == parsed
    if dataset.background:
        with pytest.raises(ValueError, match="there is such a class already"):
            with_background(parsed, True)
    assert parse_classes([name]) == [(name,)]


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
