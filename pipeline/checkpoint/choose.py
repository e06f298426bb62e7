"""Choosing a checkpoint of a run: one rule (`newest_intact`) for resuming, for readers, and for the list.

A run that resumes renames damaged checkpoints. A reader (export) renames nothing, because the run may be training, and
expects that the run deletes checkpoints meanwhile. This module imports nothing heavy.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megabase.pipeline.checkpoint.damage import find_damage
from megabase.pipeline.checkpoint.manifest import (
    Damaged,
    Manifest,
    list_checkpoints,
    read_manifest,
    step_of,
)
from megabase.pipeline.checkpoint.publish import set_aside
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.rundir.paths import CHECKPOINTS, RunPaths

if TYPE_CHECKING:
    from megabase.pipeline.ranks.groups import Group

logger = logging.getLogger(__name__)
C = TypeVar("C")
D = TypeVar("D")
# How often a reader lists the checkpoints, if each time all of them are deleted before it has checked them.
ATTEMPTS = 5


def newest_intact(
    candidates: Iterable[C], damage_of: Callable[[C], D | None], pass_over: Callable[[C, D], None]
) -> C | None:
    """The newest checkpoint without damage; None if all are damaged. A damaged one is passed over.

    A checkpoint that cannot be judged (it cannot be read, or a newer megabase wrote it) is not damaged, and no older
    one is used in its place. For it, `damage_of` either raises an error, which ends the search, or returns None, so
    that it is chosen.

    Args:
        candidates: checkpoints, newest first.
        damage_of: returns what is wrong with a checkpoint, or None.
        pass_over: called with each damaged checkpoint and its damage.
    """
    for candidate in candidates:
        damage = damage_of(candidate)
        if damage is None:
            return candidate
        pass_over(candidate, damage)
    return None


def choose_to_resume(checkpoints: Path, world: Group) -> tuple[Path, Manifest] | None:
    """The newest intact checkpoint and its manifest; None if there never was one. All ranks get the same answer.

    Each rank checks a part of the files. A damaged checkpoint is renamed to `step-N.broken` and named in a warning.

    Args:
        checkpoints: directory of the run's checkpoints.
        world: every process of the run; all of them call it.

    Raises:
        RunError: a rank cannot read a file, or finds damage that rank 0 does not find, or a damaged checkpoint cannot
            be renamed: the file system needs attention.
        UserError: there are checkpoints, but none is intact; or a newer megabase wrote one.
    """

    def damage_of(path: Path) -> tuple[int, str] | None:
        """The first rank that finds damage, and the damage."""
        damage = error = None
        try:
            damage = find_damage(path, rank=world.rank, size=world.size)
        except OSError as caught:
            error = f"{platform.node()}: {path} cannot be read: {caught}"
        world.check(error, temporary=True)
        return next(((rank, found) for rank, found in enumerate(world.gather(damage)) if found), None)

    def pass_over(path: Path, damage: tuple[int, str]) -> None:
        world.check(_set_aside_damaged(path, *damage) if world.rank == 0 else None, temporary=True)

    found = world.broadcast(list_checkpoints(checkpoints) if world.rank == 0 else None)
    chosen = newest_intact(found, damage_of, pass_over)
    if chosen is not None:
        return chosen, read_manifest(chosen)
    broken = world.broadcast(_set_aside_names(checkpoints))
    if broken:
        raise UserError(
            f"no checkpoint in {checkpoints} is intact ({broken}): copy one from a backup as step-N, or start again"
            " from step 0 with another run.name"
        )
    return None


def choose_to_read(run: Path, step: int | None, check: Callable[[Manifest], None] | None = None) -> Path:
    """The checkpoint of `step`, or the newest intact one. Renames nothing, so the run may be training.

    Args:
        run: the run directory.
        step: which checkpoint; None: the newest intact one.
        check: called with a manifest before the checkpoint's files are read; may raise an error of its own.

    Raises:
        UserError: `run` is not a run directory, or has no such checkpoint, or no intact one.
        RunError: a checkpoint cannot be read, or all were deleted before they could be checked.
    """
    for _ in range(ATTEMPTS):
        damaged: list[str] = []

        def pass_over(path: Path, damage: str, damaged: list[str] = damaged) -> None:
            if path.exists():  # otherwise the run that trains has deleted it
                damaged.append(f"checkpoint {path} is broken ({damage})")
                if step is None:
                    logger.warning(f"{damaged[-1]}; trying the one before")

        # With a step, older checkpoints are checked only if that one is damaged, to name an intact one in the error.
        candidates = [path for path in _candidates(run, step) if step is None or step_of(path) <= step]
        chosen = newest_intact(candidates, lambda path: _damage_for_reader(path, check), pass_over)
        if chosen is not None and step in (None, step_of(chosen)):
            return chosen
        if damaged and chosen is not None:
            raise UserError(f"{damaged[0]}: use --step {step_of(chosen)}, which is intact")
        if damaged:
            raise UserError(
                f"{damaged[0]}, and no older one is intact: `megabase checkpoints {run}` lists them"
            )
        # All candidates were deleted before they were checked: list them again.
    raise RunError(f"the checkpoints of {run} are deleted faster than they can be read: try again")


def _candidates(run: Path, step: int | None) -> list[Path]:
    """All published checkpoints of a run, newest first. Raises UserError if there are none, or none of `step`."""
    checkpoints = RunPaths(run).checkpoints
    if not run.is_dir() or not checkpoints.is_dir():
        raise UserError(
            f"{run} is not a run directory: give <run.root>/<run.name>, which holds `{CHECKPOINTS}/`"
        )
    found = list_checkpoints(checkpoints)
    if not found:
        broken = _set_aside_names(checkpoints)
        raise UserError(
            f"{run} has no intact checkpoint, only {broken}"
            if broken
            else f"{run} has no checkpoint yet: train it first"
        )
    if step is not None and step not in map(step_of, found):
        steps = ", ".join(str(step_of(path)) for path in reversed(found))
        raise UserError(f"{run} has no checkpoint of step {step}: it has {steps}")
    return found


def _damage_for_reader(path: Path, check: Callable[[Manifest], None] | None) -> str | None:
    try:
        if check:
            check(read_manifest(path))
        return find_damage(path)
    except Damaged as damage:
        return str(damage)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def _set_aside_damaged(path: Path, rank: int, damage: str) -> str | None:
    """On rank 0: rename a checkpoint that `rank` found damaged, and log it. Returns an error, or None."""
    try:
        # Another node may see another disk: rank 0 must find the damage as well.
        if rank != 0 and find_damage(path) is None:
            return f"rank {rank} finds {path} broken ({damage}), this rank does not: check the file system"
        moved = set_aside(path)
    except OSError as error:
        return f"{path} is broken ({damage}) and cannot be set aside: {error}"
    logger.warning(f"checkpoint {path} is broken ({damage}); kept as {moved.name}")
    return None


def _set_aside_names(checkpoints: Path) -> str:
    return ", ".join(sorted(path.name for path in checkpoints.glob("step-*.broken*")))
