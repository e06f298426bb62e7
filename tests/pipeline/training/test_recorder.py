"""What rank 0 writes to the journal of a run."""

import math
from pathlib import Path

import pytest
import torch

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.ranks.agreement import Agreed
from megabase.pipeline.rundir.journal import read
from megabase.pipeline.training import progress
from megabase.pipeline.training import recorder as recorder_module
from megabase.pipeline.training.baselines import Baselines, evaluation_row
from megabase.pipeline.training.recorder import FinishedStep, Recorder


def settings(*more: str, root: Path = Path("/nowhere")) -> RunConfig:
    run = load(
        [], ["run.name=x", f"run.root={root}", "data.shards=s", "data.length=8", "data.global_batch=8", *more]
    )
    run.model.vocab_size = 9
    return run


def test_the_recorder_finds_the_first_bad_step_and_counts_skipped_updates(tmp_path: Path) -> None:
    for on_bad, first in (("stop", 2), ("skip", None)):
        run = settings(f"guard.on_bad={on_bad}", f"run.root={tmp_path}", f"run.name={on_bad}")
        run.directory.mkdir()
        recorder = Recorder(run, 1, None)
        recorder.open(0)
        for step, nats in enumerate([6.0, math.nan, math.inf, 6.0], 1):
            norm = 1.0 if math.isfinite(nats) else math.inf
            recorder.add(FinishedStep(step, torch.tensor(nats), None, 4, norm, math.isfinite(nats)))
            recorder.add_samples(Agreed(step, False, False, 0, 0))
        recorder.flush()
        assert (recorder.trouble and recorder.trouble.step) == first
        recorder.close()
        rows = list(read(run.directory / "metrics.jsonl"))
        assert [row["loss"] for row in rows] == [1.5, "nan", "inf", 1.5]
        assert [row.get("skipped_update") for row in rows] == [None, *[on_bad == "skip" or None] * 2, None]
        speeds = [row for row in read(run.directory / "performance.jsonl") if "tokens_per_second" in row]
        assert [row.get("skipped_updates") for row in speeds] == [2 if on_bad == "skip" else None]


def test_the_journal_has_the_weighted_mean_and_the_skipped_windows(tmp_path: Path) -> None:
    run = settings(root=tmp_path)
    run.directory.mkdir()
    recorder = Recorder(run, 1, None)
    recorder.open(0)
    weighted, unread = torch.tensor([0.75, 2.0]).double(), torch.zeros(2).double()
    recorder.add(FinishedStep(1, torch.tensor(6.0), None, 4, None))
    recorder.add(FinishedStep(2, torch.tensor(6.0), weighted, 4, None))
    recorder.add(FinishedStep(3, torch.tensor(0.0), unread, 4, None))
    for step in (1, 2, 3):
        recorder.add_samples(Agreed(step, False, False, 0, 0))
    recorder.flush()
    recorder.close()
    rows = list(read(run.directory / "metrics.jsonl"))
    assert [row["loss"] for row in rows] == [1.5, 8.0, 0.0]
    assert [row.get("skipped") for row in rows] == [None, 2, None]


def test_the_last_step_is_shown_even_if_its_speed_was_measured_with_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress.PROGRESS, "info", lines.append)
    run = settings("trainer.max_steps=2", "trainer.log_every_steps=1", root=tmp_path)
    run.directory.mkdir()
    recorder = Recorder(run, 1, None)
    recorder.open(0)
    for step in (1, 2):  # the ranks agree on a step while the next one is noted
        recorder.add(FinishedStep(step, torch.tensor(4 * step * math.log(2)), None, 4, 1.0))
        recorder.add_samples(Agreed(step - 1, False, False, 0, 0) if step > 1 else None)
        recorder.flush()
    recorder.add_samples(Agreed(2, False, False, 0, 0))
    recorder.flush()
    recorder.close()
    assert lines[0].startswith("step 1/2  1.0000 bits/base ")
    assert lines[-1].startswith("step 2/2  2.0000 bits/base ") and "tokens/s" in lines[-1]


def test_a_resumed_run_shows_what_the_journal_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress.PROGRESS, "info", lines.append)
    run = settings("trainer.max_steps=9", root=tmp_path)
    run.directory.mkdir()
    for start, nats in ((0, 4.0), (1, 0.0)):
        recorder = Recorder(run, 1, None)
        recorder.open(start)
        recorder.add(FinishedStep(start + 1, torch.tensor(nats * math.log(2)), None, 4, 1.0))
        recorder.add_samples(Agreed(start + 1, False, False, 0, 0))
        recorder.flush()
        recorder.close()
    assert lines[-1].startswith("step 2/9  0.0000 bits/base (smoothed 0.49")


def test_the_curve_is_drawn_again_at_the_end_only_if_it_lacks_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        recorder_module, "loss_curve", lambda run: drawn.append(len(list(read(run / "metrics.jsonl"))))
    )
    for more, expected in ((False, [2]), (True, [2, 3])):
        drawn.clear()
        run = settings(f"run.root={tmp_path}", f"run.name={more}")
        run.directory.mkdir()
        recorder = Recorder(run, 1, None)
        recorder.open(0)
        for step in (1, 2) if more else (1,):
            recorder.add(FinishedStep(step, torch.tensor(6.0), None, 4, 1.0))
            recorder.add_samples(Agreed(step, False, False, 0, 0))
            recorder.flush()
            if step == 1:
                recorder.add_evaluation(
                    {"step": 1, "valid_loss": 1.4, "valid_bits_per_base": 2.0, "markov_0_bits_per_base": 2.0},
                    {},
                )
        recorder.close()
        assert drawn == expected


def test_the_evaluation_at_the_end_prints_the_whole_split_beside_the_windows_of_every_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = settings(root=tmp_path)
    run.directory.mkdir()
    recorder = Recorder(run, 1, None)
    recorder.open(0)
    scored = {"valid_loss": 1.3, "valid_bits_per_base": 1.9, "valid_bases": 64}
    full = {"valid_loss": 1.2, "valid_bits_per_base": 1.8, "valid_bases": 512}
    row = evaluation_row(5, scored, full, Baselines([2.0, 1.95], [1.99, 1.94]))
    assert row["valid_loss"] == 1.3 and row["markov_1_bits_per_base"] == 1.95
    assert row["full_valid_loss"] == 1.2 and row["full_markov_1_bits_per_base"] == 1.94
    assert "full_valid_loss" not in evaluation_row(4, scored, None, Baselines([2.0], [2.0]))
    caplog.set_level("INFO", logger="megabase")
    recorder.add_evaluation(row, {"lsh_1_balance": 0.5})
    recorder.close()
    measured = list(read(run.directory / "performance.jsonl"))[-1]
    assert measured["step"] == 5 and measured["lsh_1_balance"] == 0.5 and measured["time"] > 0
    assert "step 5: validation 1.9000 bits/base (Markov 0, 1, ...: 2.0000  1.9500)" in caplog.text
    assert "the whole validation split 1.8000 bits/base (Markov 0, 1, ...: 1.9900  1.9400)" in caplog.text
