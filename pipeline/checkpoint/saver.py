"""Saving a run: one checkpoint after the other, published when every rank has written its part.

First every rank writes its files; then rank 0 writes the manifest, names the directory and deletes old ones. In the
background (`checkpoint.background`) training goes on as soon as the states are copied, and again while rank 0 does
that: the ranks tell each other in the message of every step what they are done with (`agreement.py`), and `advance`
together when all are. A checkpoint that never came to its name is not there: the one before counts.

A checkpoint for which the disk has no room ends no training: it is left out, loudly, and tried again when the next is
due. Only the one that a run stops with must be written.
"""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl

from megabase.pipeline.checkpoint import publish as checkpoint
from megabase.pipeline.checkpoint.publish import LATEST, TAG, DiskFull, Manifest, manifest_of
from megabase.pipeline.checkpoint.retention import evaluations, prune
from megabase.pipeline.checkpoint.space import lacking
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RESUME_HINT, RunError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.rundir.paths import METRICS, RunPaths
from megabase.pipeline.zero.checkpoint_engine import Storage


@dataclass(frozen=True)
class Saved:
    """A published checkpoint.

    size: bytes. held: seconds that it held training up; seconds: from its begin until it was there.
    """

    step: int
    path: Path
    size: int
    held: float
    seconds: float


@dataclass
class Pending:
    """A checkpoint that is being written. journal: bytes of the journal that belong to it. must: see `Saver.begin`.
    naming: what rank 0 does once all is written, then the time and the checkpoint's bytes; None before that."""

    step: int
    partial: Path
    must: bool
    journal: int
    began: float
    held: float
    naming: Future[tuple[float, int]] | None = None


class Saver:
    """Writes a run's checkpoints. Every rank has one and calls the same methods at the same steps."""

    def __init__(self, config: RunConfig, data: str, ranks: Group, storage: Storage) -> None:
        """data: identity of the shards, for the manifest."""
        self._config = config
        self._data = data
        self._ranks = ranks
        self._storage = storage
        self._directory = RunPaths(config.directory).checkpoints
        self._pruning: Future[None] | None = None
        self.pending: Pending | None = None

    @property
    def advanced(self) -> int:
        """How often all ranks have advanced with the pending checkpoint: 0 or 1."""
        return int(self.pending is not None and self.pending.naming is not None)

    @property
    def progress(self) -> int:
        """What this rank is done with, of the pending checkpoint: 0 nothing, 1 its part is written, 2 it has a name."""
        if self.pending is None:
            return 0
        if self.pending.naming is None:
            return int(self._storage.done)
        return 1 + int(self.pending.naming.done())

    def begin(self, trainer: pl.Trainer, step: int, *, must: bool) -> None:
        """Write the states of `step`, or start to. Nothing may be pending, nor is it if the disk has no room.

        Args:
            must: a full disk is an error, not a warning.

        Raises:
            RunError: on every rank, if the disk has no room and the checkpoint must be.
        """
        assert self.pending is None
        began = time.monotonic()
        partial = checkpoint.partial_directory(self._directory, step)
        journal, lacks = 0, None
        if self._ranks.rank == 0:
            if self._pruning:
                self._pruning.result()
            checkpoint.clean(self._directory)
            self._prune()  # before room is looked for: `checkpoint.keep` may have been lowered to make some
            journal = RunPaths(self._config.directory).metrics.stat().st_size
            lacks = self._lacking(trainer)
        # Also: nobody writes before rank 0 has cleaned up.
        if lacks := self._ranks.broadcast(lacks):
            self._left_out(step, lacks, must)
            return
        trainer.save_checkpoint(partial, weights_only=False)
        self.pending = Pending(step, partial, must, journal, began, time.monotonic() - began)

    def advance(self) -> Saved | None:
        """The next thing for the pending checkpoint; waits for what is not done. None: it goes on, or is left out.

        Raises:
            RunError: on every rank, if any rank could not write its part, or had states that are not finite; but for
                a full disk, if the run goes on.
        """
        pending = self.pending
        assert pending is not None
        began = time.monotonic()
        try:
            if pending.naming is None:
                pending.naming = self._start_naming(pending)
                if self._config.checkpoint.background:
                    pending.held += time.monotonic() - began
                    return None
            self._agree(pending.naming)
        except RunError as error:
            self.pending = None
            if self._ranks.rank == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)  # also to give the room back
            must = pending.must or not isinstance(error, DiskFull)
            self._left_out(pending.step, str(error), must, temporary=error.temporary)
            return None
        self.pending = None
        if self._ranks.rank == 0:
            self._pruning = self._storage.run(self._prune)
            if pending.must:
                self._pruning.result()  # the run ends here
        (named, size), path = pending.naming.result(), checkpoint.published(pending.partial)
        return Saved(pending.step, path, size, pending.held + time.monotonic() - began, named - pending.began)

    def _start_naming(self, pending: Pending) -> Future[tuple[float, int]]:
        """Collect what the ranks have written; on rank 0, begin to make a checkpoint of it: see `Pending.naming`."""
        written = self._storage.result()
        manifest = manifest_of(self._config, pending.step, self._ranks.size, self._data)
        checkpoint.describe(pending.partial, manifest, self._ranks, written.files, written.error)

        def name() -> tuple[float, int]:
            if self._ranks.rank == 0:
                self._add_ours(pending, manifest)
                checkpoint.seal(pending.partial, manifest)
            return time.monotonic(), manifest.size

        return self._storage.run(name)

    def _agree(self, naming: Future[tuple[float, int]]) -> None:
        """Raise on every rank if rank 0 could not name the checkpoint."""
        error = naming.exception()
        if error and not isinstance(error, OSError):
            traceback.print_exception(error)  # a mistake of ours: the others hear only what it says
        checkpoint.agree(self._ranks, error)

    def _prune(self) -> None:
        """On rank 0: delete the checkpoints that are not to stay."""
        settings = self._config.checkpoint
        try:
            losses = evaluations(RunPaths(self._config.directory).metrics) if settings.keep_best else {}
        except OSError as error:
            print(f"megabase: no checkpoint is deleted: {error}", file=sys.stderr)
            return
        prune(self._directory, losses, settings)

    def _add_ours(self, pending: Pending, manifest: Manifest) -> None:
        """On rank 0: the journal up to the step, and the file that DeepSpeed's own tools look for."""
        with RunPaths(self._config.directory).metrics.open("rb") as rows:
            contents = {LATEST: TAG.encode(), METRICS: rows.read(pending.journal)}
        for name, content in contents.items():
            path = pending.partial / name
            path.write_bytes(content)
            manifest.files[name] = checkpoint.synced(path)

    def _left_out(self, step: int, why: str, must: bool, *, temporary: bool = False) -> None:
        """Say that a checkpoint is not written; raise RunError, `temporary` or not, if it had to be."""
        said = f"the checkpoint of step {step} is not written: {why}"
        if must:
            raise RunError(
                f"{said}. What was there before is as it was; {RESUME_HINT}",
                temporary=temporary,
            )
        if self._ranks.rank == 0:
            print(f"megabase: {said}. Training goes on without it", file=sys.stderr, flush=True)

    def _lacking(self, trainer: pl.Trainer) -> str | None:
        parameters = (getattr(p, "ds_numel", p.numel()) for p in trainer.lightning_module.parameters())
        precision = precision_of(self._config.trainer.precision)
        return lacking(self._directory, sum(parameters), self._config.zero.stage, precision)
