"""The lock of a run directory, so that one job at a time trains in it, and the check that it can be written."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

from megabase.datamodules.files import FileLock, LockHeldError
from megabase.pipeline.errors import UserError
from megabase.pipeline.files import is_disk_full
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)

# Seconds to wait for a lock whose holder has ended: a file server releases it after a lease of about 90 s.
LOCK_LEASE_S = 120.0


def lock_run(directory: Path) -> FileLock:
    """Make a run directory and lock it against a second job. Call it on one rank and broadcast the error.

    If the holder of the lock no longer runs, this waits up to LOCK_LEASE_S seconds for the file server to release it.

    Returns:
        The lock, held until `close` or the end of this process.

    Raises:
        UserError: another job holds the lock, or the directory cannot be written.
    """
    paths = RunPaths(directory)
    deadline = time.monotonic() + LOCK_LEASE_S
    try:
        paths.checkpoints.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                lock = FileLock.take(paths.lock)
                break
            except LockHeldError as error:
                if error.holder_is_running() or time.monotonic() > deadline:
                    raise UserError(
                        f"another job is training {directory} ({error.holder}): wait for it, or choose another run.name"
                    ) from None
                time.sleep(1.0)
    except OSError as error:
        raise UserError(_unwritable(directory, error)) from None
    if not lock.supported:
        logger.warning(
            f"{directory} is on a file system without locks: megabase cannot stop a second job from training there"
        )
    return lock


def check_writable(directory: Path) -> None:
    """Check that a run directory can be written, or can be made if it does not exist. A full disk passes.

    Raises:
        UserError: it cannot.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        # The start may free space by deleting old checkpoints; if not, its message names what is needed.
        if not is_disk_full(error):
            raise UserError(_unwritable(directory, error)) from None


def _unwritable(directory: Path, error: OSError) -> str:
    return f"cannot write in {directory} ({error.strerror}): repair that, or choose another run.root"
