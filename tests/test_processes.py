"""Forked jobs behave like processes that a shell starts."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.processes import Job, Python, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_exit_code_streams_directory_environment_and_arguments(tmp_path: Path) -> None:
    program = (
        "import json, os, sys\n"
        "print(json.dumps([sys.argv, os.getcwd(), os.environ['GIVEN'], os.environ['OMP_NUM_THREADS']]))\n"
        "print('message', file=sys.stderr)\n"
        "sys.exit(7)"
    )
    process = Python("-c", program, "x", cwd=tmp_path, environment={"GIVEN": "value"})
    assert process.wait() == (7, "message\n")
    assert json.loads(process.stdout()) == [["-c", "x"], str(tmp_path), "value", "1"]


def test_an_exception_is_a_failure(tmp_path: Path) -> None:
    code, messages = Python("-c", "raise ValueError('why')", cwd=tmp_path).wait()
    assert code == 1 and "ValueError: why" in messages


def test_the_libraries_are_imported_before_the_fork(tmp_path: Path) -> None:
    program = "import sys\nsys.exit(not {'torch', 'deepspeed', 'pytorch_lightning', 'mlflow'} <= sys.modules.keys())"
    assert Python("-c", program, cwd=tmp_path).wait() == (0, "")


def test_a_signal_and_a_kill_reach_the_process(tmp_path: Path) -> None:
    listening = (
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: exit(3))\nprint(1, flush=True)\n"
    )
    process = Python("-c", listening + "time.sleep(60)", cwd=tmp_path)
    process.until(lambda: process.stdout() != "")
    process.send_signal(signal.SIGUSR1)
    assert process.wait()[0] == 3
    process = Python("-c", "import time; time.sleep(60)", cwd=tmp_path)
    process.kill()
    assert process.poll() == -signal.SIGKILL


def test_a_command_is_run_as_a_module(tmp_path: Path) -> None:
    code, messages = Job("train", "no/such.yaml", cwd=tmp_path).wait()
    assert code == 2 and "no/such.yaml" in messages and "Traceback" not in messages


def note_process(directory: str) -> None:
    """In a rank: write its process id, its parent's, and how it was set up."""
    rank = os.environ["RANK"]
    known = [os.getpid(), os.getppid(), signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL, sys.argv[0]]
    (Path(directory) / rank).write_text(json.dumps(known))
    if rank == "1":
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the supervisor ends it


def test_ranks_are_processes_of_one_supervisor_which_sees_them_die(tmp_path: Path) -> None:
    code, messages = run_ranks(2, note_process, str(tmp_path))
    assert code == 1 and "rank 1" in messages and "SIGKILL" in messages
    one, other = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert one[0] != other[0] and one[1] == other[1] not in (os.getpid(), os.getppid())
    assert one[2:] == other[2:] == [True, "-c"]
