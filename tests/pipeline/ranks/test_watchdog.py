"""The watchdog of one rank, in a process of its own: what it writes, and that the process ends, however it hangs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Silence is a hang after 0.6 s, and training has begun: the first beat with a step says so.
PROGRAM = """
import ctypes, sys, threading, time
from pathlib import Path
from megabase.pipeline.ranks import watchdog

watchdog.LINGER_S = 0.1
watchdog.HEARTBEAT_S = 0.1
dog = watchdog.Watchdog(Path(sys.argv[1]), 3, {minutes}).start()

def rests_forever():
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


@pytest.mark.parametrize("hang", ["rests_forever", "spins_forever"])
def test_a_hang_is_written_down_and_ends_the_process(tmp_path: Path, hang: str) -> None:
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


def test_a_hang_in_code_that_holds_the_lock_of_python_is_no_exception(tmp_path: Path) -> None:
    done = run(tmp_path, "watchdog.beat('training', 7)\ntime.sleep(0.3)\nholds_the_lock_forever()")
    assert done.returncode == 1, done
    assert "in holds_the_lock_forever" in (tmp_path / "logs" / "rank-3.stacks.txt").read_text()
    # What the head of the stacks cannot say now.
    assert (heartbeat(tmp_path)["step"], heartbeat(tmp_path)["doing"]) == (7, "training")


def test_the_stacks_of_an_earlier_start_stay(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-3.stacks.txt").write_text("before\n")
    assert run(tmp_path, "watchdog.beat('training', 7)\nrests_forever()").returncode == 1
    assert (tmp_path / "logs" / "rank-3.stacks.txt").read_text().startswith("before\n")


def test_who_beats_lives_and_leaves_a_heartbeat_only(tmp_path: Path) -> None:
    before = time.time()
    done = run(tmp_path, "works()", minutes=0.1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank-3.heartbeat"]
    heart = heartbeat(tmp_path)
    assert (heart["rank"], heart["step"], heart["doing"]) == (3, 19, "training")
    assert isinstance(heart["beat"], float) and before - 1 < heart["beat"] < time.time() + 1


def test_silence_before_the_first_micro_batch_is_a_slow_start(tmp_path: Path) -> None:
    done = run(tmp_path, "watchdog.beat('building the model')\ntime.sleep(2)\ndog.stop()")
    assert done.returncode == 0, done


def test_zero_minutes_switch_it_off_but_for_the_heartbeat(tmp_path: Path) -> None:
    done = run(tmp_path, "watchdog.beat('training', 7)\ntime.sleep(1)\ndog.stop()", minutes=0)
    assert done.returncode == 0, done
    assert heartbeat(tmp_path)["step"] == 7


def test_logs_that_cannot_be_written_send_the_stacks_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    done = run(tmp_path, "watchdog.beat('training', 7)\nrests_forever()")
    assert done.returncode == 1, done
    assert "cannot write in" in done.stderr and "in rests_forever" in done.stderr
