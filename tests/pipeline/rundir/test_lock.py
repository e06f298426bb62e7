"""The lock of a run directory, and the check that the directory can be written."""

import errno
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir import lock as lock_module
from megabase.pipeline.rundir.lock import check_writable, lock_run

HOLDER = """
import sys
from pathlib import Path
from megabase.pipeline.rundir.lock import lock_run
lock = lock_run(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_job_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "locked\n"
        assert (run / "checkpoints").is_dir()
        with pytest.raises(UserError, match=rf"another job .* process {holder.pid}\): wait for it"):
            lock_run(run)
        holder.kill()
    lock = lock_run(run)
    assert platform.node() in (run / ".lock").read_text()
    lock.close()


@pytest.mark.slow
def test_a_lock_of_another_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "LOCK_LEASE_S", 0.5)
    lock = lock_run(tmp_path)
    (tmp_path / ".lock").write_text("elsewhere process 1\n")
    with pytest.raises(UserError, match="elsewhere process 1"):
        lock_run(tmp_path)
    lock.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write in .*file/run \(Not a directory\)"):
        lock_run(tmp_path / "file" / "run")


@pytest.mark.parametrize(("number", "passes"), [(errno.EROFS, False), (errno.ENOSPC, True)])
def test_a_full_disk_passes_the_check_and_a_read_only_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    def fail(**_: object) -> None:
        raise OSError(number, "no")

    check_writable(tmp_path / "not" / "yet")
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    if passes:
        check_writable(tmp_path)
    else:
        with pytest.raises(UserError, match=r"choose another run\.root"):
            check_writable(tmp_path)
