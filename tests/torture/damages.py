"""Damages to the files of a run: to a checkpoint, to the journal, to the small files beside them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.torture.rundir import published, step_of

# Steps between two checkpoints and between two evaluations.
SAVE_EVERY, EVALUATE_EVERY = 2, 5


def _shard(checkpoint: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(checkpoint.rglob("*.pt")))


def _cut(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    left = draw.randrange(size)
    os.truncate(path, left)
    return f"{path.name} cut to {left} of {size} bytes"


def _flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}: bit {bit} of byte {at} flipped"


def _remove(path: Path) -> str:
    path.unlink()
    return f"{path.name} removed"


CHECKPOINT_DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "shard cut": lambda checkpoint, draw: _cut(_shard(checkpoint, draw), draw),
    "shard flipped": lambda checkpoint, draw: _flip(_shard(checkpoint, draw), draw),
    "shard removed": lambda checkpoint, draw: _remove(_shard(checkpoint, draw)),
    "manifest removed": lambda checkpoint, draw: _remove(checkpoint / "megabase.json"),
    "manifest cut": lambda checkpoint, draw: _cut(checkpoint / "megabase.json", draw),
    "manifest flipped": lambda checkpoint, draw: _flip(checkpoint / "megabase.json", draw),
    "pointer removed": lambda checkpoint, draw: _remove(checkpoint / "latest"),
}


def _journal_tail(run: Path, draw: random.Random) -> str:
    """Remove rows from the end of the journal, of steps after the newest checkpoint only."""
    keep = step_of(published(run)[0]) if published(run) else 0
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    needed = [number for number, line in enumerate(lines, 1) if _step_of_row(line) <= keep]
    left = draw.randint(max(needed, default=0), len(lines))
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:left]))
    return f"{len(lines) - left} lines off the end of metrics.jsonl"


def _step_of_row(line: bytes) -> float:
    """The step of a line of the journal; infinity if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def _journal_torn(run: Path, draw: random.Random) -> str:
    row = b'{"step": 100000, "loss": 1.25, "lr": 0.001}\n'
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(row[: draw.randrange(1, len(row))])
    return "half a line at the end of metrics.jsonl"


def _stray_partial(run: Path, draw: random.Random) -> str:
    newest = step_of(published(run)[0]) if published(run) else 0
    stray = run / "checkpoints" / f"step-{newest + SAVE_EVERY}{draw.choice(['.partial', '.deleting'])}"
    (stray / "checkpoint").mkdir(parents=True, exist_ok=True)
    for name in ("megabase.json", "latest", "checkpoint/mp_rank_00_model_states.pt", "checkpoint/more.pt"):
        (stray / name).write_bytes(draw.randbytes(1000))
    return f"{stray.name} full of garbage"


def _stray_lock(run: Path, draw: random.Random) -> str:
    (run / ".lock").write_text(f"elsewhere process {draw.randint(1, 99999)}\n")
    return "a lock file of another host"


def _one_of(*names: str) -> Callable[[Path, random.Random], str]:
    def damage(run: Path, draw: random.Random) -> str:
        existing = [run / name for name in names if (run / name).exists() and (run / name).stat().st_size]
        if not existing:
            return "nothing"
        path = draw.choice(existing)
        return draw.choice([lambda: _cut(path, draw), lambda: _flip(path, draw), lambda: _remove(path)])()

    return damage


OTHER_DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "journal's tail lost": _journal_tail,
    "journal torn": _journal_torn,
    "stray checkpoint": _stray_partial,
    "stray lock": _stray_lock,
    "speed damaged": _one_of("performance.jsonl"),
    "side file damaged": _one_of("status.json", "mlflow.json", "environment.json", "config.yaml", "loss.png"),
    "baselines damaged": _one_of("baselines.json"),
    "journal damaged": _one_of("metrics.jsonl"),
}
