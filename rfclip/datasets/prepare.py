"""Make the label files that two of the datasets derive from others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from rfclip.datasets.base import GUIDE, IGNORED, read_indices
from rfclip.extras import require
from rfclip.files import parse_json, write_whole

# COCO's ids, minus one, that are not things; everything after 90 is stuff.
_NO_THING = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_THINGS = [label for label in range(91) if label not in _NO_THING]

# Ids in Pascal Context's annotations (Mottaghi et al., CVPR 2014): the background's first, then those of 59 classes.
_CONTEXT_IDS = (
    *(0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115),
    *(144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349),
    *(354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)


def coco_object(root: Path) -> Iterator[Path]:
    """COCO-Object's labels from COCO-Stuff's: things become 1 to 80, stuff 0, and 255 stays.

    COCO-Stuff's files are read as distributed (NAME.png), or with the train ids (NAME_labelTrainIds.png) that
    MMSegmentation derives from them.

    Yields:
        Each file written, `coco_object/annotations/val2017/NAME_instanceTrainIds.png` below the root.

    Raises:
        ValueError: there are no such files, or one has labels that COCO-Stuff does not.
    """
    folder = root / "coco_stuff164k/annotations/val2017"
    files = {path.stem.removesuffix("_labelTrainIds"): path for path in sorted(folder.glob("*.png"))}
    if not files:
        raise ValueError(f"coco_object: there is no {folder}/*.png, the labels of COCO-Stuff; see {GUIDE}")
    out = root / "coco_object/annotations/val2017"
    out.mkdir(parents=True, exist_ok=True)
    from_ids, from_train_ids = {IGNORED: IGNORED}, {IGNORED: IGNORED}
    from_ids |= dict.fromkeys(range(91, 182), 0) | {label: number for number, label in enumerate(_THINGS, 1)}
    from_train_ids |= dict.fromkeys(range(80, 171), 0) | {number - 1: number for number in range(1, 81)}
    for name, path in files.items():
        table = from_train_ids if path.stem.endswith("_labelTrainIds") else from_ids
        labels = read_indices(path)
        other = sorted(set(np.unique(labels).tolist()) - table.keys())
        if other:
            raise ValueError(f"coco_object: {path} has labels {other}, which COCO-Stuff does not use in such files")
        lookup = np.array([table.get(label, 0) for label in range(256)], np.uint8)
        yield _save(out / f"{name}_instanceTrainIds.png", lookup[labels])


def context(root: Path) -> Iterator[Path]:
    """Pascal Context's labels of 60 classes from `trainval_merged.json`, and the list of the validation set.

    Yields:
        Each file written, `VOCdevkit/VOC2010/SegmentationClassContext/NAME.png` below the root, and finally
        `ImageSets/SegmentationContext/val.txt`.

    Raises:
        ValueError: the JSON file is missing or a different one, or pycocotools is not installed.
    """
    require("context", "prepare", "pycocotools")
    from pycocotools import mask as rle

    folder = root / "VOCdevkit/VOC2010"
    path = folder / "trainval_merged.json"
    try:
        record = parse_json(path.read_text("utf-8"))
        regions = defaultdict(list)
        for region in record["annos_segmentation"]:
            regions[region["image_id"]].append((region["category_id"], region["segmentation"]))
        images = [image for image in record["images"] if image["phase"] == "val"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"context: {path} does not hold the annotations of Pascal Context: {error!r}; see {GUIDE}"
        ) from error
    if not images:
        raise ValueError(f"context: {path} has no image of the validation set")
    classes = np.full(max(_CONTEXT_IDS) + 1, IGNORED, np.uint8)
    classes[list(_CONTEXT_IDS)] = range(len(_CONTEXT_IDS))
    out = folder / "SegmentationClassContext"
    out.mkdir(parents=True, exist_ok=True)
    names = []
    for image in images:
        try:
            name, labels = Path(image["file_name"]).stem, np.zeros((image["height"], image["width"]), np.uint8)
            for category, mask in regions[image["image_id"]]:
                known = category in _CONTEXT_IDS
                labels[rle.decode(mask).astype(bool)] = classes[category] if known else IGNORED
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"context: {path} has a malformed image or mask: {error!r}") from error
        names.append(name)
        yield _save(out / f"{name}.png", labels)
    val = folder / "ImageSets/SegmentationContext/val.txt"
    val.parent.mkdir(parents=True, exist_ok=True)
    write_whole({val: lambda part: part.write_text("\n".join(names) + "\n", "utf-8")})
    yield val


PREPARED = {"coco_object": coco_object, "context": context}


def _save(path: Path, labels: np.ndarray) -> Path:
    write_whole({path: lambda part: Image.fromarray(labels).save(part, format="PNG")})
    return path
