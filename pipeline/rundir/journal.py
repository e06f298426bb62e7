"""The journal: what training computed, in the run directory, before anything else hears of it.

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
from megabase.pipeline.checkpoint.space import is_full
from megabase.pipeline.errors import GOES_ON, RunError

Row = dict[str, Any]
# The journal of a run, in its directory; a checkpoint holds a copy of it up to its step.
JOURNAL = "metrics.jsonl"
# Beside it: how fast the run went.
PERFORMANCE = "performance.jsonl"


class Journal:
    """Append rows to a JSON-lines file, durably. For rank 0 only. last_step: of the rows kept when it was opened."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open `path`, keeping the rows up to `resume_step` (0: none) and dropping a torn last line."""
        self.path = path
        kept = [row for row in read(path) if row["step"] <= resume_step] if resume_step else []
        self.last_step = max((row["step"] for row in kept), default=0)
        publish(path, "".join(map(_line, kept)).encode())
        self._file = path.open("a")

    def append(self, rows: list[Row]) -> None:
        """Write `rows` and wait until they are on disk. Raises RunError if they cannot be written."""
        if not rows:
            return
        try:
            self._file.writelines(_line(row) for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error}; {GOES_ON}",
                passing=not is_full(error),
            ) from error

    def close(self) -> None:
        """Close the file; rows are on disk already, or `append` has said that they are not."""
        with suppress(OSError):
            self._file.close()


def read(path: Path, having: str = "") -> Iterator[Row]:
    """The rows of a journal, or those with a field; a line that is torn or no row ends it.

    A journal has a row for every step and few of some kinds: lines without `having` in them are not parsed.
    """
    mark = having.encode()
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if mark not in line:
                continue
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not isinstance(row, dict) or "step" not in row:
                return
            yield row


def restore(path: Path, saved: Path) -> str | None:
    """Give a journal the rows up to a checkpoint's step back, if it has lost or changed any of them.

    Args:
        saved: the copy of the journal in the checkpoint.

    Returns:
        What was wrong, or None.
    """
    rows = saved.read_bytes()
    there = path.read_bytes() if path.exists() else b""
    if there.startswith(rows):
        return None
    publish(path, rows)
    return "lacks rows" if rows.startswith(there) else "has other rows"


def has_evaluation(path: Path, step: int) -> bool:
    """Whether a journal has the evaluation of a step."""
    return any(row["step"] == step for row in read(path, having='"valid_loss"'))


class Tail:
    """Reads a growing journal: each row once. The file must not be rewritten meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[Row]:
        """The rows that are whole and were not returned before."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _line(row: Row) -> str:
    # repr-exact floats; NaN and infinities are not JSON, so they are written as strings.
    safe = {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"
