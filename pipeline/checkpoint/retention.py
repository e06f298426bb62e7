"""Which checkpoints stay: the newest, those of round steps, and the best; all others are deleted.

`doomed` decides, from steps and losses alone; `prune` deletes. To prune after every checkpoint leaves what pruning once
at the end would: a checkpoint that falls behind stays behind. The evaluation of a step comes after its checkpoint,
so the newest is not measured yet: it is always among those that stay. What is damaged neither counts nor is deleted:
it cannot push out a good one, and the next start sets it aside and names it.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megabase.pipeline.checkpoint.manifest import glance, list_checkpoints, step_of
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.journal import read

if TYPE_CHECKING:
    from megabase.pipeline.config.schema import CheckpointConfig


def doomed(steps: Iterable[int], losses: Mapping[int, float], settings: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints are to be deleted.

    Args:
        steps: of all checkpoints, in any order.
        losses: validation loss by step, of the steps that were evaluated; a NaN is as good as none.
        settings: its keep, keep_every and keep_best. Of equal losses the newer is better.
    """
    there = sorted(set(steps), reverse=True)
    stay = set(there[: settings.keep])
    if settings.keep_every:
        stay |= {step for step in there if step % settings.keep_every == 0}
    return set(there) - stay - set(best(there, losses, settings.keep_best))


def best(steps: Iterable[int], losses: Mapping[int, float], number: int) -> list[int]:
    """The steps with the lowest losses, at most `number`, best first."""
    measured = [step for step in steps if not math.isnan(losses.get(step, math.nan))]
    return sorted(measured, key=lambda step: (losses[step], -step))[:number]


def evaluations(journal: Path) -> dict[int, float]:
    """Validation loss by step, from a run's `metrics.jsonl`; without those that are not finite."""
    rows = read(journal, having="valid_loss")
    # The journal writes NaN and infinities as text.
    return {row["step"]: row["valid_loss"] for row in rows if isinstance(row.get("valid_loss"), float)}


def prune(checkpoints: Path, losses: Mapping[int, float], settings: CheckpointConfig) -> None:
    """Delete the checkpoints that are not to stay. A reader never sees one that is half deleted.

    Too many checkpoints are no reason to end a training: what cannot be deleted is named on stderr.

    Args:
        losses: as `doomed`.
    """
    try:
        for step in sorted(_doomed_and_sound(checkpoints, losses, settings)):
            _delete(checkpoints / f"step-{step}")
    except (OSError, UserError) as error:
        print(f"megabase: old checkpoints in {checkpoints} cannot be deleted: {error}", file=sys.stderr)


def _doomed_and_sound(checkpoints: Path, losses: Mapping[int, float], settings: CheckpointConfig) -> set[int]:
    """What `doomed` says of the checkpoints that are not damaged, as far as names and sizes tell.

    Looks at those only on which that depends: whoever is to go, or lets others go by staying.
    """
    steps = set(map(step_of, list_checkpoints(checkpoints)))
    sound: set[int] = set()
    while True:
        going = doomed(steps, losses, settings)
        staying = sorted(steps - going, reverse=True)
        pushing = {*staying[: settings.keep], *best(staying, losses, settings.keep_best)}
        if not (unknown := (going | pushing) - sound):
            return going
        for step in sorted(unknown):
            path = checkpoints / f"step-{step}"
            if found := glance(path):
                print(f"megabase: checkpoint {path} is broken ({found}): it does not count", file=sys.stderr)
                steps.discard(step)
            else:
                sound.add(step)


def _delete(path: Path) -> None:
    """Remove a checkpoint, from its name on."""
    leaving = path.with_name(path.name + ".deleting")
    path.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)
