"""Tasks for the workers that write Parquet files of masks."""

from pathlib import Path

import pytest
from miniatures import JOB, NAMES, same

from rfclip.app.writer import Writer, described, plan_shards
from rfclip.outputs import read_masks

pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")


def test_shards_that_are_there(tmp_path, pictures, segmenter, masks):
    """They are continued; other settings are refused; on demand all are replaced, however the work is split."""
    pytest.importorskip("pyarrow")
    record = described(JOB, segmenter, NAMES, None)
    writer = Writer(JOB, NAMES, record, segmenter)
    tasks, *_ = plan_shards(pictures[:10], tmp_path, record, False)
    assert [len(task["pictures"]) for task in tasks] == [8, 2]
    assert writer(tasks[0]) == {"done": 8, "failed": []}
    tasks, skipped, stale = plan_shards(pictures, tmp_path, record, False)
    assert ([len(task["pictures"]) for task in tasks], skipped, stale) == ([8, 2], 8, [])
    for task in tasks:
        writer(task)
    same(read_masks(tmp_path), masks)
    assert plan_shards(pictures, tmp_path, record, False) == ([], 18, [])
    with pytest.raises(ValueError, match="other threshold, post: another --out, or --overwrite"):
        plan_shards(pictures, tmp_path, record | {"post": "pamr", "threshold": 0.5}, False)
    later = record | {"setting": "of a later version"}
    assert plan_shards(pictures, tmp_path, later, False) == ([], 18, [])  # what an old file does not say is not held
    before = sorted(tmp_path.iterdir())
    (task,), skipped, stale = plan_shards(pictures[:8], tmp_path, record | {"post": "pamr"}, True)
    assert skipped == 0 and sorted([*stale, Path(task["shard"])]) == before  # the rewritten one may stay
    many = [(Path(f"{number}.png"), Path(f"{number}")) for number in range(10_000)]
    sizes = [len(task["pictures"]) for task in plan_shards(many, tmp_path, record, False)[0]]
    assert sum(sizes) == 10_000 and max(sizes) == 64


@pytest.mark.parametrize("content", ["text", "other"])
def test_a_file_that_is_no_shard(tmp_path, content):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "masks-0.parquet"
    if content == "text":
        path.write_text("no Parquet")
    else:
        parquet.write_table(pyarrow.table({"a": [1]}), path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="masks-0.parquet is not a file of masks"):
            plan_shards([], tmp_path, {}, overwrite)
    assert path.exists()
