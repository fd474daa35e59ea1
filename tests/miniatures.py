"""Scenes, datasets in miniature and a job of segmenting, for tests that need data on disk."""

from types import SimpleNamespace

import numpy as np
import torchvision.datasets
from PIL import Image

from rfclip import RefocusConfig
from rfclip.datasets import find_dataset
from rfclip.datasets.names import name_lists
from rfclip.scoring.report import finish
from rfclip.scoring.run import Run, Scorer
from rfclip.segment.job import Job
from rfclip.segment.result import Segmentation
from rfclip.tiny.scenes import make_scene

SCENE = make_scene((4, 0), 200, objects=(3, 3), object_size=(70, 76))


def scene(number, height=56, width=64):
    return Image.fromarray(make_scene(number, 64, object_size=(24, 40)).image[:height, :width])


# Datasets -------------------------------------------------------------------------------------------------------------

SIZE = (16, 24)  # height and width


def save_picture(path, predicted):
    """A picture whose brightness says what `Reader` finds in it: 8 levels a class, constant in each JPEG block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (8 * predicted + 4).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(path, **({"quality": 98} if path.suffix == ".jpg" else {}))


def save_labels(path, labels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image.putpalette([channel for index in range(256) for channel in (index, 255 - index, 0)])
    image.save(path)


def halves(left, right):
    """Labels [16, 24]: one for the left third and one for the rest."""
    found = np.full(SIZE, right)
    found[:, :8] = left
    return found


def make(root, name):
    """Two pictures and their labels, in the layout of that dataset; `test_miou_by_hand` works out their score."""
    zero = 1 if name in ("voc20", "context59", "ade20k") else 0  # in their files, 0 is what does not count
    predicted = [halves(1, 2), halves(3, 3)]
    wanted = [halves(1, 3) + zero, halves(255 - zero, 3) + zero]
    if zero:
        wanted[1][:4, :8] = 0  # the same as 255
    for number, (found, labels) in enumerate(zip(predicted, wanted, strict=True)):
        stem = f"picture_{number}"
        match name:
            case "voc21" | "voc20":
                folder = root / "VOCdevkit/VOC2012"
                save_picture(folder / f"JPEGImages/{stem}.jpg", found)
                save_labels(folder / f"SegmentationClass/{stem}.png", labels, palette=True)
                listed = folder / "ImageSets/Segmentation/val.txt"
            case "context60" | "context59":
                folder = root / "VOCdevkit/VOC2010"
                save_picture(folder / f"JPEGImages/{stem}.jpg", found)
                save_labels(folder / f"SegmentationClassContext/{stem}.png", labels)
                listed = folder / "ImageSets/SegmentationContext/val.txt"
            case "coco_stuff":
                save_picture(root / f"coco_stuff164k/images/val2017/{stem}.jpg", found)
                save_labels(root / f"coco_stuff164k/annotations/val2017/{stem}_labelTrainIds.png", labels)
            case "coco_object":
                save_picture(root / f"coco_object/images/val2017/{stem}.jpg", found)
                save_labels(root / f"coco_object/annotations/val2017/{stem}_instanceTrainIds.png", labels)
            case "cityscapes":
                city = ("bonn", "ulm")[number]
                save_picture(root / f"cityscapes/leftImg8bit/val/{city}/{city}_0_{number}_leftImg8bit.png", found)
                ids = {c.train_id: c.id for c in torchvision.datasets.Cityscapes.classes if c.train_id >= 0} | {255: 0}
                if number:  # as downloaded, without files of train ids
                    labels, kind = np.vectorize(ids.get)(labels), "labelIds"
                else:
                    kind = "labelTrainIds"
                save_labels(root / f"cityscapes/gtFine/val/{city}/{city}_0_{number}_gtFine_{kind}.png", labels)
            case "ade20k":
                folder = root / "ADEChallengeData2016"
                save_picture(folder / f"images/validation/{stem}.jpg", found)
                save_labels(folder / f"annotations/validation/{stem}.png", labels)
        if name.startswith(("voc", "context")):
            listed.parent.mkdir(parents=True, exist_ok=True)
            with listed.open("a") as file:
                file.write(f"{stem}\n")
    return root


class Reader:
    """A segmenter that reads the classes off the pictures of `save_picture`."""

    windows = SimpleNamespace(seen=lambda height, width: (0, 0, height, width))

    def __init__(self, fail_at=None):
        self.seen, self.fail_at = [], fail_at

    def segment_by(self, rgb, lists, *, threshold, post):
        if self.fail_at == len(self.seen):
            raise KeyboardInterrupt
        labels = (np.asarray(rgb)[..., 0] // 8).astype(np.uint8)
        self.seen.append(labels)
        return [Segmentation(rgb, labels, tuple(names[0] for names in named)) for named in lists]


class ReadingScorer(Scorer):
    """A scorer without a model, whose segmenter is a `Reader`."""

    def __init__(self, dataset, reader):
        self.job, self.dataset, self.segmenter, self.threshold = RUN, dataset, reader, None
        self.lists = name_lists(dataset)


RUN = Job(config=RefocusConfig(distraction_dims=()))


def score(root, name, folder, reader=None, **options):
    scorer = ReadingScorer(find_dataset(name).open(root=root), reader or Reader())
    with open_run(root, name, folder, **options) as run:
        for _ in run.keep(map(scorer, run.missing())):
            pass
        return finish(run, scorer)["official"]


def open_run(root, name, folder, overwrite=False, **options):
    items = find_dataset(name).open(root=root).items()
    return Run(folder, {"dataset": name, **options}, items, overwrite=overwrite)


def scores_of(scorer, folder):
    """What a scorer finds on all items of its dataset."""
    with scorer, Run(folder, scorer.settings(), scorer.dataset.items()) as run:
        for _ in run.keep(map(scorer, run.missing())):
            pass
        return run.scores(len(scorer.dataset.classes))[0]


# A job of segmenting --------------------------------------------------------------------------------------------------

NAMES = [("dog", "cat"), ("grass",), ("sky",)]
JOB = Job()


def same(found, masks):
    """Assert that every picture is found once, with its labels."""
    found = list(found)
    assert sorted(image for image, _ in found) == sorted(masks)
    for image, labels in found:
        assert labels.dtype == np.uint8 and np.array_equal(labels, masks[image])
