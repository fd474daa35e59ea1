"""A model with its settings."""

import pytest

from rfclip.segment.job import Job, differing


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B/16"])
def test_records_spell_a_model_in_one_way(name):
    with Job(method="kk").segmenter(cache=False) as segmenter:
        assert Job(name, method="kk").described(segmenter, "digest")["model"] == "ViT-B-16"


@pytest.mark.parametrize(
    "before, now, same",
    [
        ("0.1.1.dev3+g5ab1c2d", "0.1.1.dev40+g77aa001.d20260203", True),
        ("0.dev0", "0.dev274+g104f447", True),  # a checkout without tags, not installed and installed
        ("0.1.1.dev3+g5ab1c2d", "0.1.1", False),
        ("0.1.1.dev3+g5ab1c2d", "0.2.0.dev3+g5ab1c2d", False),
        ("0.1.0", "0.1.1", False),
    ],
)
def test_every_commit_does_not_part_results(before, now, same):
    settings = {"method": "kk", "rfclip": before}
    assert differing(settings, settings, settings | {"rfclip": now}) == ([] if same else ["rfclip"])
    assert differing(["rfclip"], {}, {"rfclip": now}) == ["rfclip"]  # of a version that did not write it down
