"""What is done between two optimizer steps, in every situation."""

from itertools import product

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.ranks.agreement import Agreed
from megabase.pipeline.training.decide import (
    Decision,
    Due,
    Situation,
    decide,
    decide_after_broken_evaluation,
    due_at,
    must_settle,
    must_write,
    situation_of,
)

NOTHING = Due(last=False, checkpoint=False, evaluation=False)
CHECKPOINT = Due(last=False, checkpoint=True, evaluation=False)
EVALUATION = Due(last=False, checkpoint=False, evaluation=True)
BOTH = Due(last=False, checkpoint=True, evaluation=True)
LAST = Due(last=True, checkpoint=True, evaluation=False)
LAST_EVALUATED = Due(last=True, checkpoint=True, evaluation=True)
ALL_DUE = [NOTHING, CHECKPOINT, EVALUATION, BOTH, LAST, LAST_EVALUATED]


@pytest.mark.parametrize(
    ("step", "validation", "expected"),
    [
        (1, True, NOTHING),
        (5, True, CHECKPOINT),
        (4, True, EVALUATION),
        (4, False, NOTHING),
        (20, True, BOTH),
        (20, False, CHECKPOINT),
        (43, True, LAST_EVALUATED),
        (43, False, LAST),
        (50, True, LAST_EVALUATED),  # trainer.max_steps was lowered
    ],
)
def test_what_is_due_at_a_step(step: int, validation: bool, expected: Due) -> None:
    settings = ["trainer.max_steps=43", "checkpoint.every_steps=5", "trainer.eval_every_steps=4"]
    config = load([], ["run.name=x", "data.shards=s", "data.length=8", *settings])
    assert due_at(step, config, validation) == expected


def test_intervals_of_zero_are_never_due_but_at_the_last_step() -> None:
    settings = ["trainer.max_steps=9", "checkpoint.every_steps=0", "trainer.eval_every_steps=0"]
    config = load([], ["run.name=x", "data.shards=s", "data.length=8", *settings])
    assert [due_at(step, config, True) for step in (1, 8)] == [NOTHING, NOTHING]
    assert due_at(9, config, True) == LAST_EVALUATED


def agreed(stop: bool = False, save: bool = False, progress: int = 0) -> Agreed:
    return Agreed(step=1, stop=stop, save=save, progress=progress, samples=0)


@pytest.mark.parametrize(
    ("due", "previous", "expected"),
    [
        (NOTHING, None, False),
        (NOTHING, agreed(), False),
        (NOTHING, agreed(progress=2), False),
        (NOTHING, agreed(stop=True), True),
        (NOTHING, agreed(save=True), True),
        (CHECKPOINT, None, True),
        (EVALUATION, agreed(), True),
        (LAST, None, True),
    ],
)
def test_when_the_ranks_must_agree_at_once(due: Due, previous: Agreed | None, expected: bool) -> None:
    assert must_settle(due, previous) is expected


@pytest.mark.parametrize(
    ("known", "advanced", "expected"),
    [
        ([None], None, Situation(NOTHING)),
        ([agreed()], None, Situation(NOTHING)),
        ([agreed(stop=True)], None, Situation(NOTHING, stop=True)),
        ([None, agreed(stop=True)], None, Situation(NOTHING, stop=True)),
        ([agreed(save=True), agreed()], None, Situation(NOTHING, save=True)),
        # No checkpoint is being written: progress means nothing.
        ([agreed(progress=2)], None, Situation(NOTHING)),
        # One is being written: it advances when all ranks have finished more parts than it has advanced.
        ([agreed(progress=0)], 0, Situation(NOTHING)),
        ([agreed(progress=1)], 0, Situation(NOTHING, advance=True)),
        ([agreed(progress=1)], 1, Situation(NOTHING)),
        ([agreed(progress=2)], 1, Situation(NOTHING, advance=True)),
        ([agreed(progress=0), agreed(progress=1)], 0, Situation(NOTHING, advance=True)),
    ],
)
def test_what_ranks_know_together(
    known: list[Agreed | None], advanced: int | None, expected: Situation
) -> None:
    assert situation_of(NOTHING, known, advanced) == expected


STOPPED = {"report_stop": True, "save": True, "final": True, "end": True, "stopped_early": True}
FINISHED = {"save": True, "final": True, "end": True}


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        (Situation(NOTHING), Decision()),
        (Situation(CHECKPOINT), Decision(save=True)),
        (Situation(EVALUATION), Decision(evaluate=True)),
        (Situation(BOTH), Decision(save=True, evaluate=True)),
        (Situation(LAST), Decision(**FINISHED)),
        (Situation(LAST_EVALUATED), Decision(**FINISHED, evaluate=True)),
        # checkpoint.every_minutes have passed.
        (Situation(NOTHING, save=True), Decision(save=True)),
        (Situation(CHECKPOINT, save=True), Decision(save=True)),
        (Situation(EVALUATION, save=True), Decision(save=True, evaluate=True)),
        (Situation(LAST, save=True), Decision(**FINISHED)),
        # A stop was requested: the checkpoint of this step is the last of this start.
        (Situation(NOTHING, stop=True), Decision(**STOPPED)),
        (Situation(NOTHING, stop=True, save=True), Decision(**STOPPED)),
        (Situation(CHECKPOINT, stop=True), Decision(**STOPPED)),
        (Situation(BOTH, stop=True), Decision(**STOPPED, evaluate=True)),
        # At the last step a stop leaves nothing to do.
        (Situation(LAST, stop=True), Decision(**FINISHED, report_stop=True)),
        (Situation(LAST_EVALUATED, stop=True), Decision(**FINISHED, report_stop=True, evaluate=True)),
        # A checkpoint is being written in the background.
        (Situation(NOTHING, advance=True), Decision(advance=True)),
        (Situation(CHECKPOINT, advance=True), Decision(advance=True, save=True)),
        (Situation(EVALUATION, advance=True), Decision(advance=True, evaluate=True)),
        (Situation(NOTHING, stop=True, advance=True), Decision(**STOPPED, advance=True)),
        (Situation(LAST, advance=True), Decision(**FINISHED, advance=True)),
    ],
)
def test_what_is_decided(situation: Situation, expected: Decision) -> None:
    assert decide(situation) == expected


BROKEN = {"end": True, "stopped_early": True}
SAVES = {"save": True, "final": True}


@pytest.mark.parametrize(
    ("situation", "published", "expected"),
    [
        # There is no checkpoint of this step yet.
        (Situation(EVALUATION), False, Decision(**BROKEN, **SAVES, report_stop=True)),
        # There is one.
        (Situation(BOTH), True, Decision(**BROKEN, report_stop=True)),
        (Situation(EVALUATION, save=True), True, Decision(**BROKEN, report_stop=True)),
        (Situation(LAST_EVALUATED), True, Decision(**BROKEN, report_stop=True)),
        # It was due, but the disk was full: now it is an error if the disk still is.
        (Situation(BOTH), False, Decision(**BROKEN, **SAVES, report_stop=True)),
        (Situation(EVALUATION, save=True), False, Decision(**BROKEN, **SAVES, report_stop=True)),
        # The stop was known, and printed, before the evaluation.
        (Situation(EVALUATION, stop=True), True, Decision(**BROKEN)),
        (Situation(LAST_EVALUATED, stop=True), True, Decision(**BROKEN)),
    ],
)
def test_what_remains_after_an_evaluation_that_was_broken_off(
    situation: Situation, published: bool, expected: Decision
) -> None:
    assert decide_after_broken_evaluation(situation, published) == expected


def test_what_holds_in_every_situation() -> None:
    for due, stop, save, advance in product(ALL_DUE, *[(False, True)] * 3):
        situation = Situation(due, stop, save, advance)
        decision = decide(situation)
        assert decision.end == (stop or due.last)
        # Training ends with a checkpoint that is published, and is finished only at the last step.
        assert decision.final == decision.end and (decision.save or not decision.end)
        assert decision.stopped_early == (decision.end and not due.last)
        assert decision.evaluate == due.evaluation and decision.advance == advance
        # After a broken evaluation a checkpoint of this step is published, written once, and the reason printed once.
        for published in (False, True):
            after = decide_after_broken_evaluation(situation, published)
            assert after.save == after.final == (not published) and decision.report_stop != after.report_stop
            assert after.end and after.stopped_early and not after.evaluate


def test_the_journal_is_written_up_to_multiples_of_the_interval() -> None:
    # As in training: at each step the ranks learn what they agreed about the step before, unless that was settled.
    agreed = [None, *(Agreed(step, False, False, 0, 0) for step in range(1, 31))]
    assert [each and each.step for each in agreed if must_write(each, 10)] == [10, 20, 30]
    assert [each and each.step for each in agreed if must_write(each, 1)] == list(range(1, 31))
