"""The run directory as a place: one job trains in it at a time, and its status says how that goes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish_json
from megabase.pipeline.checkpoint.space import is_full
from megabase.pipeline.errors import UserError, rank_zero
from megabase.pipeline.ranks.launch import Ranks

logger = logging.getLogger(__name__)

# How long the lock of a job that is gone may stay: file servers keep it for a lease of about 90 s.
LOCK_LEASE_S = 120.0


@contextmanager
def lock(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Keep a second job out of the run directory for as long as this process lives, however it ends."""
    error = None
    descriptor = -1
    if ranks.rank == 0:
        try:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            descriptor = _take_lock(directory)
        except BlockingIOError as caught:
            error = str(caught)
        except OSError as caught:
            error = unwritable(directory, caught)
    error = ranks.broadcast(error)
    if error:
        raise UserError(error)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def unwritable(directory: Path, error: OSError) -> str:
    """What to say when nothing can be written in a run directory."""
    return f"cannot write in {directory} ({error.strerror}): mend that, or choose another run.root"


def check_writable(directory: Path) -> None:
    """Raise UserError if a run directory that is there cannot be written, or one that is not cannot be made."""
    place = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if not is_full(error):  # a start may make room, and says it better
            raise UserError(unwritable(directory, error)) from None


def _take_lock(directory: Path) -> int:
    """Lock `.lock` of a run directory; returns the descriptor that holds it.

    A holder that is gone may leave its lock behind for a while (a file server's lease): that is waited for.

    Raises:
        BlockingIOError: another job holds it; the message is for the user.
    """
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_LEASE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            host, _, process = holder.partition(" process ")
            here = host == platform.node() and process.isdigit()
            if (here and Path(f"/proc/{process}").exists()) or time.monotonic() > deadline:
                raise BlockingIOError(
                    f"another job is training {directory} ({holder}): wait for it, or choose another run.name"
                ) from None
            time.sleep(1.0)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            logger.warning(
                f"{directory} is on a file system without locks: nothing keeps a second job out of it"
            )
            break
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{platform.node()} process {os.getpid()}\n".encode(), 0)
    return descriptor


def write_status(directory: Path | None, state: str, step: int | None, *, begun: bool = True) -> None:
    """Say how the run goes or ended, for people in the run directory and for `slurm/train.sbatch` where it asked.

    A run that was killed, or ended by its watchdog, leaves "running" behind. A start that did not come so far as to
    write in the run directory (`begun`) leaves there what the one before has said.
    """
    if not rank_zero():
        return
    status: dict[str, Any] = {"state": state, "step": step}
    targets = {}
    if directory and begun:
        targets[directory / "status.json"] = status
    if os.environ.get("MEGABASE_STATUS_FILE"):
        place = {"checkpoints": str(directory / "checkpoints")} if directory else {}
        targets[Path(os.environ["MEGABASE_STATUS_FILE"])] = status | place
    for target, content in targets.items():
        try:
            publish_json(target, content)
        except OSError as error:
            print(f"megabase: cannot write {target}: {error}", file=sys.stderr)
