"""Where a start of a run continues (the newest good checkpoint, or step 0), and what it writes before it trains."""

from __future__ import annotations

import logging
from pathlib import Path

from megabase.pipeline.checkpoint.choose import choose_to_resume
from megabase.pipeline.checkpoint.identity import changed_settings, check_same_run, manifest_of
from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.checkpoint.next_start import newest_written
from megabase.pipeline.config.load import save
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.rundir import environment
from megabase.pipeline.rundir.journal import has_evaluation, restore
from megabase.pipeline.rundir.paths import METRICS, RunPaths
from megabase.pipeline.tracking.identity import Identity
from megabase.pipeline.training.task import Task

logger = logging.getLogger(__name__)


def resume_point(task: Task, world: Group) -> tuple[Path, Manifest] | None:
    """The checkpoint to resume from and its manifest; None for a fresh start. All ranks call it.

    Raises:
        UserError: the checkpoint belongs to another model or other data, or the run's checkpoints are gone.
    """
    config = task.config
    chosen = choose_to_resume(RunPaths(config.directory).checkpoints, world)
    if chosen is None:
        _check_that_none_was_written(config.directory, world)
        return None
    path, manifest = chosen
    current = manifest_of(config, manifest.step, ranks=world.size, data=task.identity, alphabet=task.alphabet)
    check_same_run(manifest, current, path)
    if world.rank == 0 and (changes := changed_settings(manifest, current)):
        logger.info(f"{config.run.name} resumes with {', '.join(changes)}")
    return chosen


def is_finished(config: RunConfig, step: int, evaluates: bool, world: Group) -> bool:
    """Whether a run whose newest checkpoint is of `step` has nothing left to do. All ranks call it.

    Args:
        config: of the run.
        step: of its newest checkpoint.
        evaluates: whether there is a validation split: then the last evaluation must be in the journal, too.
        world: all ranks.
    """
    if step < config.trainer.max_steps:
        return False
    if not evaluates:
        return True
    evaluated = world.rank == 0 and has_evaluation(RunPaths(config.directory).metrics, step)
    return bool(world.broadcast(evaluated))


def prepare_run_directory(task: Task, resume_from: Path | None, world: Group) -> None:
    """Write what describes the run (config.yaml, ...), and repair the journal. All ranks call it.

    Raises:
        RunError: on every rank, if rank 0 cannot write there.
    """
    error = None
    if world.rank == 0:
        try:
            _write_run_directory(task.config, resume_from)
            task.describe_data()
        except OSError as caught:
            error = f"cannot write in {task.config.directory}: {caught}"
    world.check(error)


def _write_run_directory(config: RunConfig, resume_from: Path | None) -> None:
    paths = RunPaths(config.directory)
    if resume_from:
        logger.info(f"resuming {config.run.name} from {resume_from}")
        copy = resume_from / METRICS
        # Checkpoints of older versions hold no copy of the journal.
        if copy.exists() and (damage := restore(paths.metrics, copy)):
            logger.warning(
                f"{paths.metrics} {damage} before the checkpoint's step: put back from the checkpoint"
            )
    save(config, paths.config)
    environment.write(config.directory)
    # Also of a run that is not tracked: all copies of its directory are then one run for `megabase sync`.
    Identity(config.directory, config.run.name).update(status=None, last_word=None)


def _check_that_none_was_written(directory: Path, world: Group) -> None:
    """Raise UserError if a run without checkpoints once wrote some: they were deleted or moved."""
    paths = RunPaths(directory)
    if newest := world.broadcast(newest_written(paths) if world.rank == 0 else 0):
        raise UserError(
            f"{paths.checkpoints} has no checkpoint, but {paths.performance.name} says that the run wrote one of step"
            f" {newest}: put them back, or start again from step 0 with another run.name"
        )
