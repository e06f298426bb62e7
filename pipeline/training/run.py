"""Training, from a config to a finished run: check, start ranks, choose a checkpoint, fit.

`train` is what `megabase train` calls. In the process that the user starts it supervises one process per device, and
each of those calls it again as a rank. Lightning and DeepSpeed are imported in ranks only.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megabase.datamodules.files import FileLock, LockHeldError
from megabase.pipeline.checkpoint.identity import saved_layout
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import Machine
from megabase.pipeline.ranks import rendezvous, supervisor, watchdog
from megabase.pipeline.ranks.environment import complete_environment, is_rank, is_rank_zero, local_devices
from megabase.pipeline.ranks.groups import Group, Groups
from megabase.pipeline.ranks.stop import EXIT_AGAIN, INTERRUPTED, StopRequest
from megabase.pipeline.readable import counted
from megabase.pipeline.rundir.hint import resume_hint
from megabase.pipeline.rundir.lock import lock_run
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import RUNNING, read_status, write_launcher_status
from megabase.pipeline.tracking.mirror import Mirror
from megabase.pipeline.training.machine import check_machine, warnings_about
from megabase.pipeline.training.outcome import Outcome, conclude, state_of, write_running
from megabase.pipeline.training.pretraining import Pretraining
from megabase.pipeline.training.system import system_monitor
from megabase.pipeline.training.task import Task

logger = logging.getLogger(__name__)


def train(config: RunConfig, arguments: list[str], stop: StopRequest, task: Task | None = None) -> int:
    """Run `megabase train`: as one rank if a launcher started this process as one, else as supervisor of local ranks.

    Args:
        config: of the run.
        arguments: the command line after `megabase train`, or that of the task's command, to start ranks with.
        stop: set by the signals of this process.
        task: what to train; None: pretraining.

    Returns:
        The exit code: 0 finished, EXIT_AGAIN stopped at a checkpoint, 1 failed, INTERRUPTED by a second Ctrl-C.

    Raises:
        UserError, DataError, ConfigError: bad input; nothing has been started or changed.
    """
    task = task or Pretraining(config)
    if is_rank():
        try:
            devices = local_devices(config.trainer.devices)
            complete_environment(config.trainer.nodes, devices)
            task.check(config.trainer.nodes * devices)
            if is_rank_zero() and not supervisor.is_supervised():
                _warn(task, config.trainer.nodes * devices)
        except BaseException:
            # Only the launcher's status: the run directory may belong to another job.
            if is_rank_zero():
                write_launcher_status("failed", None)
            raise
        return _run_rank(task, devices, stop)
    devices = local_devices(config.trainer.devices)
    if config.trainer.nodes == 1:
        check_machine(config, devices, Machine.this(), arguments, task.command)
    ranks = config.trainer.nodes * devices
    task.check(ranks)
    if config.trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes={config.trainer.nodes}: start it with `megabase submit`, or with srun or torchrun"
            " on every node"
        )
    if task.has_finished(ranks):
        return 0
    _warn(task, ranks)
    logger.info(
        f"{config.run.name}: starting {counted(devices, 'rank')}, which takes a while;"
        f" run directory {config.directory}"
    )
    command = supervisor.megabase_command(task.command, *arguments)
    try:
        code = supervisor.supervise(command, devices, stop, hint=lambda: resume_hint(config.directory))
    except KeyboardInterrupt:
        logger.error(f"interrupted; {resume_hint(config.directory)}")
        code = INTERRUPTED
    if code:
        _conclude_killed(config)
    return code


def _conclude_killed(config: RunConfig) -> None:
    """Write what rank 0 could not, if it was killed before it wrote how the run ended."""
    try:
        lock = FileLock.take(RunPaths(config.directory).lock)
    except (LockHeldError, OSError):
        return  # another job trains the run, and its status is that job's
    state, step = read_status(config.directory)
    if state == RUNNING:
        mirror = Mirror(config, config.directory).start() if config.tracking.enabled else None
        conclude(Outcome("crashed", step or 0, started=True), config.directory, 0, mirror, None)
    lock.close()


def _warn(task: Task, ranks: int) -> None:
    """Log what is worth knowing before a run starts: about this machine, and about the task."""
    for text in warnings_about(task.config, Machine.this()):
        logger.warning(text)
    if beyond := task.warning(ranks):
        logger.warning(beyond)


def _run_rank(task: Task, devices: int, stop: StopRequest) -> int:
    """Run one rank: join the process group, train, leave it; returns the exit code."""
    config = task.config
    if is_rank_zero():
        write_launcher_status("starting", None, config.directory)
    rendezvous.start()
    groups = Groups.create(config.trainer.sequence_ranks)
    world = groups.world
    with _locked(config.directory, world):
        watch = watchdog.Watchdog(config.directory, world.rank, config.trainer.hang_minutes).start()
        measures = _is_first_of_its_node(world)
        with system_monitor(config.directory, config.tracking.system_seconds if measures else 0):
            state = fit(task, devices, groups, stop)
        world.check(None)
    torch.distributed.destroy_process_group()
    watch.stop()
    if world.rank:
        # Only rank 0 exits with EXIT_AGAIN: a launcher that sees a rank fail kills the others.
        return 0
    if state == "finished":
        logger.info(f"finished: {config.directory}")
        return 0
    first = f"remove {RunPaths(config.directory).stop}, then " if state == "stopped" else ""
    logger.info(f"stopped: {config.directory}; {first}{resume_hint(config.directory)}")
    return EXIT_AGAIN


def _is_first_of_its_node(world: Group) -> bool:
    """Whether no earlier rank runs on this rank's node. All ranks call it."""
    nodes = world.gather(platform.node())
    return nodes.index(nodes[world.rank]) == world.rank


@contextmanager
def _locked(directory: Path, world: Group) -> Iterator[None]:
    """Keep a second job out of a run directory. Raises UserError on every rank if rank 0 cannot lock it."""
    lock, error = None, None
    if world.rank == 0:
        try:
            lock = lock_run(directory)
        except UserError as caught:
            error = str(caught)
    if error := world.broadcast(error):
        raise UserError(error)
    try:
        yield
    finally:
        if lock:
            lock.close()


def fit(task: Task, devices: int, groups: Groups, stop: StopRequest) -> str:
    """Train until the end or until the ranks agree to stop.

    However training ends, the outcome is written to the status files and to MLflow.

    Args:
        task: what to train; it passed its check.
        devices: ranks on each node.
        groups: of ranks.
        stop: set when this rank is asked to stop.

    Returns:
        The state of the run: finished, again or stopped (see `Outcome.state`).
    """
    rank, config = groups.world.rank, task.config
    mirror = Mirror(config, config.directory) if config.tracking.enabled and rank == 0 else None
    outcome, failure = Outcome(), None
    try:
        _set_up_and_fit(task, devices, groups, stop, mirror, outcome)
    except BaseException as error:
        outcome.state, failure = state_of(error), error
        raise
    finally:
        conclude(outcome, config.directory, rank, mirror, failure, tracking=config.tracking)
    return outcome.state


def _set_up_and_fit(
    task: Task,
    devices: int,
    groups: Groups,
    stop: StopRequest,
    mirror: Mirror | None,
    outcome: Outcome,
) -> None:
    """Choose a checkpoint, build everything, train; keeps `outcome` up to date."""
    from megabase.pipeline.training.callback import TrainingCallback
    from megabase.pipeline.training.resume import is_finished, prepare_run_directory, resume_point
    from megabase.pipeline.training.trainer import make_trainer
    from megabase.pipeline.training.user_callbacks import load_callbacks

    config = task.config
    own_callbacks = load_callbacks(config.trainer.callbacks)
    watchdog.beat("choosing a checkpoint")
    resume_from, saved = None, None
    if chosen := resume_point(task, groups.world):
        resume_from, manifest = chosen
        outcome.step, saved = manifest.step, saved_layout(manifest)
    if resume_from and is_finished(config, outcome.step, task.has_validation, groups.world):
        outcome.state, outcome.started = "finished", True
        if groups.world.rank == 0:
            logger.info(f"{config.run.name} is finished (step {outcome.step})")
        if mirror:
            mirror.start()  # MLflow may lack the last rows
        return
    initial = None if resume_from else task.initial(groups.world)
    prepare_run_directory(task, resume_from, groups.world)
    outcome.started = True
    if groups.world.rank == 0:
        write_running(config.directory, outcome.step)

    watchdog.beat("building the model")
    callback = TrainingCallback(task, groups, stop, mirror)
    trainer = make_trainer(config, devices, groups, [*own_callbacks, callback], saved)
    try:
        module = task.module(groups, initial)
        trainer.fit(module, datamodule=task.data, ckpt_path=resume_from, weights_only=False)
    except SystemExit:  # which Lightning raises for a KeyboardInterrupt
        raise KeyboardInterrupt from None
    finally:
        outcome.step = max(outcome.step, callback.step)
    outcome.state = "finished"
    if callback.stopped_early:
        outcome.state = "stopped" if stop.by_person else "again"
