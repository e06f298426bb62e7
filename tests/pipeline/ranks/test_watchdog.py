"""The watchdog of one rank in its own process: what it writes, and that the process ends for every kind of hang."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

# 0.6 s without a beat is a hang, once a first beat with a step has shown that training has begun.
PROGRAM = """
import ctypes, sys, threading, time
from pathlib import Path
from megabase.pipeline.ranks import watchdog

watchdog.LINGER_S = 0.1
watchdog.HEARTBEAT_S = 0.1
dog = watchdog.Watchdog(Path(sys.argv[1]), 3, {minutes}).start()

def sleeps_forever():
    time.sleep(60)

def holds_the_lock_forever():
    ctypes.PyDLL(None).sleep(60)

def spins_forever():
    while True:
        pass

def works():
    for step in range(20):
        watchdog.beat("training", step)
        time.sleep(0.1)
    dog.stop()

{body}
print("done")
"""


def run(directory: Path, body: str, minutes: float = 0.01) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body, minutes=minutes), str(directory)],
        capture_output=True,
        text=True,
        timeout=40,
    )


def heartbeat(directory: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((directory / "logs" / "rank-3.heartbeat").read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["sleeps_forever", "spins_forever"])
def test_a_hang_writes_stacks_and_ends_the_process(tmp_path: Path, hang: str) -> None:
    began = time.monotonic()
    done = run(tmp_path, f"watchdog.beat('training', 7)\n{hang}()")
    assert time.monotonic() - began < 30
    assert done.returncode == 1, done
    stacks = tmp_path / "logs" / "rank-3.stacks.txt"
    text = stacks.read_text()
    assert "rank 3 on " in text and "(training, step 7)" in text
    assert f"in {hang}" in text
    [line] = done.stderr.splitlines()
    assert str(stacks) in line and "raise trainer.hang_minutes=0.01" in line


@pytest.mark.slow
def test_a_hang_that_holds_the_gil_ends_the_process_as_well(tmp_path: Path) -> None:
    done = run(tmp_path, "watchdog.beat('training', 7)\ntime.sleep(0.3)\nholds_the_lock_forever()")
    assert done.returncode == 1, done
    assert "in holds_the_lock_forever" in (tmp_path / "logs" / "rank-3.stacks.txt").read_text()
    # The thread that writes the first line of the stacks could not run.
    assert (heartbeat(tmp_path)["step"], heartbeat(tmp_path)["doing"]) == (7, "training")


@pytest.mark.slow
def test_the_stacks_of_an_earlier_start_stay(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-3.stacks.txt").write_text("before\n")
    assert run(tmp_path, "watchdog.beat('training', 7)\nsleeps_forever()").returncode == 1
    assert (tmp_path / "logs" / "rank-3.stacks.txt").read_text().startswith("before\n")


@pytest.mark.slow
def test_a_rank_that_beats_leaves_only_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-7")
    before = time.time()
    done = run(tmp_path, "works()", minutes=0.1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank-3.heartbeat"]
    content = heartbeat(tmp_path)
    assert (content["rank"], content["step"], content["doing"]) == (3, 19, "training")
    assert content["host"] == "gpu-7"
    assert isinstance(content["beat"], float) and before - 1 < content["beat"] < time.time() + 1


@pytest.mark.slow
def test_a_slow_start_is_not_a_hang(tmp_path: Path) -> None:
    done = run(tmp_path, "watchdog.beat('building the model')\ntime.sleep(2)\ndog.stop()")
    assert done.returncode == 0, done


@pytest.mark.slow
def test_with_zero_minutes_only_heartbeats_are_written(tmp_path: Path) -> None:
    done = run(tmp_path, "watchdog.beat('training', 7)\ntime.sleep(1)\ndog.stop()", minutes=0)
    assert done.returncode == 0, done
    assert heartbeat(tmp_path)["step"] == 7


@pytest.mark.slow
def test_logs_that_cannot_be_written_send_the_stacks_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    done = run(tmp_path, "watchdog.beat('training', 7)\nsleeps_forever()")
    assert done.returncode == 1, done
    assert "cannot write in" in done.stderr and "in sleeps_forever" in done.stderr
