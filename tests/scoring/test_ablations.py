"""The variants of each ablation, and the command that scores them."""

import json
from pathlib import Path

import pytest
from commands import run
from miniatures import make

from rfclip import RefocusConfig
from rfclip.config import TINY
from rfclip.scoring.ablations import ABLATIONS, variants


@pytest.mark.parametrize("ablation", ["1", "7"])  # of tokens and masks, and of proxies and blocks
def test_ablations_on_scenes(tmp_path, ablation):
    result = run("ablate", ablation, "--count", 1, "--inject-distraction", 0.1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    heads, _, *lines = (tmp_path / "ablation.md").read_text().splitlines()[2:]
    assert heads.startswith("| variant | top-1 % | mIoU % |")
    config = RefocusConfig(distraction_dims=(1,))
    assert [line.split("|")[1].strip() for line in lines] == list(variants(ablation, config, 6))


def test_an_ablation_on_data_from_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("data"), "voc21")
    Path("config.json").write_text(RefocusConfig(distraction_dims=(3,)).to_json())
    result = run("ablate", "6", "voc21", "--model", TINY, "--root", "data", "--config", "config.json", "--post", "pamr")
    assert result.exit_code == 0, result.output
    folder = Path("rfclip-runs/voc21-ablation-6")
    assert [line.split("|")[1].strip() for line in (folder / "ablation.md").read_text().splitlines()[4:]] == [
        "to non-distraction",
        "to cls",
        "to defocused",
    ]
    settings = [json.loads((folder / f"variant-{n}/run.json").read_text()) for n in (1, 2, 3)]
    assert [each["config"]["target"] for each in settings] == ["non-distraction", "cls", "defocused"]
    assert all(each["post"] == "pamr" for each in settings)


def test_variants():
    """The variants of an ablation differ, but for the full method, which occurs once in each of its groups."""
    config = RefocusConfig(distraction_dims=(1, 2))
    for ablation in ABLATIONS:
        found = list(variants(ablation, config, 12).values())
        full = found.count(config)
        assert full == {"5": 3, "7": 2}.get(ablation, 1)
        assert len(set(found)) == len(found) - full + 1
        # What not all variants read.
        other = RefocusConfig((1, 2), similarity="vv", cut_threshold="otsu", neighbourhood=5)
        assert len(variants(ablation, other, 12)) == len(variants(ablation, config, 12))
    assert variants("7", config, 12)["blocks 5 to 8"].layers == (5, 6, 7, 8)
    with pytest.raises(ValueError, match="expected one of 1, 4"):
        variants("2", config, 12)
    with pytest.raises(ValueError, match="no distraction dimensions"):
        variants("tau", RefocusConfig(distraction_dims=()), 12)
