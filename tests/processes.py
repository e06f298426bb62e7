"""`megabase` and its ranks as real processes that start in milliseconds: forks of one that has imported the libraries.

To import torch, Lightning and DeepSpeed takes about 10 s of CPU, and the tests start some hundred ranks. So Python's
own fork server imports them once, in a process with one thread, before any process group exists, and every `Python` is
a fork of it. Where such a process starts Python again, as the supervisor of ranks does, it forks as well instead of
running a new interpreter: `_ForkedPython` replaces `subprocess.Popen`. The rest is as in a job: every rank is a process
of its own and a child of its supervisor, with its own environment, signal handlers and gloo connections.

Tests of what an interpreter does when it starts use `subprocess`. The real command starts the undisturbed run of
conftest.py, so the tests that compare other runs with it also show that a forked job computes the same bytes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megabase.datamodules.processes import end_with_parent

# No GPU: there may be fewer than ranks, and a process that has touched one cannot fork.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MEGABASE_OVERSUBSCRIBE": "1"}
ROOT = Path(__file__).parents[1]
# Seconds to wait for a job, and for ranks that run all cases of a module, on a busy machine.
START_S = 480.0
RANKS_S = 580.0
# All that a rank imports.
_PRELOAD = [
    "megabase.pipeline.zero.strategy",  # first: it sets DeepSpeed up
    "deepspeed.runtime.zero.muon.muon_optimizer",  # and with it torch._inductor
    "matplotlib.pyplot",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "pytorch_lightning",
    "megabase.pipeline.cli",
    "megabase.pipeline.config.load",
    "megabase.pipeline.training.callback",
    "megabase.pipeline.training.module",
    "megabase.pipeline.training.run",
]
_FORKS = multiprocessing.get_context("forkserver")


class Python:
    """`python COMMAND...` as a fork, in a process group of its own; COMMAND as `run_python` takes it.

    Args:
        cwd: its working directory.
        output: a file that gets stdout and stderr; without one, two temporary files get them.
        environment: variables beside those of this process and ENVIRONMENT.
    """

    def __init__(
        self,
        *command: str,
        cwd: Path,
        output: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        _start_fork_server()
        self._directory = tempfile.TemporaryDirectory(prefix="megabase-test-")
        self._stdout, self._stderr = (
            output or Path(self._directory.name) / name for name in ("stdout", "stderr")
        )
        for file in (self._stdout, self._stderr):
            file.touch()
        variables = os.environ | ENVIRONMENT | (environment or {})
        files = (str(self._stdout), str(self._stderr))
        self._process = _FORKS.Process(target=_lead, args=(command, str(cwd), files, variables))
        self._process.start()
        assert self._process.pid
        self.pid: int = self._process.pid
        with suppress(ProcessLookupError):
            while self.poll() is None and os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def stdout(self) -> str:
        """What the group has printed so far on stdout."""
        return self._stdout.read_text(errors="replace")

    def stderr(self) -> str:
        """What the group has printed so far on stderr."""
        return self._stderr.read_text(errors="replace")

    def wait(self, timeout: float = START_S) -> tuple[int, str]:
        """(exit code, stderr); kills the group and fails when it takes longer."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            self.kill()
            pytest.fail(f"the process did not end within {timeout} s:\n{self.stderr()[-4000:]}")
        return code, self.stderr()

    def until(self, condition: Callable[[], bool], timeout: float = START_S) -> None:
        """Wait until `condition` holds; fails when the process ends or time runs out first."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.poll() is not None or time.monotonic() > deadline:
                code = self.poll()
                self.kill()
                pytest.fail(f"the process (code {code}) did not meet the condition:\n{self.stderr()[-4000:]}")
            time.sleep(0.05)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, not to its group."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to every process of the group."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.join()

    def children(self) -> list[int]:
        """Its child processes in the order in which they were started: of a supervisor, the ranks."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(child) for child in path.read_text().split()]


class Job(Python):
    """`megabase ARGUMENTS...`."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._command = arguments[0]
        super().__init__("-m", "megabase.pipeline.cli", *arguments, cwd=cwd)

    def wait(self, timeout: float = START_S) -> tuple[int, str]:
        """As `Python.wait`; also fails if a training has printed on stdout."""
        code, messages = super().wait(timeout)
        if self._command == "train":
            assert self.stdout() == "", (
                f"stdout is for results, and training has none: {self.stdout()[-4000:]}"
            )
        return code, messages


def run_ranks(ranks: int, main: Callable[..., None], *arguments: str) -> tuple[int, str]:
    """Call `main`, a function of a module, in `ranks` processes: (exit code, stderr).

    They exit as the ranks of a training do, see `failure.exit_rank`.
    """
    of_rank = (
        "import traceback\n"
        "from megabase.pipeline import log\n"
        "from megabase.pipeline.ranks.failure import exit_rank\n"
        f"from {main.__module__} import {main.__name__} as main\n"
        "log.set_up()\n"
        f"try: main(*{arguments!r})\n"
        "except BaseException: traceback.print_exc(); exit_rank(1)\n"
        "exit_rank(0)\n"
    )
    supervisor = (
        "import sys\n"
        "from megabase.pipeline import log\n"
        "from megabase.pipeline.ranks.supervisor import supervise\n"
        "from megabase.pipeline.ranks.stop import StopRequest\n"
        "log.set_up()\n"
        f"sys.exit(supervise([sys.executable, '-c', {of_rank!r}], {ranks}, StopRequest(), hint=str))\n"
    )
    return Python("-c", supervisor, cwd=ROOT).wait(RANKS_S)


def run_python(*command: str) -> None:
    """Do what `python COMMAND...` does. COMMAND: `-m MODULE`, `-c PROGRAM` or a file, with arguments."""
    words = [word for word in command if word != "-P"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # preloaded; as in a new interpreter, it runs as __main__
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _start_fork_server() -> None:
    """Start the fork server, unless it runs, with ENVIRONMENT, which libraries read when they are loaded."""
    _FORKS.set_forkserver_preload(_PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def _lead(command: Sequence[str], cwd: str, files: Sequence[str], environment: Mapping[str, str]) -> None:
    """In the forked process: set up what a new process would have, then run `python COMMAND...`."""
    gc.freeze()  # a search for garbage, of which DeepSpeed makes many, takes half a second among all that is imported
    end_with_parent(os.getppid())  # the fork server, which ends with the tests
    os.setsid()
    os.chdir(cwd)
    _set_environment(environment)
    for stream, file in zip((1, 2), files, strict=True):
        output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, stream)
        os.close(output)
    subprocess.Popen = _popen  # type: ignore[assignment, misc]
    run_python(*command)


def _popen(command: Any, **options: Any) -> Any:
    """Replaces `subprocess.Popen`: forks this process if the command is this interpreter."""
    if isinstance(command, list) and command[0] == sys.executable:
        return _ForkedPython(command, **options)
    return _Popen(command, **options)


_Popen = subprocess.Popen


class _ForkedPython:
    """Replaces `subprocess.Popen([sys.executable, ...])`, with the methods that a supervisor calls."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], preexec_fn: Callable[[], None]
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(command[1:], env, preexec_fn)

    @staticmethod
    def _become(command: Sequence[str], env: Mapping[str, str], preexec_fn: Callable[[], None]) -> NoReturn:
        """In the child: run `python COMMAND...` and exit."""
        code = 1
        try:
            preexec_fn()
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)) and number != signal.SIGINT:
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _set_environment(env)
            run_python(*command)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("python", timeout or 0.0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
