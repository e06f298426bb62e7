"""Saving a run: one checkpoint after the other, published when every rank has written its part.

In the foreground a checkpoint is whole when `begin` returns. In the background (`checkpoint.background`) training
goes on as soon as the states are copied; the ranks tell each other in the message of every step whether they are
done (`agreement.py`), and publish together when all are. A checkpoint that never came to that is not there: the one
before counts.

A full disk ends no training: the checkpoint is left out, loudly, and tried again when the next is due. Only the one
that a run stops with must be written.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl

from pipeline import checkpoint
from pipeline.checkpoint import LATEST, TAG, DiskFull, manifest_of
from pipeline.config import RunConfig
from pipeline.distributed import Ranks
from pipeline.errors import RunError
from pipeline.guard import poison_in
from pipeline.hardware import precision_of
from pipeline.journal import JOURNAL
from pipeline.retention import evaluations, prune
from pipeline.space import lacking
from pipeline.storage import Written
from pipeline.strategy import ZeroStrategy


@dataclass(frozen=True)
class Saved:
    """A published checkpoint. held: seconds that it held training up; seconds: from its begin until it was there."""

    step: int
    path: Path
    held: float
    seconds: float


@dataclass
class Pending:
    """A checkpoint that is being written. journal: bytes of the journal that belong to it. must: see `Saver.begin`."""

    step: int
    partial: Path
    must: bool
    journal: int
    began: float
    held: float


class Saver:
    """Writes a run's checkpoints. Every rank has one and calls the same methods at the same steps."""

    def __init__(self, config: RunConfig, data: str, ranks: Ranks, strategy: ZeroStrategy) -> None:
        """data: identity of the shards, for the manifest."""
        self._config = config
        self._data = data
        self._ranks = ranks
        self._strategy = strategy
        self._storage = strategy.storage
        self._directory = config.directory / "checkpoints"
        self.pending: Pending | None = None

    @property
    def done(self) -> bool:
        """Whether this rank has written its part of a pending checkpoint."""
        return self.pending is not None and self._storage.done

    def begin(self, trainer: pl.Trainer, step: int, *, must: bool) -> None:
        """Write the states of `step`, or start to. Nothing may be pending, nor is it if the disk has no room.

        Args:
            must: a full disk is an error, not a warning.

        Raises:
            RunError: on every rank, if a state is not finite, or if the disk has no room and the checkpoint must be.
        """
        assert self.pending is None
        began = time.monotonic()
        partial = checkpoint.partial_directory(self._directory, step)
        journal, lacks = 0, None
        if self._ranks.rank == 0:
            checkpoint.clean(self._directory)
            self._prune()  # before room is looked for: `checkpoint.keep` may have been lowered to make some
            journal = (self._config.directory / JOURNAL).stat().st_size
            lacks = self._lacking(trainer)
        self._ranks.check(poison_in(self._strategy.deepspeed_engine))
        # Also: nobody writes before rank 0 has cleaned up.
        if lacks := self._ranks.broadcast(lacks):
            self._left_out(step, lacks, must)
            return
        trainer.save_checkpoint(partial, weights_only=False)
        self.pending = Pending(step, partial, must, journal, began, time.monotonic() - began)

    def finish(self) -> Saved | None:
        """Wait for the pending checkpoint and publish it; None if the disk was full.

        Raises:
            RunError: on every rank, if any rank could not write its part; but for a full disk, if the run goes on.
        """
        pending, self.pending = self.pending, None
        assert pending is not None
        began = time.monotonic()
        written = self._storage.result()
        if self._ranks.rank == 0 and not written.error:
            self._add_ours(pending, written)
        manifest = manifest_of(self._config, pending.step, self._ranks.size, self._data)
        try:
            checkpoint.agree(self._ranks, written.error)
            path = checkpoint.publish(pending.partial, manifest, self._ranks, written.files)
        except RunError as error:
            if self._ranks.rank == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)  # also to give the room back
            self._left_out(pending.step, str(error), pending.must or not isinstance(error, DiskFull))
            return None
        if self._ranks.rank == 0:
            self._prune()
        now = time.monotonic()
        return Saved(pending.step, path, pending.held + now - began, now - pending.began)

    def _prune(self) -> None:
        """On rank 0, while the others wait: delete the checkpoints that are not to stay."""
        settings = self._config.checkpoint
        try:
            losses = evaluations(self._config.directory / JOURNAL) if settings.keep_best else {}
        except OSError as error:
            print(f"megabase: no checkpoint is deleted: {error}", file=sys.stderr)
            return
        prune(self._directory, losses, settings)

    def _add_ours(self, pending: Pending, written: Written) -> None:
        """On rank 0: the journal up to the step, and the file that DeepSpeed's own tools look for."""
        try:
            (pending.partial / LATEST).write_text(TAG)
            source = self._config.directory / JOURNAL
            with source.open("rb") as rows, (pending.partial / JOURNAL).open("wb") as copy:
                copy.write(rows.read(pending.journal))
        except OSError as error:
            written.error = error

    def _left_out(self, step: int, why: str, must: bool) -> None:
        """Say that a checkpoint is not written; raise RunError if it had to be."""
        said = f"the checkpoint of step {step} is not written: {why}"
        if must:
            raise RunError(
                f"{said}. The checkpoints before it are as they were; the same command goes on from there"
            )
        if self._ranks.rank == 0:
            print(f"megabase: {said}. Training goes on without it", file=sys.stderr, flush=True)

    def _lacking(self, trainer: pl.Trainer) -> str | None:
        parameters = (getattr(p, "ds_numel", p.numel()) for p in trainer.lightning_module.parameters())
        precision = precision_of(self._config.trainer.precision)
        return lacking(self._directory, sum(parameters), self._config.zero.stage, precision)
