"""The journal: what training computed, in the run directory before MLflow gets it.

`metrics.jsonl` holds only what is a function of the run (losses, learning rates, evaluations), so an interrupted
and an uninterrupted run write the same bytes. `performance.jsonl` holds how fast it went (wall clock, memory).
On resume the rows after the checkpoint's step are dropped: training computes them again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish
from megabase.pipeline.errors import RunError
from megabase.pipeline.files import as_object, is_disk_full
from megabase.pipeline.rundir.hint import resume_hint

Row = dict[str, Any]


class Journal:
    """Appends rows to a JSON-lines file, durably. For rank 0 only.

    Args:
        path: the file; made if missing.
        resume_step: step of the checkpoint that the run resumes from. Rows up to it are kept; later rows and an
            incomplete last line are dropped. 0: drop all rows.

    Attributes:
        path: the file.
        last_step: the largest step of the rows that were kept; 0 if none was.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [row for row in read(path) if row["step"] <= resume_step] if resume_step else []
        self.last_step = max((row["step"] for row in kept), default=0)
        publish(path, "".join(map(_line, kept)).encode())
        self._file = path.open("a")

    def append(self, rows: list[Row]) -> None:
        """Write `rows` and wait until they are on disk.

        Raises:
            RunError: they cannot be written.
        """
        if not rows:
            return
        try:
            self._file.writelines(_line(row) for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error}; {resume_hint(self.path.parent)}",
                temporary=not is_disk_full(error),
            ) from error

    def close(self) -> None:
        """Close the file. All rows are on disk already, or `append` has raised an error."""
        with suppress(OSError):
            self._file.close()


def read(path: Path, having: str = "", key: str = "step") -> Iterator[Row]:
    """The rows of a journal, up to the first line that is incomplete or is not a row.

    Args:
        path: the file; without it there are no rows.
        having: yield only rows whose line contains this text. Other lines are not parsed, which is much faster where
            few rows of many are wanted.
        key: what a row must have.
    """
    wanted = having.encode()
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if wanted not in line:
                continue
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not isinstance(row, dict) or key not in row:
                return
            yield row


def read_end(path: Path, size: int) -> list[Row]:
    """The complete rows in the last `size` bytes of a journal; empty if there is none. Other lines are left out.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - size)
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")[1 if start else 0 : -1]
    rows = (as_object(line) for line in lines)
    return [row for row in rows if "step" in row]


def restore(path: Path, saved: Path) -> str | None:
    """Restore the rows up to a checkpoint's step, if the journal lacks any of them or has others.

    Args:
        path: the journal.
        saved: the copy of the journal in the checkpoint.

    Returns:
        What was wrong with the journal: "lacks rows" or "has other rows"; None if nothing was wrong.
    """
    rows = saved.read_bytes()
    current = path.read_bytes() if path.exists() else b""
    if current.startswith(rows):
        return None
    publish(path, rows)
    return "lacks rows" if rows.startswith(current) else "has other rows"


def has_evaluation(path: Path, step: int) -> bool:
    """Whether a journal has the evaluation of a step."""
    return any(row["step"] == step for row in read(path, having='"valid_loss"'))


class Tail:
    """Reads a growing journal and returns each row once. `was_rewritten` says whether that still holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode: int | None = None

    def was_rewritten(self) -> bool:
        """Whether the rows that were returned may not be those of the file any more: a start has dropped some."""
        if self._inode is None:
            return False
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return True
        return found.st_ino != self._inode or found.st_size < self._offset

    def new(self) -> Iterator[Row]:
        """The rows that are complete and were not returned before. Raises ValueError for a line that is not JSON."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            self._inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def _line(row: Row) -> str:
    # Floats as repr, which is exact. NaN and infinities are not JSON, so they are written as strings.
    safe = {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"
