"""`megabase checkpoints RUN`: every checkpoint of a run, its state, and which one the next start resumes from.

It only reads, so the run may be training: a checkpoint that is deleted meanwhile is left out. This module imports
nothing heavy.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from megabase.datamodules.progress import bar
from megabase.pipeline.checkpoint.choose import ATTEMPTS, newest_intact
from megabase.pipeline.checkpoint.damage import find_damage, find_obvious_damage
from megabase.pipeline.checkpoint.manifest import Damaged, Manifest, read_manifest
from megabase.pipeline.checkpoint.retention import validation_losses
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import directory_size
from megabase.pipeline.readable import age, readable_size
from megabase.pipeline.rundir.paths import CHECKPOINTS, RunPaths
from megabase.pipeline.rundir.status import FINISHED, read_status
from megabase.pipeline.tables import new_table

VERIFIED = "verified"
COMPLETE = "complete"
BROKEN = "broken"
PARTIAL = "partial"
DELETING = "deleting"
UNKNOWN = "unknown"
_NAME = re.compile(r"step-(0|[1-9][0-9]*)(\.partial|\.deleting|\.broken(?:-[0-9]+)?)?")
_HEADINGS = ("checkpoint", "size", "age", "ranks", "stage", "precision", "valid bits/base", "state")


@dataclass(frozen=True)
class Entry:
    """One directory in a run's `checkpoints/`.

    Attributes:
        name: name of the directory.
        step: optimizer steps done.
        state: verified (every file has its checksum), complete (names and sizes agree; checksums were not compared),
            broken, partial (being written, or left by a killed job), deleting (being deleted, or left by a killed job)
            or unknown (cannot be judged).
        reason: why the state is not `verified`, for people; empty if it is.
        bytes: size on disk.
        created: Unix time at which it was written. Without a readable manifest: time of the last change.
        ranks: number of ranks that wrote it; None if its manifest cannot be read.
        stage: ZeRO stage; None if its manifest cannot be read.
        precision: `32`, `bf16` or `16`; None if its manifest cannot be read.
        valid_loss: of the evaluation at this step, nats per base (of a fine-tuning its loss); None if there was none.
    """

    name: str
    step: int
    state: str
    reason: str
    bytes: int
    created: float
    ranks: int | None = None
    stage: int | None = None
    precision: str | None = None
    valid_loss: float | None = None

    @property
    def intact(self) -> bool:
        """Whether no damage was found."""
        return self.state in (VERIFIED, COMPLETE)

    @property
    def published(self) -> bool:
        """Whether a start considers it: it is not partial, not being deleted and not set aside."""
        return self.name == f"step-{self.step}"


def list_run(run: Path, *, fast: bool, progress: bool) -> list[Entry]:
    """Every checkpoint of a run, newest first, including those that are damaged, partial or set aside.

    Args:
        run: the run directory.
        fast: compare names and sizes only; otherwise every byte is read.
        progress: show a progress bar on stderr.

    Raises:
        UserError: `run` is not a run directory, or has no checkpoint, or its journal cannot be read.
    """
    metrics = RunPaths(run).metrics
    try:
        losses = validation_losses(metrics)
    except OSError as error:
        raise UserError(f"{metrics} cannot be read: {error.strerror}") from None
    for _ in range(ATTEMPTS):
        found = _find(run)
        total = sum(_expected_bytes(path) for path in found) if not fast else 0
        entries = []
        with bar("Verifying", total, progress and not fast) as report:
            for path in found:
                check = find_obvious_damage if fast else lambda path: find_damage(path, report=report)
                entry = _entry(path, check, COMPLETE if fast else VERIFIED, losses)
                if entry is not None:
                    entries.append(entry)
        # The run may have deleted its only intact checkpoint after it wrote a newer one: then list them again.
        if any(entry.intact for entry in entries) or len(entries) == len(found):
            return entries
    raise UserError(f"{run}: its checkpoints are deleted faster than they can be read: try --fast")


def as_table(entries: Sequence[Entry], *, in_bits: bool = True) -> Table:
    """The list as a table, a row for each checkpoint. in_bits: the validation loss is that of bases, in nats."""
    now = time.time()
    headings = [heading if in_bits else heading.replace("bits/base", "loss") for heading in _HEADINGS]
    table = new_table(headings, left=("checkpoint", "state"))
    for entry in entries:
        table.add_row(
            entry.name,
            readable_size(entry.bytes),
            age(now - entry.created),
            *("" if value is None else str(value) for value in (entry.ranks, entry.stage, entry.precision)),
            "" if entry.valid_loss is None else f"{entry.valid_loss / (math.log(2) if in_bits else 1):.4f}",
            f"{entry.state}: {entry.reason}" if entry.reason else entry.state,
        )
    return table


def as_json(run: Path, entries: Sequence[Entry]) -> str:
    """The list as JSON: `next` names the checkpoint that the next start resumes from, `checkpoints` has all entries."""
    newest = _considered_by_next_start(entries)
    return json.dumps(
        {
            "run": str(run),
            "next": newest.name if newest and newest.intact else None,
            "checkpoints": [asdict(entry) for entry in entries],
        },
        indent=2,
    )


def _find(run: Path) -> list[Path]:
    """Directories of checkpoints, newest first. Raises UserError if there are none."""
    checkpoints = RunPaths(run).checkpoints
    if not run.is_dir():
        raise UserError(f"{run}: {'a file' if run.exists() else 'no such directory'}: give a run directory")
    if not checkpoints.is_dir():
        # If the path leads into a run directory, the message names that directory.
        inside = next((p for p in run.resolve().parents if RunPaths(p).checkpoints.is_dir()), None)
        if run.name == CHECKPOINTS or _NAME.fullmatch(run.name):
            inside = inside or run.resolve().parent
            raise UserError(f"{run}: not a run directory, but inside one: give {inside}")
        raise UserError(f"{run}: not a run directory: it has no checkpoints/ (give <run.root>/<run.name>)")
    names = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    if not names:
        raise UserError(f"{run} has no checkpoint yet")
    return sorted(names, key=lambda path: (-_step(path), len(path.name), path.name))


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match.group(1))


def _expected_bytes(path: Path) -> int:
    """Bytes that checking a checkpoint will read, according to its manifest; 0 if that cannot be read."""
    try:
        return read_manifest(path).size
    except (Damaged, UserError, OSError):
        return 0


def _entry(
    path: Path, check: Callable[[Path], str | None], good: str, losses: dict[int, float]
) -> Entry | None:
    """The entry of a directory; None if it was deleted meanwhile.

    Args:
        path: the directory.
        check: returns the damage of a checkpoint, or None.
        good: the state of a checkpoint without damage.
        losses: validation loss by step, nats per base.
    """
    try:
        size, changed = directory_size(path), _last_change(path)
        state, reason = _state(path, check, good)
    except FileNotFoundError:
        state, reason, size, changed = UNKNOWN, "it changes while it is read", 0, 0.0
    if not path.exists():
        return None
    manifest = _manifest(path)
    entry = Entry(path.name, _step(path), state, reason, size, changed, valid_loss=losses.get(_step(path)))
    if manifest:
        entry = replace(
            entry,
            created=manifest.created,
            ranks=manifest.ranks,
            stage=manifest.stage,
            precision=manifest.precision,
        )
    return entry


def _state(path: Path, check: Callable[[Path], str | None], good: str) -> tuple[str, str]:
    """(state, reason) of a directory, from its name and its content."""
    if path.suffix == ".partial":
        return PARTIAL, "being written, or left by a job that was killed; the next checkpoint removes it"
    if path.suffix == ".deleting":
        return DELETING, "being deleted, or left by a job that was killed; the next checkpoint removes it"
    try:
        damage = check(path)
    except UserError as error:
        return UNKNOWN, str(error).removeprefix(f"{path} ")
    except FileNotFoundError:
        raise
    except OSError as error:
        return UNKNOWN, f"cannot be read: {error}"
    if ".broken" in path.name:
        intact = f"set aside, but intact: rename it to step-{_step(path)} to use it"
        return BROKEN, damage or intact
    return (BROKEN, damage) if damage else (good, "" if good == VERIFIED else "checksums not compared")


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except (Damaged, UserError, OSError):
        return None


def _last_change(path: Path) -> float:
    """Unix time of the newest change in a directory."""
    return max(found.lstat().st_mtime for found in (path, *path.rglob("*")))


def _considered_by_next_start(entries: Sequence[Entry]) -> Entry | None:
    """The checkpoint that the next start resumes from, or ends at because it cannot judge it; None if there is none."""
    return newest_intact(
        (entry for entry in entries if entry.published),
        lambda entry: entry.reason if entry.state == BROKEN else None,
        lambda entry, damage: None,
    )


def conclusions(run: Path, entries: Sequence[Entry]) -> list[str]:
    """Lines that say what the list means for the next start, and what a user can do."""
    lines = []
    newest = _considered_by_next_start(entries)
    if newest is None:
        lines.append(f"{run}: no checkpoint to resume from.")
    elif newest.intact and read_status(run) == (FINISHED, newest.step):
        lines.append(
            f"{run}: finished at step {newest.step}. A larger trainer.max_steps trains it further, from {newest.name}."
        )
    elif newest.intact:
        lines.append(f"{run}: the next start resumes from {newest.name}.")
    else:
        lines.append(
            f"{run}: the next start cannot resume: {newest.name} {newest.reason}. Repair that, or move it away."
        )
    if RunPaths(run).stop.exists():
        lines.append(f"{RunPaths(run).stop} exists: the run does not start until it is removed.")
    aside = [entry for entry in entries if ".broken" in entry.name]
    if aside:
        size = readable_size(sum(entry.bytes for entry in aside))
        lines.append(
            f"Checkpoints set aside as broken take {size}. Nothing deletes them automatically: remove them with rm -r."
        )
    return lines
