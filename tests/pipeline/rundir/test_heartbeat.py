"""Heartbeats as another machine reads them: which rank hangs, whatever the clocks and however many ranks."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megabase.pipeline.rundir.heartbeat import (
    PATIENCE_S,
    SILENT_S,
    START_PATIENCE_S,
    Heartbeat,
    clock,
    find_hang,
    read_heartbeats,
    written_since,
)
from megabase.pipeline.rundir.paths import RunPaths

NOW = 10_000.0


def beat(
    rank: int, *, silent: float = 3.0, idle: float = 4.0, step: int = 7, doing: str = "training"
) -> Heartbeat:
    """A heartbeat that was written `silent` seconds ago; the last progress was `idle` seconds ago."""
    return Heartbeat(rank, f"n{rank}", 1, step, doing, NOW - silent, NOW - idle)


def write(run: Path, rank: int, *, at: float, clock_ahead: float = 0.0, idle: float = 1.0) -> None:
    """Write a heartbeat at a time of the file system, by a rank whose own clock is ahead."""
    file = RunPaths(run).heartbeat(rank)
    file.parent.mkdir(exist_ok=True)
    written = at + clock_ahead
    content = {
        "rank": rank,
        "host": f"n{rank}",
        "pid": 1,
        "step": 3,
        "doing": "training",
        "beat": written - idle,
    }
    file.write_text(f"{json.dumps(content | {'written': written}):<511}\n")
    os.utime(file, (at, at))


@pytest.mark.parametrize(
    ("beats", "ranks", "text"),
    [
        ([beat(0), beat(1, silent=SILENT_S)], None, ""),
        (
            [beat(0), beat(1, silent=150, idle=151), beat(2)],
            [1],
            "rank 1 on n1 has written no heartbeat for 2 min: the process or the node is frozen",
        ),
        (
            [beat(0), *(beat(rank, silent=100) for rank in range(1, 9))],
            list(range(1, 9)),
            "rank 1 on n1, rank 2 on n2, rank 3 on n3 and 5 more have written no heartbeat for 100 s",
        ),
        # All watchdogs write: the rank that stopped first is the one that the others wait for.
        ([beat(0, idle=PATIENCE_S - 1), beat(1, idle=PATIENCE_S + 60)], None, ""),
        (
            [beat(0, idle=400), beat(1, idle=430, doing="evaluating"), beat(2, idle=402)],
            [1],
            "no rank has made progress for 7 min: the others wait for rank 1 on n1, which stopped first"
            " (evaluating, step 7)",
        ),
        ([beat(0, idle=400), beat(1, idle=400, step=6)], [1], "wait for rank 1 on n1"),
        (
            [beat(0, idle=400), beat(1, idle=401)],
            [],
            "no rank has made progress for 7 min (training, step 7)",
        ),
        # Before the first step kernels are compiled.
        ([beat(0, idle=400, step=0), beat(1, idle=900, step=0)], None, ""),
        ([beat(0, idle=START_PATIENCE_S + 1, step=0)], [], "no rank has made progress for 30 min"),
        # All of them are silent.
        ([beat(0, silent=200), beat(1, silent=190)], [], "no rank has written a heartbeat for 3 min"),
        ([beat(0, silent=200)], [0], "rank 0 on n0 has written no heartbeat for 3 min"),
        ([], None, ""),
    ],
)
def test_which_rank_hangs(beats: list[Heartbeat], ranks: list[int] | None, text: str) -> None:
    hang = find_hang(beats, NOW, PATIENCE_S)
    assert (hang and [each.rank for each in hang.ranks]) == ranks
    assert hang is None or text in hang.text
    # More patience changes nothing for a rank that writes no heartbeats.
    patient = find_hang(beats, NOW, 2 * START_PATIENCE_S)
    assert patient == (None if hang and "no rank has made progress" in hang.text else hang)


def test_clocks_of_nodes_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, 0, at=NOW, clock_ahead=3600, idle=2)
    write(tmp_path, 1, at=NOW - 5, clock_ahead=-7200, idle=4)
    first, second = read_heartbeats(tmp_path)
    assert (first.written, first.progress) == (NOW, NOW - 2)
    assert (second.written, second.progress, second.node) == (NOW - 5, NOW - 9, "n1")


def test_files_of_ranks_that_the_run_no_longer_has_and_bad_files_are_left_out(tmp_path: Path) -> None:
    for rank in range(40):
        write(tmp_path, rank, at=NOW - rank)
    RunPaths(tmp_path).heartbeat(3).write_text("{half")
    RunPaths(tmp_path).heartbeat(4).write_text('{"rank": 4}')
    (tmp_path / "logs" / "rank-x.heartbeat").touch()
    assert [each.rank for each in read_heartbeats(tmp_path, 6)] == [0, 1, 2, 5]
    assert [each.rank for each in read_heartbeats(tmp_path)] == [0, 1, 2, *range(5, 40)]
    assert [each.rank for each in written_since(read_heartbeats(tmp_path, 6), NOW - 2)] == [0, 1, 2]
    assert read_heartbeats(tmp_path / "nowhere") == []


def test_a_clock_that_the_heartbeats_contradict_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    true = time.time()
    monkeypatch.setattr(time, "time", lambda: true + 500)
    assert clock(tmp_path, None) == true + 500
    assert clock(tmp_path, true + 490) == true + 500
    for newest in (true, true + 600):
        assert abs(clock(tmp_path, newest) - true) < 60
    assert list(tmp_path.iterdir()) == []
    assert clock(tmp_path / "nowhere", true) == true + 500


def test_a_process_that_has_ended_is_known_on_its_machine() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = replace(beat(0), node=platform.node(), pid=ended.pid)
    assert here.process_is_gone()
    assert not replace(here, pid=os.getpid()).process_is_gone()
    assert not replace(here, node="elsewhere").process_is_gone()
