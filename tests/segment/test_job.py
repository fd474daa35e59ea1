"""A model with its settings."""

import pytest

from rfclip.segment.job import Job


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B/16"])
def test_records_spell_a_model_in_one_way(name):
    with Job(method="kk").segmenter(cache=False) as segmenter:
        assert Job(name, method="kk").described(segmenter, "digest")["model"] == "ViT-B-16"
