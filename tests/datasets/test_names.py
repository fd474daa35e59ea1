"""The lists of class names that are shipped, files of names, and names replaced by synonyms."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from rfclip.datasets import find_dataset, in_paper
from rfclip.datasets.names import class_list, name_lists, perturbed, synonyms

RENAMED = {"boat": "ship", "diningtable": "table", "tvmonitor": "television monitor"}  # by VOC's official lists
EVERY = [class_list(dataset, names) for dataset in in_paper() for names in ("official", "plain")]


def has_background(dataset):
    return find_dataset(dataset).background


def flat(names):
    return [name for each in names for name in each]


@pytest.mark.parametrize("dataset", in_paper())
def test_plain_lists(dataset):
    """One name per class, the official one but for spaces and what VOC's lists rename."""
    opened = find_dataset(dataset).open(root=Path())
    plain = class_list(dataset, "plain")
    assert class_list(dataset, "official") == opened.classes
    assert {len(names) for names in plain} == {1} and len({name.casefold() for (name,) in plain}) == len(plain)
    assert (plain[0] == ("background",)) == opened.background and ("background",) not in plain[1:]
    as_official = [RENAMED.get(name, name) if dataset.startswith("voc") else name for (name,) in plain]
    unspaced = [[name.replace(" ", "") for name in names] for names in (as_official, opened.class_names)]
    assert unspaced[0] == unspaced[1]


def test_names_as_published():
    assert {("diningtable",), ("tvmonitor",), ("pottedplant",)} < set(class_list("voc20", "plain"))
    assert {("hot dog",), ("building-other",), ("wall-brick",)} < set(class_list("coco_stuff", "plain"))
    assert {("chest of drawers",), ("television receiver",)} < set(class_list("ade20k", "plain"))
    assert ("traffic light",) in class_list("cityscapes", "plain")


def test_a_dataset_without_lists():
    with pytest.raises(ValueError, match="names official: there is no such list for scenes"):
        class_list("scenes", "official")


@pytest.mark.parametrize("dataset", in_paper())
def test_a_file(tmp_path, dataset):
    """As editors on Windows write it, with blanks that mean nothing."""
    official, path = class_list(dataset, "official"), tmp_path / "names.txt"
    lines = [" ,  ".join(names) + " \t" for names in official]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n \r\n\r\n").encode())
    assert class_list(dataset, str(path)) == official
    path.write_text("\n".join(lines[:-1]), "utf-8")
    with pytest.raises(ValueError, match=rf"got {len(lines) - 1} lines; expected {len(lines)}, one per class"):
        class_list(dataset, str(path))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda lines: ["sky", "", *lines[2:]], "got 19 lines; line 2 has an empty name"),
        (lambda lines: ["", *lines], "got 20 lines; line 1 has an empty name; expected 19"),
        (lambda lines: ["road, , street", *lines[1:]], "line 1 has an empty name"),
        (lambda lines: [*lines[:-1], "bicycle,"], "line 19 has an empty name"),
        (lambda lines: [], "got 0 lines; expected 19, one per class of cityscapes"),
        (lambda lines: ["stra\xdfe", *lines[1:]], "synonyms, or a file of names: 'utf-8' codec"),
    ],
    ids=["line", "first", "middle", "end", "nothing", "latin-1"],
)
def test_bad_files(tmp_path, spoil, words):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(spoil([name for (name,) in class_list("cityscapes", "plain")])), "latin-1")
    with pytest.raises(ValueError, match=words) as refused:
        class_list("cityscapes", str(path))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("names", ["nowhere.txt", "", "nul\0"])
def test_no_file(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected official, plain, synonyms, or a file of names"):
        class_list("voc21", names)


def test_the_table():
    """The file has no key twice; a synonym is another word, not another spacing of the name."""
    text = (resources.files("rfclip.datasets") / "synonyms.json").read_text("utf-8")
    assert len(json.loads(text, object_pairs_hook=list)) == len(synonyms()) > 150
    assert synonyms().keys() <= {name for names in EVERY for name in flat(names)} - {"background"}
    for name, words in synonyms().items():
        spellings = {word.replace(" ", "").replace("-", "") for word in (name, *words)}
        assert words and len(spellings) == len(words) + 1, name
        assert all(word == " ".join(word.split()).lower() and "," not in word for word in words), name


@pytest.mark.parametrize("kind", ["official", "plain"])
@pytest.mark.parametrize("dataset", in_paper())
def test_perturbed_lists(dataset, kind):
    names, fixed = class_list(dataset, kind), int(has_background(dataset))
    before = Counter(flat(names))
    assert perturbed(names, 0, 0, fixed) == names
    shared = Counter(word for each in names[fixed:] for name in each for word in synonyms().get(name, []))
    for seed in range(5):
        new = perturbed(names, 1, seed, fixed)
        assert new == perturbed(names, 1, seed, fixed) and new[:fixed] == names[:fixed]
        assert list(map(len, new)) == list(map(len, names))
        for old, name in zip(flat(names[fixed:]), flat(new[fixed:]), strict=True):
            free = [word for word in synonyms().get(old, []) if word not in before and shared[word] == 1]
            assert name in free if free else name == old
        assert all(before[name] == count for name, count in Counter(flat(new)).items() if count > 1)
    assert len({str(perturbed(names, 0.5, seed, fixed)) for seed in range(10)}) > 5


def changed(names, share, seed=0):
    new = perturbed(names, share, seed)
    return {old: name for old, name in zip(flat(names), flat(new), strict=True) if old != name}


def test_shares_are_rounded_half_up_and_nested():
    names = [("tie",), ("mouse", "bird"), ("rock",), ("palm",), ("sheep",)]  # four with one synonym each
    counts = {0: 0, 0.124: 0, 0.125: 1, 0.374: 1, 0.375: 2, 0.5: 2, 0.625: 3, 1: 4}
    assert {share: len(changed(names, share)) for share in counts} == counts
    assert changed(names, 1) == {"tie": "necktie", "mouse": "computer mouse", "rock": "stone", "palm": "palm tree"}
    for seed in range(5):
        assert changed(names, 0.25, seed).items() < changed(names, 0.75, seed).items()


def test_the_draw_is_the_same_everywhere():
    assert changed(class_list("voc20", "plain"), 0.5) == {
        "bicycle": "cycle",
        "bus": "motorbus",
        "cat": "true cat",
        "motorbike": "motorcycle",
        "person": "individual",
        "tvmonitor": "television monitor",
    }


def test_ambiguous_synonyms_are_not_taken():
    assert changed([("sofa",), ("couch",)], 1) == {}  # each other's, and "lounge" is both's
    assert changed([("car", "auto"), ("Motorcar",)], 1) == {"car": "automobile"}
    assert changed([("earth",), ("land",)], 1) == {"land": "soil"}


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match=rf"share {share}: expected 0 .* to 1"):
        perturbed([("sofa",)], share, 0)


def test_lists_by_what_they_are_called(tmp_path):
    """The background of a list stays as it is; scenes have official names only."""
    voc21, scenes = find_dataset("voc21").open(root=tmp_path), find_dataset("scenes").open()
    assert name_lists(voc21) == {"official": voc21.classes}
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"thing {number}, other {number}" for number in range(21)))
    lists = name_lists(voc21, ["plain", "synonyms", "official", str(path)], share=1, seeds=range(2))
    assert list(lists) == ["plain", "synonyms, seed 0", "synonyms, seed 1", "official", str(path)]
    assert lists[str(path)][20] == ("thing 20", "other 20")
    for seed in range(2):
        drawn = lists[f"synonyms, seed {seed}"]
        assert drawn == perturbed(voc21.classes, 1, seed, 1) and drawn[0] == voc21.classes[0] and drawn != voc21.classes
    assert list(name_lists(voc21, ["synonyms"], seeds=[3])) == ["official", "synonyms, seed 3"]
    assert name_lists(scenes) == {"official": scenes.classes}
    path.write_text("\n".join(f"thing {number}" for number in range(56)))
    assert name_lists(scenes, [str(path)])[str(path)][55] == ("thing 55",)
    path.write_text("\n".join(f"thing {number}" for number in [*range(20), 3]))
    with pytest.raises(ValueError, match="'thing 3' given more than once; only one would be found"):
        name_lists(voc21, [str(path)])
    with pytest.raises(ValueError, match="names plain: there is no such list for scenes"):
        name_lists(scenes, ["plain"])
