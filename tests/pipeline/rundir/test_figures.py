"""What is shown of a run follows from the rows of its journals."""

import math

import pytest

from megabase.pipeline.rundir.figures import DECAY, Figures, fields, line
from megabase.pipeline.rundir.journal import Row


def loss(step: int, bits: float) -> Row:
    return {"step": step, "loss": bits * math.log(2), "bits_per_base": bits}


def speed(step: int, time: float, rate: float = 1000.0) -> Row:
    return {"step": step, "time": time, "tokens_per_second": rate}


def figures_of(rows: list[Row], max_steps: int | None = 100) -> Figures:
    figures = Figures(max_steps)
    for row in rows:
        figures.add(row)
    return figures


def test_a_line_has_the_last_step_both_losses_the_speed_and_the_time_left() -> None:
    rows = [
        {"step": 0, "time": 0.0, "started": True},
        *(loss(step, 2.0) for step in range(1, 10)),
        loss(10, 1.0),
        speed(10, 50.0, 12345.6),
    ]
    smoothed = (2.0 * (1 - DECAY**9) * DECAY + 1.0 * (1 - DECAY)) / (1 - DECAY**10)
    assert line(figures_of(rows), 50.0) == (
        f"step 10/100  1.0000 bits/base (smoothed {smoothed:.4f})  12,346 tokens/s  0:07:30 left"
    )
    assert line(figures_of([]), 0.0) == "step 0/100"
    assert line(figures_of([loss(3, 1.5)], None), 0.0) == "step 3  1.5000 bits/base (smoothed 1.5000)"


def test_the_time_left_follows_from_this_start_without_its_first_measurement() -> None:
    before = [{"step": 0, "time": 0.0, "started": True}, speed(10, 1e6), speed(20, 2e6)]
    rows = [*before, {"step": 20, "time": 3e6, "started": True}]
    assert figures_of(rows).seconds_left(3e6) is None
    rows.append(speed(30, 3e6 + 100))
    assert figures_of(rows).seconds_left(3e6 + 100) == pytest.approx(700)
    rows.append(speed(40, 3e6 + 110))  # the first 10 steps took 100 s, with the start; the next 10 s
    assert figures_of(rows).seconds_left(3e6 + 110) == pytest.approx(60)
    assert figures_of(rows).seconds_left(3e6 + 130) == pytest.approx(40)
    assert figures_of(rows).seconds_left(3e6 + 9999) == 0
    assert figures_of(rows, None).seconds_left(3e6 + 110) is None
    assert figures_of([*rows, loss(100, 1.0), speed(100, 3e6 + 200)]).seconds_left(3e6 + 200) is None


def test_losses_that_are_not_finite_are_shown_and_not_averaged() -> None:
    journal = [loss(1, 2.0), {"step": 2, "loss": "nan", "bits_per_base": "nan"}]  # as the file has it
    figures = figures_of(journal)
    assert math.isnan(figures.bits or 0) and figures.smoothed == pytest.approx(2.0)
    assert "nan bits/base (smoothed 2.0000)" in line(figures, 0.0)
    assert figures_of([loss(1, math.nan)]).smoothed is None


def test_fields_show_the_last_evaluation_and_checkpoint() -> None:
    evaluation = {"step": 40, "valid_loss": 1.3, "valid_bits_per_base": 1.9, "valid_bases": 10}
    markov = {"markov_0_bits_per_base": 2.0, "markov_5_bits_per_base": 1.95}
    recall = {"valid_copy_bits_per_base": 1.2, "valid_recall_bits": 0.7}
    saved = {"step": 50, "time": 1000.0, "checkpoint_seconds": 2.0}
    rows = [loss(1234, 1.5), {**evaluation, "step": 20}, evaluation | recall | markov, saved]
    assert fields(figures_of(rows, 2000), 1000 + 7200.0) == [
        ("step", "1,234 of 2,000 (61.7%)"),
        ("loss", "1.5000 bits/base (smoothed 1.5000)"),
        ("validation", "1.9000 bits/base at step 40 (Markov order 5: 1.9500)"),
        ("recall", "a repeated stretch 1.2000 bits/base, 1.9000 if it had not come before"),
        ("checkpoint", "step 50, written 2 h ago"),
    ]
    assert fields(figures_of([], None), 0.0) == []
    whole = {"full_valid_bits_per_base": 1.8, "full_valid_bases": 99, "full_markov_0_bits_per_base": 1.99}
    shown = dict(fields(figures_of([evaluation | whole]), 0.0))
    assert shown["validation"] == "1.9000 bits/base at step 40"
    assert shown["whole split"] == "1.8000 bits/base at step 40 (Markov order 0: 1.9900)"
    assert "whole split" not in dict(fields(figures_of([evaluation | whole | {"full_valid_bases": 10}]), 0.0))
    # An evaluation of before recall and Markov models were measured.
    assert [name for name, _ in fields(figures_of([evaluation]), 0.0)] == ["step", "validation"]
