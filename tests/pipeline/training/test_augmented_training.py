"""Training with everything that the data layer can do to a window, on shards of which one base is damaged."""

from pathlib import Path

import pytest

from megabase.datamodules.index.index_file import BLOCK_BYTES
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.rundir.journal import read
from tests.conftest import DATA, train_settings, training_rows

AUGMENTED = [
    "data.stride=200",
    "data.shift=50",
    "data.reverse_complement=0.5",
    "data.softmask_weight=0.5",
    "data.mixture={lambda_phage.fna.gz: 1.0}",
    "data.pack=true",
    "data.on_error=skip",
    "data.workers=1",
    "trainer.max_steps=6",
    "trainer.eval_every_steps=6",
    "tracking.enabled=false",
]


@pytest.fixture
def damaged_shards(tmp_path: Path) -> Path:
    """Phage lambda with one base changed in each split. Each split has at least two blocks of checksums."""
    index = prepare([DATA / "lambda_phage.fna.gz"], tmp_path / "shards", valid="0.4", progress=False)
    shard = index.directory / index.segments.shard[0]
    content = bytearray(shard.read_bytes())
    for row in (0, 1):
        content[index.segments.offset[row] + 2000] ^= 1
    shard.write_bytes(content)
    return Path(ShardIndex.open(index.directory).directory)


@pytest.mark.distributed
@pytest.mark.slow
def test_one_rank_and_two_train_on_and_skip_the_same_windows(
    damaged_shards: Path, tmp_path: Path, start_job
) -> None:
    runs = []
    for ranks, micro_batch in ((2, 2), (1, 8)):
        more = [*AUGMENTED, f"trainer.devices={ranks}", f"data.micro_batch={micro_batch}"]
        settings = train_settings(damaged_shards, tmp_path, f"of-{ranks}", *more)
        code, output = start_job("train", *settings).wait()
        assert code == 0, output
        assert "data.on_error=skip: a window is left out" in output
        runs.append(tmp_path / f"of-{ranks}")
    two, one = (training_rows(run) for run in runs)
    assert [row["samples"] for row in two] == [row["samples"] for row in one]
    assert [row.get("skipped") for row in two] == [row.get("skipped") for row in one]
    assert sum(row.get("skipped", 0) for row in two) > 0
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    assert 1.2 < two[0]["loss"] < 1.6  # a mean over the letters that were scored: ln 4 is 1.386
    evaluations = [row for run in runs for row in read(run / "metrics.jsonl") if "valid_loss" in row]
    damaged, windows = BLOCK_BYTES // 512, round(0.4 * 48_502) // 512
    expected = ((windows - damaged) * 512, damaged)
    assert [(row["full_valid_bases"], row["full_valid_skipped"]) for row in evaluations] == [expected] * 2
