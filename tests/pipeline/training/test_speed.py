"""Figures of speed from steps that took a known time."""

import time

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.training.speed import Speed


def test_steps_are_measured_from_the_last_restart_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 101.0, 102.0, 105.0, 105.0, 105.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    config = load([], ["run.name=a", "data.shards=b", "data.length=512", "data.global_batch=8"])
    config.model.vocab_size = 9
    speed = Speed(config, ranks=2)
    speed.restart()  # at 100 s
    for _ in range(3):
        speed.add_step()
    speed.data_seconds = 0.5
    row = speed.measure()
    assert row["step_seconds_median"] == 1.0 and row["step_seconds_most"] == 3.0
    assert row["tokens_per_second"] == pytest.approx(3 * 512 * 8 / 5)
    assert row["tokens_per_second_per_device"] == row["tokens_per_second"] / 2
    assert row["data_wait"] == pytest.approx(0.1)
    assert speed.steps == 0 and speed.data_seconds == 0
