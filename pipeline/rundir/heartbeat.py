"""The heartbeats of a run's ranks, as another process reads them, and what they say of a rank that hangs.

`ranks/watchdog.py` writes them: a file for each rank, about every 10 s. The clocks of nodes differ, so all times here
are on one clock, that of the file system of the run directory: a heartbeat was written when its file was changed.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megabase.pipeline.files import as_object
from megabase.pipeline.readable import age
from megabase.pipeline.rundir.paths import RunPaths

# A rank that has not written a heartbeat for this many seconds is not believed to be running. It writes one every 10 s,
# and a file server may show a change a minute late.
SILENT_S = 90.0
# No rank has made progress for at least this many seconds: then the run may hang. See `Hang`.
PATIENCE_S = 300.0
# The same before the first step of a start, which compiles kernels.
START_PATIENCE_S = 1800.0
# Ranks that wait for another one have made progress at least this many seconds later.
_BEHIND_S = 5.0
# At most so many ranks are named in a message.
_NAMED = 3
_NAME = re.compile(r"rank-(0|[1-9][0-9]*)\.heartbeat")
# Files that are opened at once: each is a request to a file server.
_READERS = 16


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a rank.

    Attributes:
        rank: its number.
        node: SLURM's name of its node, or the name of the machine.
        pid: its process there.
        step: optimizer steps done.
        doing: what its main thread does, in a few words.
        written: time of the heartbeat.
        progress: time at which the main thread last reported that it works.
    """

    rank: int
    node: str
    pid: int
    step: int
    doing: str
    written: float
    progress: float

    @property
    def place(self) -> str:
        """The rank and its node, for messages."""
        return f"rank {self.rank} on {self.node}"

    def process_is_gone(self) -> bool:
        """Whether the process was on this machine and has ended. False on any other machine."""
        if self.node != platform.node() or self.pid <= 0:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


@dataclass(frozen=True)
class Hang:
    """Why a run that is alive makes no progress.

    Attributes:
        ranks: the ranks that the others wait for; empty if none stands out.
        seconds: for how long.
        text: for people.
    """

    ranks: tuple[Heartbeat, ...]
    seconds: float
    text: str


def read_heartbeats(directory: Path, ranks: int | None = None) -> list[Heartbeat]:
    """The heartbeats in a run directory, by rank. Files that cannot be read are left out.

    Args:
        directory: the run directory.
        ranks: of the run; files of others are those of an earlier start. None: not known, read all.
    """
    numbers = []
    with suppress(OSError), os.scandir(RunPaths(directory).logs) as entries:
        numbers = [int(match[1]) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    files = [
        RunPaths(directory).heartbeat(number) for number in sorted(numbers) if ranks is None or number < ranks
    ]
    if len(files) <= _READERS:
        return [found for found in map(_read, files) if found]
    with ThreadPoolExecutor(_READERS) as pool:
        return [found for found in pool.map(_read, files) if found]


def clock(directory: Path, newest: float | None) -> float:
    """Now, on the clock of the file system of a run directory.

    This machine's clock is believed as long as it makes the newest heartbeat a few seconds old. If it does not, a
    temporary file in the run directory tells the time.

    Args:
        directory: the run directory.
        newest: time of the newest heartbeat, if there is one.
    """
    now = time.time()
    if newest is not None and not newest - 1 <= now <= newest + SILENT_S:
        with suppress(OSError), tempfile.TemporaryFile(dir=directory) as file:
            now = os.fstat(file.fileno()).st_mtime
    return now


def find_hang(heartbeats: Sequence[Heartbeat], now: float, patience_s: float) -> Hang | None:
    """What keeps a run from making progress; None if nothing does.

    A rank hangs if it writes no heartbeats while others do: its process or its node is frozen. If all ranks write, but
    none has made progress for `patience_s` seconds, the others wait in a collective for the one that stopped first.

    Args:
        heartbeats: of the ranks of one start that has not ended.
        now: time, on the clock of the heartbeats.
        patience_s: longer than anything that a rank does without reporting progress.
    """
    newest = max((each.written for each in heartbeats), default=now)
    if now - newest > SILENT_S:
        one = tuple(heartbeats) if len(heartbeats) == 1 else ()
        who = _named(one) or "no rank"
        text = f"{who} has written {'no' if one else 'a'} heartbeat for {age(now - newest)}"
        return Hang(one, now - newest, f"{text}: processes, nodes or the file system are frozen")
    silent = tuple(each for each in heartbeats if newest - each.written > SILENT_S)
    if silent:
        seconds = now - min(each.written for each in silent)
        what = f"{'has' if len(silent) == 1 else 'have'} written no heartbeat for {age(seconds)}"
        return Hang(silent, seconds, f"{_named(silent)} {what}: the process or the node is frozen")
    last = max((each.progress for each in heartbeats), default=now)
    trains = any(each.step for each in heartbeats)
    if now - last <= (patience_s if trains else max(patience_s, START_PATIENCE_S)):
        return None
    step = min(each.step for each in heartbeats)
    behind = tuple(each for each in heartbeats if each.step == step and last - each.progress > _BEHIND_S)
    if not behind and any(each.step > step for each in heartbeats):
        behind = tuple(each for each in heartbeats if each.step == step)
    text = f"no rank has made progress for {age(now - last)}"
    if behind:
        first = behind[0]
        text += (
            f": the others wait for {_named(behind)}, which stopped first ({first.doing}, step {first.step})"
        )
    else:
        text += f" ({heartbeats[0].doing}, step {heartbeats[0].step})"
    return Hang(behind, now - last, text)


def _named(ranks: Sequence[Heartbeat]) -> str:
    names = ", ".join(each.place for each in ranks[:_NAMED])
    return names if len(ranks) <= _NAMED else f"{names} and {len(ranks) - _NAMED} more"


def written_since(heartbeats: Iterable[Heartbeat], begin: float | None) -> list[Heartbeat]:
    """The heartbeats of a start that began at a time; older files are those of the start before. None: all."""
    return [each for each in heartbeats if begin is None or each.written >= begin]


def _read(path: Path) -> Heartbeat | None:
    try:
        # Opened first: a file server must then tell its present time of change, not the one in this node's cache.
        with path.open("rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            found = as_object(file.read())
        return Heartbeat(
            rank=int(found["rank"]),
            node=str(found["host"]),
            pid=int(found["pid"]),
            step=int(found["step"]),
            doing=str(found["doing"]),
            written=written,
            # The rank's own clock measured the time between its two reports.
            progress=written - max(float(found["written"]) - float(found["beat"]), 0.0),
        )
    except (OSError, KeyError, TypeError, ValueError):
        return None
