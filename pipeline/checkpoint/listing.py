"""`megabase checkpoints RUN`: what a run has to go on from, and what is wrong with the rest.

Only reads, so it may look at a run that is training: a checkpoint that goes away meanwhile is left out. Needs no torch.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megabase.datamodules.progress import bar
from megabase.pipeline.checkpoint.manifest import (
    Damaged,
    Manifest,
    damage,
    glance,
    read_manifest,
)
from megabase.pipeline.checkpoint.retention import evaluations
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import directory_size, readable_size
from megabase.pipeline.rundir.paths import RunPaths

VERIFIED = "verified"
COMPLETE = "complete"
BROKEN = "broken"
PARTIAL = "partial"
DELETING = "deleting"
UNKNOWN = "unknown"
_ATTEMPTS = 5
_NAME = re.compile(r"step-(0|[1-9][0-9]*)(\.partial|\.deleting|\.broken(?:-[0-9]+)?)?")
_HEADINGS = ("checkpoint", "size", "age", "ranks", "stage", "precision", "valid loss", "state")


@dataclass(frozen=True)
class Entry:
    """A directory of checkpoints.

    state: verified (every file has its checksum), complete (names and sizes agree; checksums were not looked at),
    broken, partial (being written, or left behind), deleting (likewise) or unknown (it cannot be read).
    reason: of a state that is not verified, for people. bytes: on disk. created: Unix time; of a partial one, of
    its last change. ranks, stage, precision: from its manifest, if that can be read. valid_loss: nats per base of the
    evaluation at this very step, if there was one.
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
    def whole(self) -> bool:
        """Whether a training would go on from it, as far as was looked."""
        return self.state in (VERIFIED, COMPLETE)


def list_run(run: Path, *, fast: bool, progress: bool) -> list[Entry]:
    """Every checkpoint of a run, newest first, also those that are not whole.

    Args:
        fast: compare names and sizes only; else every byte is read.
        progress: show a bar on stderr.

    Raises:
        UserError: it is not a run directory, or has no checkpoint.
    """
    try:
        losses = evaluations(RunPaths(run).metrics)
    except OSError as error:
        raise UserError(f"{RunPaths(run).metrics} cannot be read: {error.strerror}") from None
    for _ in range(_ATTEMPTS):
        found = _find(run)
        whole_bytes = sum(_promised(path) for path in found) if not fast else 0
        entries = []
        with bar("Verifying", whole_bytes, progress and not fast) as report:
            for path in found:
                check = glance if fast else lambda path: damage(path, 0, 1, report)
                entry = _look(path, check, COMPLETE if fast else VERIFIED, losses)
                if entry is not None:
                    entries.append(entry)
        # A run that trains has deleted the newest one and made another? Then that is the one to tell of.
        if any(entry.whole for entry in entries) or len(entries) == len(found):
            return entries
    raise UserError(f"{run}: its checkpoints come and go too fast to be looked at: try --fast")


def text(run: Path, entries: Sequence[Entry]) -> str:
    """The list as a table, and what it means."""
    now = time.time()
    rows = [
        (
            entry.name,
            readable_size(entry.bytes),
            _age(now - entry.created),
            *("" if value is None else str(value) for value in (entry.ranks, entry.stage, entry.precision)),
            "" if entry.valid_loss is None else f"{entry.valid_loss:.4f}",
            f"{entry.state}: {entry.reason}" if entry.reason else entry.state,
        )
        for entry in entries
    ]
    widths = [max(len(cell) for cell in column) for column in zip(_HEADINGS, *rows, strict=True)]
    aligned = [str.ljust, *[str.rjust] * 6, str.ljust]
    lines = [
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        ).rstrip()
        for row in (_HEADINGS, *rows)
    ]
    return "\n".join([*lines, *_conclusions(run, entries)])


def as_json(run: Path, entries: Sequence[Entry]) -> str:
    """The list as JSON: an `Entry` each, newest first; and the name of the one that the `next` start goes on from."""
    newest = _judged(entries)
    told = {"run": str(run), "next": newest.name if newest and newest.whole else None}
    return json.dumps(told | {"checkpoints": [asdict(entry) for entry in entries]}, indent=2)


def _find(run: Path) -> list[Path]:
    """Directories of checkpoints, newest first; UserError where there are none."""
    checkpoints = run / "checkpoints"
    if not run.is_dir():
        raise UserError(f"{run}: {'a file' if run.exists() else 'no such directory'}: give a run directory")
    if not checkpoints.is_dir():
        # Who has completed the path one word too far is told so.
        inside = next((p for p in run.resolve().parents if (p / "checkpoints").is_dir()), None)
        if run.name == "checkpoints" or _NAME.fullmatch(run.name):
            inside = inside or run.resolve().parent
            raise UserError(f"{run}: not a run directory, but in one: give {inside}")
        raise UserError(f"{run}: not a run directory: it has no checkpoints/ (give <run.root>/<run.name>)")
    names = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    if not names:
        raise UserError(f"{run} has no checkpoint yet")
    return sorted(names, key=lambda path: (-_step(path), len(path.name), path.name))


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match.group(1))


def _promised(path: Path) -> int:
    """Bytes that checking a checkpoint will read, as far as its manifest tells."""
    try:
        return read_manifest(path).size
    except (Damaged, UserError, OSError):
        return 0


def _look(
    path: Path, check: Callable[[Path], str | None], good: str, losses: dict[int, float]
) -> Entry | None:
    """One line of the list; None if the directory is not there any more."""
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
    """(state, reason) of a directory by its name and its content."""
    if path.suffix == ".partial":
        return PARTIAL, "being written, or left by a job that was killed; the next checkpoint clears it away"
    if path.suffix == ".deleting":
        return DELETING, "being deleted, or left by a job that was killed; the next checkpoint clears it away"
    try:
        found = check(path)
    except UserError as error:
        return UNKNOWN, str(error).removeprefix(f"{path} ")
    except FileNotFoundError:
        raise
    except OSError as error:
        return UNKNOWN, f"cannot be read: {error}"
    if ".broken" in path.name:
        again = f"set aside, but whole: rename it to step-{_step(path)} to use it"
        return BROKEN, found or again
    return (BROKEN, found) if found else (good, "" if good == VERIFIED else "checksums not compared")


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except (Damaged, UserError, OSError):
        return None


def _last_change(path: Path) -> float:
    """Unix time of the newest change in a directory."""
    return max(found.lstat().st_mtime for found in (path, *path.rglob("*")))


def _judged(entries: Sequence[Entry]) -> Entry | None:
    """Where the next start comes to: it sets aside what is broken, but not what it cannot judge."""
    return next((entry for entry in entries if entry.whole or entry.state == UNKNOWN), None)


def _conclusions(run: Path, entries: Sequence[Entry]) -> list[str]:
    """What a user would ask next."""
    lines = []
    newest = _judged(entries)
    if newest is None:
        lines.append(f"{run}: there is none to go on from.")
    elif newest.whole:
        lines.append(f"{run}: the next start goes on from {newest.name}.")
    else:
        lines.append(f"{run}: the next start ends at {newest.name}, which it can neither read nor leave out.")
    if RunPaths(run).stop.exists():
        lines.append(f"{RunPaths(run).stop} is there: no start goes on until it is removed.")
    aside = [entry for entry in entries if ".broken" in entry.name]
    if aside:
        size = readable_size(sum(entry.bytes for entry in aside))
        lines.append(
            f"Broken ones set aside hold {size}; nothing deletes them by itself: look, then remove them with rm -r."
        )
    return lines


def _age(seconds: float) -> str:
    """A time that has passed, for people."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"
