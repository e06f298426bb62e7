"""What happens between two optimizer steps, as pure functions of what all ranks know.

Every rank computes the same decision, because each input is a function of the step's number or was agreed between
ranks. `callback.py` carries decisions out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.ranks.agreement import Agreed


@dataclass(frozen=True)
class Due:
    """What is due after a step. It follows from the number of the step alone.

    Attributes:
        last: the step is the last one, `trainer.max_steps`.
        checkpoint: `checkpoint.every_steps` divides it, or it is the last one.
        evaluation: `trainer.eval_every_steps` divides it, or it is the last one; and there is a validation split.
    """

    last: bool
    checkpoint: bool
    evaluation: bool


def due_at(step: int, config: RunConfig, has_validation: bool) -> Due:
    """What is due after optimizer step number `step`, counted from 1."""
    last = step >= config.trainer.max_steps
    return Due(
        last=last,
        checkpoint=last or _divides(config.checkpoint.every_steps, step),
        evaluation=has_validation and (last or _divides(config.trainer.eval_every_steps, step)),
    )


def must_settle(due: Due, previous: Agreed | None) -> bool:
    """Whether the ranks must agree about this step now, instead of one step later as usual.

    They must before they publish anything that depends on a complete journal and on good numbers.

    Args:
        due: at this step.
        previous: what was agreed about the step before.
    """
    agreed_to_act = previous is not None and (previous.stop or previous.save)
    return due.checkpoint or due.evaluation or agreed_to_act


def must_write(agreed: Agreed | None, log_every_steps: int) -> bool:
    """Whether rank 0 now writes the journal, and shows progress, up to the step that was agreed on.

    The row of a step is complete one step later, when the ranks have agreed on its samples. So the journal is written
    up to multiples of `trainer.log_every_steps`, one step after each.
    """
    return agreed is not None and agreed.step % log_every_steps == 0


@dataclass(frozen=True)
class Situation:
    """What all ranks know after an optimizer step.

    Attributes:
        due: at this step.
        stop: some rank received a request to stop.
        save: rank 0 wants a checkpoint, because `checkpoint.every_minutes` have passed.
        advance: every rank has finished its part of the checkpoint that is being written.
    """

    due: Due
    stop: bool = False
    save: bool = False
    advance: bool = False


def situation_of(due: Due, agreed: list[Agreed | None], advanced: int | None) -> Situation:
    """Combine what is due with what was agreed.

    Args:
        due: at this step.
        agreed: about the step before, and about this step if `must_settle`.
        advanced: `Saver.advanced`; None if no checkpoint is being written.
    """
    known = [each for each in agreed if each is not None]
    return Situation(
        due,
        stop=any(each.stop for each in known),
        save=any(each.save for each in known),
        advance=advanced is not None and any(each.progress > advanced for each in known),
    )


@dataclass(frozen=True)
class Decision:
    """What to do, in the order of the attributes.

    Attributes:
        report_stop: print why the run stops.
        advance: do the next part of the checkpoint that is being written.
        save: write a checkpoint of this step.
        final: that checkpoint is the last of this start: wait until it is published; a full disk is an error.
        evaluate: evaluate on the validation split.
        end: stop training.
        stopped_early: training stops before the run is finished.
    """

    report_stop: bool = False
    advance: bool = False
    save: bool = False
    final: bool = False
    evaluate: bool = False
    end: bool = False
    stopped_early: bool = False


def decide(situation: Situation) -> Decision:
    """What to do after an optimizer step."""
    due, end = situation.due, situation.stop or situation.due.last
    return Decision(
        report_stop=situation.stop,
        advance=situation.advance,
        save=due.checkpoint or situation.save or end,
        final=end,
        evaluate=due.evaluation,
        end=end,
        stopped_early=situation.stop and not due.last,
    )


def decide_after_broken_evaluation(situation: Situation, published: bool) -> Decision:
    """What remains to do when the ranks agreed to stop during the evaluation that `decide` asked for.

    The next start evaluates this step again. For that, a checkpoint of this step must be published.

    Args:
        situation: in which `decide` was asked.
        published: a checkpoint of this step is published. One that `decide` asked for may not be: the disk was full.
    """
    return Decision(
        report_stop=not decide(situation).report_stop,
        save=not published,
        final=not published,
        end=True,
        stopped_early=True,
    )


def _divides(every: int, step: int) -> bool:
    """Whether something that is due every `every` steps is due at `step`; 0: never."""
    return bool(every) and step % every == 0
