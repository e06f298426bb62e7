"""Which checkpoints are kept, and that nothing else is deleted."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.checkpoint.manifest import MANIFEST, list_checkpoints, step_of
from megabase.pipeline.checkpoint.retention import best_steps, prune, steps_to_delete, validation_losses
from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import CheckpointConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.training.check import check
from tests.conftest import DATA
from tests.pipeline.checkpoints import write_checkpoint

STEPS = st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=20).map(sorted)
LOSSES = st.dictionaries(
    st.integers(1, 60), st.sampled_from([1.0, 1.25, 1.5, math.nan, math.inf]) | st.floats(0, 10)
)
SETTINGS = st.builds(
    CheckpointConfig, keep=st.integers(1, 5), keep_every=st.integers(0, 12), keep_best=st.integers(0, 4)
)


@given(STEPS, LOSSES, SETTINGS)
def test_the_newest_those_of_certain_steps_and_the_best_are_kept(
    steps: list[int], losses: dict[int, float], settings: CheckpointConfig
) -> None:
    stay = set(steps) - steps_to_delete(steps, losses, settings)
    newest = set(steps[-settings.keep :])
    round_ones = {step for step in steps if settings.keep_every and step % settings.keep_every == 0}
    measured = [step for step in steps if not math.isnan(losses.get(step, math.nan))]
    good = set()
    for step in measured:
        better = [x for x in measured if (losses[x], -x) < (losses[step], -step)]
        if len(better) < settings.keep_best:
            good.add(step)
    assert stay == newest | round_ones | good


@given(STEPS, LOSSES, SETTINGS, st.randoms())
def test_the_order_does_not_matter_and_a_second_time_deletes_nothing(steps, losses, settings, chance) -> None:
    gone = steps_to_delete(steps, losses, settings)
    assert gone <= set(steps)
    assert steps_to_delete(set(steps) - gone, losses, settings) == set()
    shuffled = list(steps)
    chance.shuffle(shuffled)
    assert steps_to_delete(shuffled, losses, settings) == gone


@given(STEPS, LOSSES, SETTINGS, st.sets(st.integers(0, 19)))
def test_pruning_after_every_checkpoint_leaves_what_pruning_at_the_end_would(
    steps, losses, settings, skipped
) -> None:
    there: set[int] = set()
    for number, step in enumerate(steps):
        there.add(step)
        # This step is not evaluated yet. Some prunings fail or are killed.
        if number not in skipped:
            known = {other: loss for other, loss in losses.items() if other < step}
            there -= steps_to_delete(there, known, settings)
    there -= steps_to_delete(there, losses, settings)
    assert there == set(steps) - steps_to_delete(steps, losses, settings)


def test_best_of_equal_ones_is_the_newer() -> None:
    assert best_steps([10, 20, 30, 40], {10: 1.5, 20: 1.5, 30: 2.0}, 2) == [20, 10]


def test_losses_come_from_the_journal_s_evaluations(tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    assert validation_losses(journal) == {}
    rows = [
        {"step": 5, "loss": 2.0},
        {"step": 5, "valid_loss": 1.5},
        {"step": 10, "valid_loss": "nan"},
        {"step": 15, "valid_loss": 1.25},
    ]
    torn = '{"step": 20, "valid_loss": 1.2'
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    assert validation_losses(journal) == {5: 1.5, 15: 1.25}


def steps_in(directory: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(directory)]


def test_only_what_is_not_kept_is_deleted_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        write_checkpoint(tmp_path / f"step-{step}")
    aside = write_checkpoint(tmp_path / "step-25", name="step-25.broken")
    prune(tmp_path, {10: 1.0, 20: 3.0}, CheckpointConfig(keep=2, keep_every=40, keep_best=1))
    assert steps_in(tmp_path) == [60, 50, 40, 10]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"step-{step}" for step in (60, 50, 40, 10)),
        aside.name,
    }


def test_a_damaged_checkpoint_displaces_no_intact_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {step: write_checkpoint(tmp_path / f"step-{step}") for step in (10, 20, 30, 40)}
    (paths[40] / MANIFEST).unlink()
    shard = next((paths[30] / "checkpoint").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    prune(tmp_path, {}, CheckpointConfig(keep=1))
    # 20 is the newest that a start could resume from. The next start sets the damaged ones aside.
    assert steps_in(tmp_path) == [40, 30, 20]
    warnings = capsys.readouterr().err
    assert "step-40 is broken (megabase.json is missing)" in warnings and "step-30 is broken" in warnings


def test_a_damaged_checkpoint_is_neither_the_best_nor_deleted(tmp_path: Path) -> None:
    paths = {step: write_checkpoint(tmp_path / f"step-{step}") for step in (10, 20, 30, 40)}
    (paths[10] / "latest").unlink()
    losses = {10: 1.0, 20: 1.5, 30: 2.0}
    prune(tmp_path, losses, CheckpointConfig(keep=1, keep_best=1))
    assert steps_in(tmp_path) == [40, 20, 10]
    prune(tmp_path, losses, CheckpointConfig(keep=1))
    assert steps_in(tmp_path) == [40, 10]


def test_a_checkpoint_of_a_newer_version_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path / f"step-{step}", version=99)
    prune(tmp_path, {}, CheckpointConfig(keep=1))
    assert "cannot be deleted: " in capsys.readouterr().err
    assert steps_in(tmp_path) == [20, 10]


def test_what_cannot_be_deleted_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path / f"step-{step}")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    prune(tmp_path, {}, CheckpointConfig(keep=1))
    assert "cannot be deleted: [Errno 13]" in capsys.readouterr().err
    assert steps_in(tmp_path) == [20, 10]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["checkpoint.keep_every=-1"], "checkpoint.keep_every=-1: must not be negative"),
        (["checkpoint.keep_best=-1"], "checkpoint.keep_best=-1: must not be negative"),
        (
            ["checkpoint.keep_every=1200"],
            "checkpoint.keep_every=1200: .* multiple of checkpoint.every_steps=500",
        ),
        (
            ["checkpoint.keep_every=1000", "checkpoint.every_steps=0"],
            "checkpoint.keep_every=1000: .* set checkpoint.every_steps",
        ),
        (
            ["checkpoint.keep_best=2", "trainer.eval_every_steps=0"],
            "checkpoint.keep_best=2 needs evaluations",
        ),
        (["checkpoint.keep_best=2", "checkpoint.every_steps=0"], "checkpoint.keep_best=2 needs evaluations"),
        (["checkpoint.keep_best=2", "checkpoint.every_steps=300"], "make one of checkpoint.every_steps=300"),
    ],
)
def test_settings_that_keep_steps_without_checkpoints_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load([], ["run.name=x", "data.shards=s", *settings])


def test_the_best_needs_a_validation_split(tmp_path: Path) -> None:
    prepare([DATA / "lambda_phage.fna.gz"], tmp_path / "shards", progress=False)
    run = load([], ["run.name=x", f"data.shards={tmp_path / 'shards'}", "checkpoint.keep_best=1"])
    with pytest.raises(UserError, match=r"checkpoint.keep_best=1: .* has no validation split"):
        check(run, 1)


def test_settings_that_fit_are_accepted() -> None:
    for settings in (
        ["checkpoint.keep_every=1000", "checkpoint.keep_best=2"],
        ["checkpoint.keep_best=1", "checkpoint.every_steps=250"],
        ["checkpoint.keep_best=1", "checkpoint.every_steps=1000"],
    ):
        load([], ["run.name=x", "data.shards=s", *settings])
