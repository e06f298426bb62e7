"""What the next start of a run would do: begin, resume from a checkpoint, or nothing because the run is finished.

Found without ranks and without reading whole checkpoints, so that it takes a moment. What a start decides in the end is
the business of `choose.py`, which compares every checksum.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megabase.datamodules.batches.visits import evaluation_windows
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import VALID
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.mixture import identity_of
from megabase.pipeline.checkpoint.choose import newest_intact
from megabase.pipeline.checkpoint.damage import find_damage, find_obvious_damage
from megabase.pipeline.checkpoint.identity import changed_settings, manifest_of
from megabase.pipeline.checkpoint.manifest import Damaged, Manifest, list_checkpoints, read_manifest
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.journal import has_evaluation, read
from megabase.pipeline.rundir.paths import RunPaths

# Checkpoints of up to this many bytes are compared with their checksums: that takes less than a second.
READ_BYTES = 256 << 20


@dataclass(frozen=True)
class NextStart:
    """What the next start of a run would do.

    Attributes:
        step: it continues after this step; 0: it begins.
        finished: nothing is left to do.
        verified: every file of the checkpoint has its checksum. Otherwise only names and sizes were compared.
        changes: settings that differ from those of the checkpoint, as "optim.lr 0.001 -> 0.0005".
        damaged: newer checkpoints that are damaged, with their damage.
        refused: why it would not start at step 0, though there is nothing to resume from; empty if it would.
    """

    step: int = 0
    finished: bool = False
    verified: bool = True
    changes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    refused: str = ""


def next_start(config: RunConfig, ranks: int, index: ShardIndex) -> NextStart:
    """What the next start of a run would do. Nothing is changed.

    Args:
        config: of the run; `model.vocab_size` is set.
        ranks: that would train it.
        index: of its shards.

    Raises:
        UserError: a newer megabase wrote the newest checkpoint.
        OSError: a checkpoint cannot be read.
    """
    paths = RunPaths(config.directory)
    damaged: list[str] = []
    chosen = newest_intact(
        list_checkpoints(paths.checkpoints),
        _damage,
        lambda path, damage: damaged.append(f"{path.name} is broken: {damage}"),
    )
    if chosen is None:
        return NextStart(damaged=damaged, refused=_why_refused(paths, damaged))
    manifest = read_manifest(chosen)
    finished = manifest.step >= config.trainer.max_steps and not damaged
    if finished and evaluates(config, index):
        finished = has_evaluation(paths.metrics, manifest.step)
    data = identity_of(index.segments, config.data.mixture)
    current = manifest_of(config, manifest.step, ranks=ranks, data=data, alphabet=index.alphabet.name)
    return NextStart(
        manifest.step, finished, _is_small(manifest), changed_settings(manifest, current), damaged
    )


def unused_changes(changes: list[str]) -> str:
    """What to say of a finished run that is started with other settings; `changes` as in `NextStart`."""
    return (
        f"it was not trained with {', '.join(changes)}, and is not trained again: set another run.name to train with"
        " these settings"
    )


def newest_written(paths: RunPaths) -> int:
    """The step of the newest checkpoint that a run has ever written, by its record of speed; 0: none."""
    return max((row["step"] for row in read(paths.performance, having="checkpoint_seconds")), default=0)


def _why_refused(paths: RunPaths, damaged: list[str]) -> str:
    if damaged or any(paths.checkpoints.glob("step-*.broken*")):
        return "no checkpoint is intact, and a start does not begin again by itself"
    if newest := newest_written(paths):
        return f"the checkpoint of step {newest} is gone, and a start does not begin again by itself"
    return ""


def _damage(path: Path) -> str | None:
    """The damage of a checkpoint that is found within a second; None if there is none."""
    with suppress(Damaged):
        if _is_small(read_manifest(path)):
            return find_damage(path)
    return find_obvious_damage(path)


def _is_small(manifest: Manifest) -> bool:
    return manifest.size <= READ_BYTES


def evaluates(config: RunConfig, index: ShardIndex) -> bool:
    """Whether the shards have a validation window for this run."""
    if VALID in index.segments.splits():
        with suppress(DataError):
            evaluation_windows(config.data, index, VALID)
            return True
    return False
