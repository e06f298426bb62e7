"""Which checkpoints are kept: the newest, those of certain steps, and the best. All others are deleted.

`steps_to_delete` decides, from steps and losses alone; `prune` deletes. Pruning after every checkpoint leaves the same
checkpoints as pruning once at the end. The evaluation of a step comes after its checkpoint, so the newest checkpoint
has no loss yet: it is always kept. A damaged checkpoint is not counted and not deleted: so no intact one is deleted in
its place, and the next start renames it and logs its name.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from megabase.pipeline.checkpoint.damage import find_obvious_damage
from megabase.pipeline.checkpoint.manifest import list_checkpoints, step_of
from megabase.pipeline.config.schema import CheckpointConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.journal import read

logger = logging.getLogger(__name__)


def steps_to_delete(
    steps: Iterable[int], losses: Mapping[int, float], settings: CheckpointConfig
) -> set[int]:
    """The steps whose checkpoints are to be deleted.

    Args:
        steps: steps of all checkpoints, in any order.
        losses: validation loss by step, of the steps that were evaluated; NaN counts as not evaluated.
        settings: `keep`, `keep_every` and `keep_best` are used. Of equal losses the newer one is better.
    """
    newest_first = sorted(set(steps), reverse=True)
    kept = set(newest_first[: settings.keep])
    if settings.keep_every:
        kept |= {step for step in newest_first if step % settings.keep_every == 0}
    return set(newest_first) - kept - set(best_steps(newest_first, losses, settings.keep_best))


def best_steps(steps: Iterable[int], losses: Mapping[int, float], number: int) -> list[int]:
    """The steps with the lowest losses, at most `number`, best first."""
    evaluated = [step for step in steps if not math.isnan(losses.get(step, math.nan))]
    return sorted(evaluated, key=lambda step: (losses[step], -step))[:number]


def validation_losses(journal: Path) -> dict[int, float]:
    """Validation loss by step, from a run's `metrics.jsonl`, without losses that are not finite."""
    rows = read(journal, having="valid_loss")
    # The journal writes NaN and infinities as text.
    return {row["step"]: row["valid_loss"] for row in rows if isinstance(row.get("valid_loss"), float)}


def prune(checkpoints: Path, losses: Mapping[int, float], settings: CheckpointConfig) -> None:
    """Delete the checkpoints that are not kept. A reader never sees one that is half deleted.

    An error is only logged: too many checkpoints are not a reason to end a run.

    Args:
        checkpoints: directory of the run's checkpoints.
        losses: as for `steps_to_delete`.
        settings: as for `steps_to_delete`.
    """
    try:
        for step in sorted(_intact_steps_to_delete(checkpoints, losses, settings)):
            _delete(checkpoints / f"step-{step}")
    except (OSError, UserError) as error:
        logger.warning(f"old checkpoints in {checkpoints} cannot be deleted: {error}")


def _intact_steps_to_delete(
    checkpoints: Path, losses: Mapping[int, float], settings: CheckpointConfig
) -> set[int]:
    """`steps_to_delete` of the checkpoints whose names and sizes show no damage.

    Checks only the checkpoints on which the result depends: those to delete, and those kept in their place.
    """
    steps = set(map(step_of, list_checkpoints(checkpoints)))
    intact: set[int] = set()
    while True:
        deleted = steps_to_delete(steps, losses, settings)
        kept = sorted(steps - deleted, reverse=True)
        kept_instead = {*kept[: settings.keep], *best_steps(kept, losses, settings.keep_best)}
        if not (unknown := (deleted | kept_instead) - intact):
            return deleted
        for step in sorted(unknown):
            path = checkpoints / f"step-{step}"
            if damage := find_obvious_damage(path):
                logger.warning(f"checkpoint {path} is broken ({damage}): it does not count as kept")
                steps.discard(step)
            else:
                intact.add(step)


def _delete(path: Path) -> None:
    """Rename a checkpoint to a name that no reader uses, then delete it."""
    deleting = path.with_name(path.name + ".deleting")
    path.rename(deleting)
    shutil.rmtree(deleting, ignore_errors=True)
