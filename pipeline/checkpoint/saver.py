"""Saving a run: one checkpoint after the other, each published when every rank has written its part.

First every rank writes its files; then rank 0 writes the manifest, renames the directory and deletes old checkpoints.
With `checkpoint.background`, training waits only until the states are copied, and continues during both parts. The
ranks exchange their progress in the message of every step (`ranks/agreement.py`), and call `advance` together when all
are done with a part. A resume ignores a checkpoint that was never published, and uses the one before.

If the disk has no space for a checkpoint, a warning says so, training continues, and the next checkpoint is tried when
it is due. Only the checkpoint that a run stops with must be written.
"""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl

from megabase.pipeline.checkpoint import publish
from megabase.pipeline.checkpoint.identity import manifest_of
from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.checkpoint.publish import DiskFull
from megabase.pipeline.checkpoint.retention import prune, validation_losses
from megabase.pipeline.checkpoint.space import describe_shortage
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RunError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.rundir.hint import resume_hint
from megabase.pipeline.rundir.paths import METRICS, RunPaths
from megabase.pipeline.zero.checkpoint_engine import DIRECTORY, LATEST, Storage
from megabase.pipeline.zero.parameters import full_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A published checkpoint.

    Attributes:
        step: optimizer steps done.
        path: its directory.
        size: bytes of all its files.
        held: seconds that training waited for it.
        seconds: seconds from `Saver.begin` until it was published.
    """

    step: int
    path: Path
    size: int
    held: float
    seconds: float


@dataclass
class Pending:
    """A checkpoint that is being written.

    Attributes:
        step: optimizer steps done.
        partial: the directory that it is written to.
        must: see `Saver.begin`.
        journal: bytes of the journal up to its step.
        began: `time.monotonic()` when it began.
        held: seconds that training waited for it so far.
        publishing: rank 0's work after every rank has written its files; its result is (`time.monotonic()` at its
            end, bytes of the checkpoint). None until then.
    """

    step: int
    partial: Path
    must: bool
    journal: int
    began: float
    held: float
    publishing: Future[tuple[float, int]] | None = None


class Saver:
    """Writes a run's checkpoints. Every rank has one and calls the same methods at the same steps.

    Args:
        config: the run.
        world: every process of the run.
        storage: writes this rank's files.
        data: identity of the shards, for the manifest.
        alphabet: name of the shards' alphabet, for the manifest.
    """

    def __init__(
        self, config: RunConfig, world: Group, storage: Storage, *, data: str, alphabet: str
    ) -> None:
        self._config = config
        self._world = world
        self._storage = storage
        self._data = data
        self._alphabet = alphabet
        self._paths = RunPaths(config.directory)
        self._pruning: Future[None] | None = None
        self.pending: Pending | None = None
        # Step of the last checkpoint that was published by this start.
        self.published: int | None = None

    @property
    def advanced(self) -> int:
        """How often all ranks have called `advance` for the pending checkpoint: 0 or 1."""
        return int(self.pending is not None and self.pending.publishing is not None)

    @property
    def progress(self) -> int:
        """This rank's progress with the pending checkpoint. 0: none, 1: its files are written, 2: it is published."""
        if self.pending is None:
            return 0
        if self.pending.publishing is None:
            return int(self._storage.done)
        return 1 + int(self.pending.publishing.done())

    def begin(self, trainer: pl.Trainer, step: int, *, must: bool) -> None:
        """Write the states of `step`, or start to write them in the background. No checkpoint may be pending.

        If the disk has no space, no checkpoint is pending afterwards.

        Args:
            trainer: Lightning's Trainer, whose states are saved.
            step: optimizer steps done.
            must: a full disk is an error, not a warning.

        Raises:
            RunError: on every rank, if the disk has no space and the checkpoint must be written.
        """
        assert self.pending is None
        began = time.monotonic()
        partial = publish.partial_directory(self._paths.checkpoints, step)
        journal, shortage = 0, None
        if self._world.rank == 0:
            if self._pruning:
                self._pruning.result()
            publish.remove_leftovers(self._paths.checkpoints)
            self._prune()  # before the free space is checked: a lower `checkpoint.keep` may have freed some
            journal = self._paths.metrics.stat().st_size
            shortage = self._describe_shortage(trainer)
        # No rank writes before this broadcast: rank 0 has removed leftovers by then.
        if shortage := self._world.broadcast(shortage):
            self._give_up(step, shortage, must)
            return
        trainer.save_checkpoint(partial, weights_only=False)
        self.pending = Pending(step, partial, must, journal, began, time.monotonic() - began)

    def advance(self) -> Saved | None:
        """Do the next part of the work on the pending checkpoint. Waits until the part before is done.

        Returns:
            The checkpoint, once it is published; None if it is not yet, or was given up.

        Raises:
            RunError: on every rank, if any rank could not write its part, or had states that are not finite. A full
                disk raises an error only if the checkpoint must be written.
        """
        pending = self.pending
        assert pending is not None
        began = time.monotonic()
        try:
            if pending.publishing is None:
                pending.publishing = self._start_publishing(pending)
                if self._config.checkpoint.background:
                    pending.held += time.monotonic() - began
                    return None
            self._raise_on_all_ranks(pending.publishing)
        except RunError as error:
            self.pending = None
            if self._world.rank == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)  # also frees its space
            must = pending.must or not isinstance(error, DiskFull)
            self._give_up(pending.step, str(error), must, temporary=error.temporary)
            return None
        self.pending, self.published = None, pending.step
        if self._world.rank == 0:
            self._pruning = self._storage.run(self._prune)
            if pending.must:
                self._pruning.result()  # the run ends here
        ended, size = pending.publishing.result()
        path = publish.published_directory(pending.partial)
        return Saved(pending.step, path, size, pending.held + time.monotonic() - began, ended - pending.began)

    def _start_publishing(self, pending: Pending) -> Future[tuple[float, int]]:
        """Collect the files of all ranks and, on rank 0, begin to publish them: see `Pending.publishing`."""
        written = self._storage.result()
        manifest = manifest_of(
            self._config, pending.step, ranks=self._world.size, data=self._data, alphabet=self._alphabet
        )
        publish.collect_files(pending.partial, manifest, self._world, written.files, written.error)

        def work() -> tuple[float, int]:
            if self._world.rank == 0:
                self._add_files(pending, manifest)
                publish.publish(pending.partial, manifest)
            return time.monotonic(), manifest.size

        return self._storage.run(work)

    def _raise_on_all_ranks(self, publishing: Future[tuple[float, int]]) -> None:
        """Raise on every rank if rank 0 could not publish the checkpoint."""
        error = publishing.exception()
        if error and not isinstance(error, OSError):
            traceback.print_exception(error)  # a bug: `gather_or_raise` passes on its message only
        publish.gather_or_raise(self._world, error)

    def _prune(self) -> None:
        """On rank 0: delete the checkpoints that are not kept."""
        settings = self._config.checkpoint
        try:
            losses = validation_losses(self._paths.metrics) if settings.keep_best else {}
        except OSError as error:
            logger.warning(f"no checkpoint is deleted: {error}")
            return
        prune(self._paths.checkpoints, losses, settings)

    def _add_files(self, pending: Pending, manifest: Manifest) -> None:
        """On rank 0: add the journal up to the step, and the file by which DeepSpeed's own tools find the states."""
        with self._paths.metrics.open("rb") as rows:
            contents = {LATEST: DIRECTORY.encode(), METRICS: rows.read(pending.journal)}
        for name, content in contents.items():
            path = pending.partial / name
            path.write_bytes(content)
            manifest.files[name] = publish.sync_and_measure(path)

    def _give_up(self, step: int, why: str, must: bool, *, temporary: bool = False) -> None:
        """Warn that a checkpoint is not written; raise RunError if it must be."""
        message = f"the checkpoint of step {step} is not written: {why}"
        if must:
            raise RunError(
                f"{message}. Earlier checkpoints are unchanged; {resume_hint(self._config.directory)}",
                temporary=temporary,
            )
        if self._world.rank == 0:
            logger.warning(f"{message}. Training continues without it")

    def _describe_shortage(self, trainer: pl.Trainer) -> str | None:
        parameters = sum(map(full_size, trainer.lightning_module.parameters()))
        precision = precision_of(self._config.trainer.precision)
        return describe_shortage(self._paths.checkpoints, parameters, self._config.zero.stage, precision)
