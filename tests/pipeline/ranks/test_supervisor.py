"""Ranks of one machine as processes: they end together, and the exit code says why."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megabase.pipeline.ranks import supervisor
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.ranks.supervisor import supervise


def python(program: str, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{program}",
        *arguments,
    ]


def test_every_rank_gets_torchruns_variables(tmp_path: Path) -> None:
    program = (
        "names = ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'GROUP_RANK')\n"
        "open(f'{sys.argv[1]}/{rank}', 'w').write(' '.join(os.environ[name] for name in names))"
    )
    assert supervise(python(program, str(tmp_path)), 2, StopRequest(), hint=str) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["2 0 127.0.0.1 0", "2 1 127.0.0.1 0"]


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 0.2)
    began = time.monotonic()
    assert supervise(python("sys.exit(7) if rank else time.sleep(60)"), 2, StopRequest(), hint=str) == 7
    assert time.monotonic() - began < 30


def test_a_rank_that_a_signal_ends_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 0.2)
    program = "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)"
    assert supervise(python(program), 2, StopRequest(), hint=lambda: "nothing was written") == 1
    assert "rank 1 was ended by SIGKILL; nothing was written\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "received"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGUSR2")]
)
def test_a_stop_request_is_passed_on_to_rank_0(tmp_path: Path, sent: str, received: str) -> None:
    """The ranks start with these signals blocked, so that none is lost before they listen."""
    program = (
        "if rank: sys.exit()\n"
        "signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}\n"
        "assert signals <= signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "open(sys.argv[1], 'w').write(signal.Signals(signal.sigwait(signals)).name)"
    )
    stop = StopRequest()
    stop._handle(signal.Signals[sent], None)
    assert supervise(python(program, str(tmp_path / "signal")), 2, stop, hint=str) == 0
    assert (tmp_path / "signal").read_text() == received
    assert not {signal.SIGTERM, signal.SIGUSR1} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


class Interrupted(StopRequest):
    """Raises KeyboardInterrupt, as a second Ctrl-C does, once files exist."""

    def __init__(self, *files: Path) -> None:
        super().__init__()
        self.files = files

    def __bool__(self) -> bool:
        if all(file.exists() for file in self.files):
            raise KeyboardInterrupt
        return False


@pytest.mark.slow
def test_an_interrupt_gives_the_ranks_time_to_write_their_status_and_then_kills_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 5.0)
    # Rank 1 does not end by itself.
    program = (
        "path = f'{sys.argv[1]}/{rank}'\n"
        "def interrupted(*_):\n"
        "    open(f'{path}.status', 'w').close()\n"
        "    if not rank: sys.exit(130)\n"
        "signal.signal(signal.SIGINT, interrupted)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n"
        "open(path, 'w').write(str(os.getpid()))\n"
        "while True: time.sleep(0.1)"
    )
    files = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(KeyboardInterrupt):
        supervise(python(program, str(tmp_path)), 2, Interrupted(*files), hint=str)
    assert (tmp_path / "0.status").exists() and (tmp_path / "1.status").exists()
    assert not any(Path(f"/proc/{file.read_text()}").exists() for file in files)


def test_the_command_of_a_rank_runs_this_interpreter() -> None:
    command = supervisor.megabase_command("train", "a.yaml")
    assert command[0] == sys.executable and command[-4:] == ["-m", "megabase.pipeline.cli", "train", "a.yaml"]
    assert os.path.isabs(command[0])  # noqa: PTH117
