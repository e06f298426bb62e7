"""What a start decides before ranks start."""

import logging
from pathlib import Path

import pytest

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.pipeline.checkpoint.next_start import NextStart
from megabase.pipeline.config.load import load
from megabase.pipeline.rundir.status import FINISHED, write_status
from megabase.pipeline.training import pretraining


@pytest.mark.parametrize("changes", [[], ["optim.lr 0.001 -> 0.0005"]])
def test_a_finished_run_names_the_settings_that_it_was_not_trained_with(
    tmp_path: Path,
    lambda_shards: Path,
    changes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load([], [f"run.root={tmp_path}", "run.name=x", "data.shards=s", "tracking.enabled=false"])
    index = ShardIndex.open(lambda_shards)
    assert not pretraining.has_finished(config, 1, index)
    config.directory.mkdir()
    write_status(config.directory, FINISHED, 5)
    monkeypatch.setattr(pretraining, "next_start", lambda *_: NextStart(5, True, changes=changes))
    with caplog.at_level(logging.INFO):
        assert pretraining.has_finished(config, 1, index)
    assert ("it was not trained with optim.lr 0.001 -> 0.0005" in caplog.text) == bool(changes)
    assert ("set another run.name" in caplog.text) == bool(changes)
