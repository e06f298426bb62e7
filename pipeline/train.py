"""Training, from a config to a finished run: check, launch, choose a checkpoint, fit."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datamodules.config import accumulation
from datamodules.errors import DataError
from datamodules.index import ShardIndex
from datamodules.mixture import identity_of
from datamodules.splits import VALID
from datamodules.visits import training_windows
from models.config import ConfigError
from pipeline import checkpoint, distributed, environment, watchdog, zero
from pipeline import config as configs
from pipeline.config import RunConfig
from pipeline.errors import RunError, UserError, rank_zero
from pipeline.hardware import precision_of
from pipeline.journal import JOURNAL, has_evaluation, publish_json, restore
from pipeline.preemption import EXIT_AGAIN, STOP_FILE, StopRequest
from pipeline.tracking import Mirror

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from datamodules.datamodule import SequenceDataModule
    from pipeline.loop import Boundary

# How long the end of a run waits for MLflow; what is not sent by then stays in the journal.
MLFLOW_FAREWELL_S = 20.0
# How long the lock of a job that is gone may stay: file servers keep it for a lease of about 90 s.
LOCK_LEASE_S = 120.0
# How a start ends, in status.json and in MLflow. again, stopped: at a checkpoint, to go on later; the second because of
# a STOP file, so that nothing starts it again by itself. failed: for a reason that another start would meet as well.
# crashed: for any other.
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
    devices = distributed.local_devices(config.trainer.devices)
    if distributed.launched():
        try:
            distributed.adopt(config.trainer.nodes, devices)
            check(config, config.trainer.nodes * devices)
        except BaseException:
            # Only where the launcher asked: the run directory may be another job's.
            _write_status(None, "failed", None)
            raise
        return _rank(config, devices, stop)
    check(config, config.trainer.nodes * devices)
    if config.trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes={config.trainer.nodes}: start it with `megabase submit`, or with srun or torchrun"
            " on every node"
        )
    print(
        f"megabase: {config.run.name}: starting {devices} rank{'s' * (devices > 1)}, which takes a while;"
        f" run directory {config.directory}",
        file=sys.stderr,
        flush=True,
    )
    command = [sys.executable, "-P", "-m", "pipeline.cli", "train", *arguments]
    return distributed.supervise(command, devices, stop)


def check(config: RunConfig, ranks: int) -> None:
    """Everything that can be found wrong before a process is started; fills in `model.vocab_size`."""
    config.validate()
    stop_file = config.directory / STOP_FILE
    # One rank looks: the file may come or go between two looks.
    if rank_zero() and stop_file.exists():
        raise UserError(f"{stop_file} stopped this run and keeps it so: remove it to go on")
    accumulation(config.data.global_batch, config.data.micro_batch, ranks)
    zero.check(config)
    if precision_of(config.trainer.precision) == "16" and not torch.cuda.is_available():
        raise UserError("trainer.precision=16 needs a GPU: take 32 or bf16 here")
    index = ShardIndex.open(config.data.shards)
    training_windows(config.data, index)
    if config.checkpoint.keep_best and VALID not in index.segments.splits():
        raise UserError(
            f"checkpoint.keep_best={config.checkpoint.keep_best}: {config.data.shards} has no validation split to find"
            " the best with: prepare it with --valid, or set checkpoint.keep_best=0"
        )
    config.model.vocab_size = index.alphabet.vocab_size
    config.model.validate(config.data.length)
    for path in checkpoint.list_checkpoints(config.directory / "checkpoints")[:1]:
        with suppress(checkpoint.Damaged, OSError):  # `choose` finds out and says so
            manifest = checkpoint.read_manifest(path)
            now = checkpoint.manifest_of(config, 0, ranks, identity_of(index.segments, config.data.mixture))
            checkpoint.check_same_run(manifest, now, path)


def _rank(config: RunConfig, devices: int, stop: StopRequest) -> int:
    """One rank, from its first breath to its exit code."""
    distributed.start()
    ranks = distributed.Ranks()
    with _lock(config.directory, ranks):
        watch = watchdog.Watchdog(config.directory / "logs", ranks.rank, config.trainer.hang_minutes).start()
        state = _fit(config, devices, ranks, stop)
        ranks.check(None)
    torch.distributed.destroy_process_group()
    watch.stop()
    if ranks.rank:
        # Only rank 0 says "again": a launcher that sees a rank fail would end the others.
        return 0
    if state == "finished":
        print(f"megabase: finished: {config.directory}", file=sys.stderr)
        return 0
    first = f"remove {config.directory / STOP_FILE}, then " if state == "stopped" else ""
    print(
        f"megabase: stopped: {config.directory}; {first}the same command goes on where it was",
        file=sys.stderr,
    )
    return EXIT_AGAIN


def _fit(config: RunConfig, devices: int, ranks: distributed.Ranks, stop: StopRequest) -> str:
    """Train until the end or an agreed stop; returns the state, a key of MLFLOW_STATUS.

    However it ends, the status file and MLflow hear of it.
    """
    from datamodules.datamodule import SequenceDataModule
    from pipeline.loop import Boundary
    from pipeline.module import PretrainModule

    directory = config.directory
    mirror = Mirror(config, directory) if config.tracking.enabled and ranks.rank == 0 else None
    state, step = "crashed", 0
    try:
        watchdog.beat("choosing a checkpoint")
        data = SequenceDataModule(config.data, config.run.seed)
        resume_from, step = _resume_point(config, data, ranks)
        if resume_from and _finished(config, step, data.has_validation, ranks):
            state = "finished"
            if ranks.rank == 0:
                print(f"megabase: {config.run.name} is finished (step {step})", file=sys.stderr)
            if mirror:
                mirror.start()  # it may not have got everything
            return state
        ranks.check(_describe_run(config, resume_from) if ranks.rank == 0 else None)
        _write_status(directory, "running", step)
        watchdog.beat("building the model")
        boundary = Boundary(config, data, ranks, stop, mirror)
        try:
            trainer = _trainer(config, devices, ranks, boundary)
            trainer.fit(PretrainModule(config), datamodule=data, ckpt_path=resume_from, weights_only=False)
        finally:
            step = max(step, boundary.step)
        state = "finished"
        if boundary.stopped_early:
            state = "stopped" if stop.by_person else "again"
        return state
    except (RunError, UserError, DataError, ConfigError):
        state = "failed"
        raise
    finally:
        # First this: MLflow may be slow, and whoever waits for the status may kill what lingers.
        _write_status(directory, state, step)
        if mirror:
            _farewell(mirror, MLFLOW_STATUS[state])


def _describe_run(config: RunConfig, resume_from: Path | None) -> str | None:
    """On rank 0: write what the run directory says of the run; returns why not, if not."""
    directory = config.directory
    try:
        if resume_from:
            print(f"megabase: resuming {config.run.name} from {resume_from}", file=sys.stderr)
            if (resume_from / JOURNAL).exists():  # older checkpoints have no copy
                _restore_journal(directory, resume_from)
        configs.save(config, directory / "config.yaml")
        environment.write(directory)
    except OSError as error:
        return f"cannot write in {directory}: {error}"
    return None


def _restore_journal(directory: Path, resume_from: Path) -> None:
    """On rank 0: the journal holds at least what it held when the checkpoint was written."""
    wrong = restore(directory / JOURNAL, resume_from / JOURNAL)
    if wrong:
        print(
            f"megabase: {directory / JOURNAL} {wrong} before the checkpoint's step: put back from the"
            " checkpoint",
            file=sys.stderr,
        )


def _resume_point(
    config: RunConfig, data: SequenceDataModule, ranks: distributed.Ranks
) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step; (None, 0) for a fresh start."""
    chosen = checkpoint.choose(config.directory / "checkpoints", ranks)
    if chosen is None:
        return None, 0
    path, manifest = chosen
    now = checkpoint.manifest_of(config, manifest.step, ranks.size, data.identity)
    checkpoint.check_same_run(manifest, now, path)
    return path, manifest.step


def _trainer(config: RunConfig, devices: int, ranks: distributed.Ranks, boundary: Boundary) -> pl.Trainer:
    """Lightning's Trainer; what it would log, show, evaluate and save is `boundary`'s."""
    import pytorch_lightning as pl

    from pipeline.strategy import LIGHTNING_PRECISION, ZeroStrategy, quiet

    _hush()
    return quiet(
        pl.Trainer(
            accelerator="auto",
            devices=devices,
            num_nodes=config.trainer.nodes,
            strategy=ZeroStrategy(config),
            precision=LIGHTNING_PRECISION[precision_of(config.trainer.precision)],  # type: ignore[arg-type]
            # `boundary` ends the run, after the last evaluation.
            max_steps=-1,
            max_epochs=-1,
            accumulate_grad_batches=accumulation(
                config.data.global_batch, config.data.micro_batch, ranks.size
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


def _finished(config: RunConfig, step: int, evaluates: bool, ranks: distributed.Ranks) -> bool:
    """Whether a run whose newest checkpoint is of `step` has nothing left to do, the last evaluation included."""
    if step < config.trainer.max_steps:
        return False
    if not evaluates:
        return True
    evaluated = ranks.rank == 0 and has_evaluation(config.directory / JOURNAL, step)
    return bool(ranks.broadcast(evaluated))


def _farewell(mirror: Mirror, status: str) -> None:
    if not mirror.finish(status, MLFLOW_FAREWELL_S):
        print(
            "megabase: MLflow has not taken everything; the journal has it, and the same command sends the rest",
            file=sys.stderr,
        )


def _hush() -> None:
    """Keep the libraries' tips, notices and deprecation warnings out of a log that is for the run.

    After their import, which sets these levels.
    """
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", module=re.escape(module))


@contextmanager
def _lock(directory: Path, ranks: distributed.Ranks) -> Iterator[None]:
    """Keep a second job out of the run directory for as long as this process lives, however it ends."""
    error = None
    descriptor = -1
    if ranks.rank == 0:
        try:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            descriptor = _take_lock(directory)
        except BlockingIOError as caught:
            error = str(caught)
        except OSError as caught:
            error = f"cannot write in {directory} ({caught.strerror}): choose another run.root"
    error = ranks.broadcast(error)
    if error:
        raise UserError(error)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _take_lock(directory: Path) -> int:
    """Lock `.lock` of a run directory; returns the descriptor that holds it.

    A holder that is gone may leave its lock behind for a while (a file server's lease): that is waited for.

    Raises:
        BlockingIOError: another job holds it; the message is for the user.
    """
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_LEASE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            host, _, process = holder.partition(" process ")
            here = host == platform.node() and process.isdigit()
            if (here and Path(f"/proc/{process}").exists()) or time.monotonic() > deadline:
                raise BlockingIOError(
                    f"another job is training {directory} ({holder}): wait for it, or choose another run.name"
                ) from None
            time.sleep(1.0)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(
                f"megabase: {directory} is on a file system without locks: nothing keeps a second job out of it"
            )
            break
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{platform.node()} process {os.getpid()}\n".encode(), 0)
    return descriptor


def _write_status(directory: Path | None, state: str, step: int | None) -> None:
    """Say how the run goes or ended, for people in the run directory and for `slurm/train.sbatch` where it asked.

    A run that was killed, or ended by its watchdog, leaves "running" behind.
    """
    if not rank_zero():
        return
    status: dict[str, Any] = {"state": state, "step": step}
    targets = {}
    if directory:
        targets[directory / "status.json"] = status
    if os.environ.get("MEGABASE_STATUS_FILE"):
        place = {"checkpoints": str(directory / "checkpoints")} if directory else {}
        targets[Path(os.environ["MEGABASE_STATUS_FILE"])] = status | place
    for target, content in targets.items():
        try:
            publish_json(target, content)
        except OSError as error:
            print(f"megabase: cannot write {target}: {error}", file=sys.stderr)
