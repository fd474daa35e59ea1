"""The names that classes are looked for by: two lists per data set, a user's own files, and synonyms instead of names.

Official (`classes/`): the lists that the field's methods are scored with. They add names to some classes, rename others
("ship" for VOC's "boat") and, for ADE20K, COCO-Stuff and Cityscapes, leave out the spaces.

Plain (`plain/`): one name per class, as the data set's authors publish it, checked against MMSegmentation's lists.

- VOC: the classes of the development kit, "diningtable", "pottedplant" and "tvmonitor" written as there.
- Context: the 59 classes of Mottaghi et al. (CVPR 2014), the same as the official ones.
- COCO-Object: the names in COCO's annotations. COCO-Stuff: these, then those in the `labels.txt` of Caesar et al. (CVPR
  2018), suffixes included: "building-other", "desk-stuff", "wall-brick".
- Cityscapes: the 19 classes with a train id in `cityscapesscripts/helpers/labels.py`.
- ADE20K: the first name in each line of the scene parsing benchmark's `objectInfo150.txt`. For class 90, "television
  receiver", as copies of the data set have it; the benchmark's repository puts "television" first.

Where a data set has a background, class 0, its plain name is "background".

Synonyms (`synonyms.json`): what WordNet 3.1 (Princeton University; its licence is in `LICENSE-wordnet`) lists with a
name in the sense that the class has, read and selected by hand. Left out are Latin names, slang, words that mean
something else first of all (a car's "machine"), names that two lists use in two senses ("screen"), and what differs in
spaces and hyphens only. A name without its spaces has the synonyms of the name with them, and one that ends in "-other"
or "-stuff" those of the name before. Not WordNet's, where a motorbike is a small motorcycle: that it and "motorcycle"
are synonyms, as in the data sets. Names that are not there, such as "bird" and "bottle", have no synonym of this kind.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rfclip.datasets.base import Dataset

ClassNames: TypeAlias = list[tuple[str, ...]]  # the names of each class, the first standing for it
LISTS = ("official", "plain", "synonyms")
_FOLDERS = {"official": "classes", "plain": "plain"}


def class_list(dataset: str, names: str) -> ClassNames:
    """The names of each class of a data set, in the order of the labels.

    Args:
        dataset: its name; one that has lists here.
        names: "official", "plain", or the path of a text file in UTF-8 of one class per line, its names separated by
            commas. (`perturbed` makes "synonyms" of such a list.)

    Raises:
        ValueError: the data set has no such list; or the file cannot be read, has an empty name, or one twice that the
            official list has once, or has more or fewer classes than the data set.
    """
    if names in _FOLDERS:
        shipped = resources.files(__package__) / _FOLDERS[names] / f"{dataset}.txt"
        if not shipped.is_file():
            raise ValueError(f"names {names}: there is no such list for {dataset}, which {_FOLDERS[names]}/ would hold")
        return _parse(shipped.read_text("utf-8"))
    return _file_list(dataset, class_list(dataset, "official"), names)


def _file_list(dataset: str, official: ClassNames, names: str) -> ClassNames:
    """As `class_list`, from a user's file."""
    classes = len(official)
    try:
        given = _parse(Path(names).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
        raise ValueError(f"names {names!r}: expected {', '.join(LISTS)}, or a file of names: {error}") from error
    empty = next((f"; line {line} has an empty name" for line, each in enumerate(given, 1) if not all(each)), "")
    if empty or len(given) != classes:
        raise ValueError(
            f"names {names!r}: got {len(given)} lines{empty}; expected {classes}, one per class of {dataset} in the "
            "order of the labels, with names separated by commas"
        )
    counts, usual = (Counter(name.casefold() for each in listed for name in each) for listed in (given, official))
    twice = [name for name, count in counts.items() if count > max(1, usual[name])]  # "bed" is, in COCO-Object's
    if twice:
        raise ValueError(
            f"names {names!r}: {', '.join(map(repr, twice))} given more than once; only one would be found"
        )
    return given


def perturbed(names: ClassNames, share: float, seed: int, fixed: int = 0) -> ClassNames:
    """The same classes with some of their names replaced by synonyms.

    A name can be replaced if it has a synonym that is neither in the list already nor a synonym of another name in it:
    such a word would not tell the two classes apart. The same seed draws the same on every platform, and with a larger
    share replaces further names.

    Args:
        names: the names of each class.
        share: how much of the names that can be replaced is, 0 to 1; their number is rounded, halves up.
        seed: of the draw of names and synonyms.
        fixed: the first classes, whose names stay: 1 for a data set with a background.

    Raises:
        ValueError: the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: expected 0 (no name is replaced) to 1 (every name that can be)")
    places = {(c, n): name.casefold() for c, each in enumerate(names) for n, name in enumerate(each)}
    known = {place: synonyms().get(name, []) for place, name in places.items() if place[0] >= fixed}
    met = Counter(places.values()) + Counter(word for words in known.values() for word in words)
    free = {place: [word for word in words if met[word] == 1] for place, words in known.items()}
    free = {place: words for place, words in free.items() if words}
    draw = random.Random(seed).random  # other methods of it may change with Python, and NumPy's with NumPy
    drawn = {place: (draw(), words[int(draw() * len(words))]) for place, words in free.items()}
    first = sorted(drawn, key=drawn.__getitem__)[: math.floor(share * len(drawn) + 0.5)]
    new = {place: drawn[place][1] for place in first}
    return [tuple(new.get((c, n), name) for n, name in enumerate(each)) for c, each in enumerate(names)]


def name_lists(
    dataset: Dataset, wanted: Sequence[str] = ("official",), share: float = 0.5, seeds: Sequence[int] = (0,)
) -> dict[str, ClassNames]:
    """Lists of class names by what they are called: "official", "plain", a path, or "synonyms, seed 0" and so on.

    Args:
        dataset: whose classes they name.
        wanted: what `--names` takes: official, plain, synonyms (of the official names, which are then a list of their
            own as well), or paths.
        share, seeds: as `perturbed` takes them, for each list of synonyms.

    Raises:
        ValueError: as `class_list` and `perturbed`.
    """
    lists: dict[str, ClassNames] = {}
    if "synonyms" in wanted and "official" not in wanted:
        wanted = ("official", *wanted)
    for names in wanted:
        if names == "official":
            lists[names] = dataset.classes
        elif names == "synonyms":
            fixed = int(dataset.background)
            lists |= {f"synonyms, seed {seed}": perturbed(dataset.classes, share, seed, fixed) for seed in seeds}
        elif names in _FOLDERS:
            lists[names] = class_list(dataset.name, names)
        else:
            lists[names] = _file_list(dataset.name, dataset.classes, names)
    return lists


@functools.cache
def synonyms() -> dict[str, list[str]]:
    """The synonyms of each name that has some, in lower case."""
    return json.loads((resources.files(__package__) / "synonyms.json").read_text("utf-8"))


def _parse(text: str) -> ClassNames:
    """The names in each line; blanks around names and at the end do not count."""
    return [tuple(" ".join(name.split()) for name in line.split(",")) for line in text.rstrip().splitlines()]
