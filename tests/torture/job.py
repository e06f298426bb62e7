"""`megabase` as a process whose group can be watched and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests.torture.plan import ALL, RANK, SUPERVISOR

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """`megabase ARGUMENTS...` in a process group of its own, its output in the file `log`."""

    def __init__(self, arguments: Sequence[str], cwd: Path, log: Path) -> None:
        self.log = log
        self.pid = self._start(["-m", "megabase.pipeline.cli", *arguments], cwd)

    def _start(self, command: Sequence[str], cwd: Path) -> int:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *command],
                cwd=cwd,
                # Import the code of this checkout. Use no GPU, because there may be fewer GPUs than ranks.
                env=os.environ
                | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """Everything it printed so far."""
        return self.log.read_text(errors="replace")

    def members(self) -> list[int]:
        """Processes of its group that are alive."""
        return [pid for pid, group in _processes() if group == self.pid]

    def kill(self, target: str) -> str:
        """Send SIGKILL to ALL, SUPERVISOR or "rank R"; returns the target: ALL if that rank does not exist yet."""
        if target == SUPERVISOR:
            os.kill(self.pid, signal.SIGKILL)
            return target
        if target != ALL:
            rank, ranks = int(target.removeprefix(f"{RANK} ")), self._ranks()
            if rank < len(ranks):
                os.kill(ranks[rank], signal.SIGKILL)
                return target
        self.end()
        return ALL

    def _ranks(self) -> list[int]:
        """The supervisor's child processes, in the order in which it started them."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except OSError:
            return []
        return [int(pid) for pid in children.split()]

    def end(self) -> None:
        """Send SIGKILL to every process of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def gone(self, within: float) -> bool:
        """Wait until no process of the job is left; false if some are after `within` seconds."""
        deadline = time.monotonic() + within
        while self.poll() is None or self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _processes() -> Iterator[tuple[int, int]]:
    """(process id, process group) of every process that is alive."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if state not in "ZX":
                yield int(entry.name), int(group)
