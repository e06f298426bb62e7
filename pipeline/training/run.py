"""Training, from a config to a finished run: check, launch, choose a checkpoint, fit."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megabase.datamodules.config import accumulation
from megabase.datamodules.errors import DataError
from megabase.models.config import ConfigError
from megabase.pipeline.checkpoint.choose import choose_to_resume
from megabase.pipeline.checkpoint.identity import check_same_run, manifest_of, saved_layout
from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.config.load import save
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.ranks import rendezvous, supervisor, watchdog
from megabase.pipeline.ranks.environment import complete_environment, is_rank, is_rank_zero, local_devices
from megabase.pipeline.ranks.failure import report_failure
from megabase.pipeline.ranks.groups import Group, Groups
from megabase.pipeline.ranks.stop import EXIT_AGAIN, StopRequest
from megabase.pipeline.rundir import environment
from megabase.pipeline.rundir.journal import has_evaluation, read, restore
from megabase.pipeline.rundir.lock import lock_run
from megabase.pipeline.rundir.paths import METRICS, RunPaths
from megabase.pipeline.rundir.status import write_launcher_status, write_status
from megabase.pipeline.tracking.mirror import Mirror
from megabase.pipeline.training.check import check

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from megabase.datamodules.datamodule import SequenceDataModule
    from megabase.pipeline.training.callback import Boundary
    from megabase.pipeline.zero.states import SavedLayout

logger = logging.getLogger(__name__)

# How long the end of a run waits for MLflow; what is not sent by then stays in the journal.
MLFLOW_FAREWELL_S = 20.0
# The same for a run that fails: other ranks leave at once, and who waits for them ends rank 0 after GRACE_S.
MLFLOW_HASTE_S = supervisor.GRACE_S / 2
# How a start ends, in status.json and in MLflow. again, stopped: at a checkpoint, to go on later; the second because of
# a STOP file, so that nothing starts it again by itself. failed: for a reason that another start would meet as well.
# crashed: for any other, also one that passes.
MLFLOW_STATUS = {
    "finished": "FINISHED",
    "again": "KILLED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "crashed": "FAILED",
}


def train(config: RunConfig, arguments: list[str], stop: StopRequest) -> int:
    """Run `megabase train`: as one rank if this process was launched as one, else as supervisor of local ranks.

    Args:
        arguments: the command line after `megabase train`, to start ranks with.
        stop: set by the signals of this process.

    Returns:
        The exit code: 0 finished, EXIT_AGAIN stopped at a checkpoint, 1 failed.

    Raises:
        UserError, DataError, ConfigError: something given is wrong; nothing has been started or changed.
    """
    devices = local_devices(config.trainer.devices)
    if is_rank():
        try:
            complete_environment(config.trainer.nodes, devices)
            check(config, config.trainer.nodes * devices)
        except BaseException:
            # Not in the run directory, which may be another job's.
            if is_rank_zero():
                write_launcher_status("failed", None)
            raise
        return _rank(config, devices, stop)
    check(config, config.trainer.nodes * devices)
    if config.trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes={config.trainer.nodes}: start it with `megabase submit`, or with srun or torchrun"
            " on every node"
        )
    logger.info(
        f"{config.run.name}: starting {devices} rank{'s' * (devices > 1)}, which takes a while;"
        f" run directory {config.directory}"
    )
    command = supervisor.megabase_command("train", *arguments)
    return supervisor.supervise(command, devices, stop)


def _rank(config: RunConfig, devices: int, stop: StopRequest) -> int:
    """One rank, from its first breath to its exit code."""
    rendezvous.start()
    groups = Groups.create()
    ranks = groups.world
    with _locked(config.directory, ranks):
        watch = watchdog.Watchdog(config.directory, ranks.rank, config.trainer.hang_minutes).start()
        state = _fit(config, devices, groups, stop)
        ranks.check(None)
    torch.distributed.destroy_process_group()
    watch.stop()
    if ranks.rank:
        # Only rank 0 says "again": a launcher that sees a rank fail would end the others.
        return 0
    if state == "finished":
        logger.info(f"finished: {config.directory}")
        return 0
    first = f"remove {RunPaths(config.directory).stop}, then " if state == "stopped" else ""
    logger.info(f"stopped: {config.directory}; {first}the same command goes on where it was")
    return EXIT_AGAIN


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


def _fit(config: RunConfig, devices: int, groups: Groups, stop: StopRequest) -> str:
    """Train until the end or an agreed stop; returns the state, a key of MLFLOW_STATUS.

    However it ends, the status file and MLflow hear of it.
    """
    from megabase.datamodules.datamodule import SequenceDataModule
    from megabase.pipeline.training.callback import Boundary
    from megabase.pipeline.training.module import PretrainModule

    directory, ranks = config.directory, groups.world
    mirror = Mirror(config, directory) if config.tracking.enabled and ranks.rank == 0 else None
    state, step, begun = "crashed", 0, False
    failure: BaseException | None = None
    try:
        watchdog.beat("choosing a checkpoint")
        data = SequenceDataModule(config.data, config.run.seed)
        chosen = _resume_point(config, data, ranks)
        resume_from, saved = None, None
        if chosen:
            resume_from, step, saved = chosen[0], chosen[1].step, saved_layout(chosen[1])
        if resume_from and _finished(config, step, data.has_validation, ranks):
            state, begun = "finished", True
            if ranks.rank == 0:
                logger.info(f"{config.run.name} is finished (step {step})")
            if mirror:
                mirror.start()  # it may not have got everything
            return state
        ranks.check(_describe_run(config, resume_from) if ranks.rank == 0 else None)
        begun = True
        if ranks.rank == 0:
            write_status(directory, "running", step)
            write_launcher_status("running", step, directory)
        watchdog.beat("building the model")
        boundary = Boundary(config, data, groups, stop, mirror)
        try:
            trainer = _trainer(config, devices, groups, boundary, saved)
            trainer.fit(PretrainModule(config), datamodule=data, ckpt_path=resume_from, weights_only=False)
        except SystemExit:  # what Lightning makes of it
            raise KeyboardInterrupt from None
        finally:
            step = max(step, boundary.step)
        state = "finished"
        if boundary.stopped_early:
            state = "stopped" if stop.by_person else "again"
        return state
    except BaseException as error:
        if isinstance(error, RunError | UserError | DataError | ConfigError):
            state = "crashed" if getattr(error, "temporary", False) else "failed"
        failure = error
        raise
    finally:
        # First this: whoever waits for the status may kill what lingers.
        if ranks.rank == 0:
            if begun:  # else the status of the start before stays
                write_status(directory, state, step)
            write_launcher_status(state, step, directory)
        if failure:
            report_failure(failure)  # before MLflow is waited for
        if mirror:
            _farewell(mirror, MLFLOW_STATUS[state], MLFLOW_HASTE_S if failure else MLFLOW_FAREWELL_S)


def _describe_run(config: RunConfig, resume_from: Path | None) -> str | None:
    """On rank 0: write what the run directory says of the run; returns why not, if not."""
    directory = config.directory
    try:
        if resume_from:
            logger.info(f"resuming {config.run.name} from {resume_from}")
            if (resume_from / METRICS).exists():  # older checkpoints have no copy
                _restore_journal(directory, resume_from)
        save(config, RunPaths(directory).config)
        environment.write(directory)
    except OSError as error:
        return f"cannot write in {directory}: {error}"
    return None


def _restore_journal(directory: Path, resume_from: Path) -> None:
    """On rank 0: the journal holds at least what it held when the checkpoint was written."""
    wrong = restore(RunPaths(directory).metrics, resume_from / METRICS)
    if wrong:
        logger.warning(
            f"{RunPaths(directory).metrics} {wrong} before the checkpoint's step: put back from the checkpoint"
        )


def _resume_point(config: RunConfig, data: SequenceDataModule, ranks: Group) -> tuple[Path, Manifest] | None:
    """The checkpoint to resume from and its manifest; None for a fresh start."""
    chosen = choose_to_resume(RunPaths(config.directory).checkpoints, ranks)
    if chosen is None:
        _refuse_to_begin_again(config.directory, ranks)
        return None
    path, manifest = chosen
    current = manifest_of(
        config, manifest.step, ranks=ranks.size, data=data.identity, alphabet=data.index.alphabet.name
    )
    check_same_run(manifest, current, path)
    return chosen


def _refuse_to_begin_again(directory: Path, ranks: Group) -> None:
    """Raise UserError if a run directory without checkpoints once had some: they were deleted, or are elsewhere."""
    paths, steps = RunPaths(directory), [0]
    if ranks.rank == 0:
        steps += [row["step"] for row in read(paths.performance, having="checkpoint_seconds")]
    if newest := ranks.broadcast(max(steps)):
        raise UserError(
            f"{paths.checkpoints} has no checkpoint, but {paths.performance.name} says that the run wrote one of step"
            f" {newest}: put them back, or start again from step 0 with another run.name"
        )


def _trainer(
    config: RunConfig, devices: int, groups: Groups, boundary: Boundary, saved: SavedLayout | None
) -> pl.Trainer:
    """Lightning's Trainer; `boundary` logs, shows, evaluates and saves. saved: layout of the checkpoint to load."""
    import pytorch_lightning as pl

    from megabase.pipeline.zero.strategy import LIGHTNING_PRECISION, ZeroStrategy, quiet

    _hush()
    return quiet(
        pl.Trainer(
            accelerator="auto",
            devices=devices,
            num_nodes=config.trainer.nodes,
            strategy=ZeroStrategy(config, saved),
            precision=LIGHTNING_PRECISION[precision_of(config.trainer.precision)],  # type: ignore[arg-type]
            # `boundary` ends the run, after the last evaluation.
            max_steps=-1,
            max_epochs=-1,
            accumulate_grad_batches=accumulation(
                config.data.global_batch, config.data.micro_batch, groups.data.size
            ),
            gradient_clip_val=config.optim.clip or None,
            callbacks=[boundary],
            default_root_dir=config.directory,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
    )


def _finished(config: RunConfig, step: int, evaluates: bool, ranks: Group) -> bool:
    """Whether a run whose newest checkpoint is of `step` has nothing left to do, the last evaluation included."""
    if step < config.trainer.max_steps:
        return False
    if not evaluates:
        return True
    evaluated = ranks.rank == 0 and has_evaluation(RunPaths(config.directory).metrics, step)
    return bool(ranks.broadcast(evaluated))


def _farewell(mirror: Mirror, status: str, seconds: float) -> None:
    if not mirror.finish(status, seconds):
        logger.warning(
            "MLflow has not taken everything; the journal has it, and the same command sends the rest"
        )


def _hush() -> None:
    """Keep the libraries' tips, notices and deprecation warnings out of a log that is for the run.

    After their import, which sets these levels.
    """
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", module=re.escape(module))
