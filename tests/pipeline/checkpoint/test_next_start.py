"""What the next start of a run would do, found without ranks."""

from pathlib import Path

import pytest

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.pipeline.checkpoint import next_start as next_start_module
from megabase.pipeline.checkpoint.next_start import NextStart, evaluates, next_start
from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from tests.pipeline.checkpoints import write_checkpoint

EVALUATED = '{"step": 8, "valid_loss": 1.25}\n'


@pytest.fixture(scope="module")
def index(lambda_shards: Path) -> ShardIndex:
    return ShardIndex.open(lambda_shards)


def config(shards: Path, root: Path, *more: str) -> RunConfig:
    settings = [
        "run.name=x",
        "data.length=512",
        "trainer.max_steps=8",
        f"run.root={root}",
        f"data.shards={shards}",
    ]
    loaded = load([], [*settings, *more])
    loaded.model.vocab_size = 9
    return loaded


def checkpoint(run: RunConfig, step: int) -> Path:
    directory = run.directory / "checkpoints" / f"step-{step}"
    return write_checkpoint(directory, ranks=1, config=dotted(run))


def test_a_new_run_begins(tmp_path: Path, lambda_shards: Path, index: ShardIndex) -> None:
    assert next_start(config(lambda_shards, tmp_path), 1, index) == NextStart()


def test_a_run_is_finished_only_with_its_last_step_and_evaluation(
    tmp_path: Path, lambda_shards: Path, index: ShardIndex
) -> None:
    run = config(lambda_shards, tmp_path)
    checkpoint(run, 4)
    assert next_start(run, 1, index) == NextStart(step=4)
    checkpoint(run, 8)
    assert next_start(run, 1, index) == NextStart(step=8)
    (run.directory / "metrics.jsonl").write_text(EVALUATED.replace("8", "4", 1))
    assert not next_start(run, 1, index).finished
    (run.directory / "metrics.jsonl").write_text(EVALUATED)
    assert next_start(run, 1, index) == NextStart(step=8, finished=True)
    longer = config(lambda_shards, tmp_path, "trainer.max_steps=9")
    assert next_start(longer, 1, index) == NextStart(step=8, changes=["trainer.max_steps 8 -> 9"])


def test_without_validation_windows_no_evaluation_is_awaited(
    tmp_path: Path, lambda_shards: Path, index: ShardIndex
) -> None:
    # The validation split is the last tenth of 48,502 bases.
    run = config(lambda_shards, tmp_path, "data.length=8192")
    assert not evaluates(run, index) and evaluates(config(lambda_shards, tmp_path), index)
    checkpoint(run, 8)
    assert next_start(run, 1, index).finished


def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, lambda_shards: Path, index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(lambda_shards, tmp_path)
    checkpoint(run, 4)
    newest = checkpoint(run, 8)
    (run.directory / "metrics.jsonl").write_text(EVALUATED)
    states = newest / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states.write_bytes(states.read_bytes()[::-1])
    found = next_start(run, 1, index)
    assert (found.step, found.finished) == (4, False)
    [damage] = found.damaged
    assert damage.startswith("step-8 is broken: ") and "another checksum" in damage
    # A large checkpoint is not read.
    monkeypatch.setattr(next_start_module, "READ_BYTES", 100)
    found = next_start(run, 1, index)
    assert (found.step, found.finished, found.verified) == (8, True, False)
    (newest / "latest").unlink()
    assert next_start(run, 1, index).damaged == ["step-8 is broken: latest is missing"]


def test_nothing_is_renamed(tmp_path: Path, lambda_shards: Path, index: ShardIndex) -> None:
    run = config(lambda_shards, tmp_path)
    (checkpoint(run, 4) / "latest").unlink()
    found = next_start(run, 1, index)
    assert found.step == 0 and found.refused.startswith("no checkpoint is intact")
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == ["step-4"]


def test_a_run_whose_checkpoints_are_gone_is_refused(
    tmp_path: Path, lambda_shards: Path, index: ShardIndex
) -> None:
    run = config(lambda_shards, tmp_path)
    run.directory.mkdir()
    (run.directory / "performance.jsonl").write_text('{"step": 4, "checkpoint_seconds": 0.1}\n')
    assert next_start(run, 1, index).refused.startswith("the checkpoint of step 4 is gone")
