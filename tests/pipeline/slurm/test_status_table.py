"""Runs as a table and as JSON, whose names are a promise."""

import json
import re
from dataclasses import replace
from pathlib import Path

from megabase.pipeline.rundir.view import Size
from megabase.pipeline.slurm.queue import Job
from megabase.pipeline.slurm.seen import Jobs, Seen
from megabase.pipeline.slurm.status import Report, judge
from megabase.pipeline.slurm.status_table import as_json, as_table, details
from megabase.pipeline.tables import as_text
from tests.pipeline.slurm.test_status import NO_SLURM, NOW, beats, queue, seen


def training() -> Report:
    run = replace(
        seen("running", 3, 200),
        checkpoint=40,
        checkpoint_time=NOW - 180,
        restarts=2,
        stalls=1,
        size=Size(100, 2),
    )
    for row in (
        {"step": 50, "loss": 1.3, "bits_per_base": 1.9},
        {"step": 40, "time": NOW - 20, "tokens_per_second": 4e6},
        {"step": 50, "time": NOW, "tokens_per_second": 5e6},
    ):
        run.figures.add(row)
    run.figures.max_steps = 100
    return judge(run, queue("RUNNING", "PENDING"))


def waiting() -> Report:
    job = Job(9, "PENDING", "Dependency", "", None, "phage", "/runs/phage/submit.sbatch")
    return Report(Seen(Path("runs/phage"), Jobs((9, 10)), now=NOW), "waiting", "", job, 1)


def test_table() -> None:
    healthy = replace(training(), state="running", heartbeats=beats(3, 9))
    head, *rows = as_text(as_table([training(), healthy, waiting()])).splitlines()
    assert head.split() == [
        "run",
        "state",
        "step",
        "bits/base",
        "tokens/s",
        "left",
        "checkpoint",
        "restarts",
        "heartbeats",
        "SLURM",
    ]
    checkpoint, restarts, job = "40, 3 min ago", "2, 1 stall", "7 RUNNING n[1-2]"
    assert [re.split(r"\s{2,}", row) for row in rows] == [
        ["hg38", "hanging", "50 of 100", "1.9000", checkpoint, restarts, "2 of 2, 3 s to 3 min", job],
        [
            "hg38",
            "running",
            "50 of 100",
            "1.9000",
            "5,000,000",
            "0:01:40",
            checkpoint,
            restarts,
            "2 of 2, 3 s to 9 s",
            job,
        ],
        ["phage", "waiting", "0", "9 PENDING (Dependency), 1 more"],
    ]
    assert details([waiting(), training()]) == [
        "hg38: rank 1 on n2 has written no heartbeat for 3 min: the process or the node is frozen"
    ]


def test_a_thousand_ranks_are_one_short_cell() -> None:
    run = judge(replace(seen("running"), heartbeats=beats(*range(1024)), size=Size(100, 1024)), NO_SLURM)
    cell = as_text(as_table([run])).splitlines()[1]
    assert "1024 of 1024, 0 s to 17 min" in cell
    assert len(details([run])[0]) < 250


def test_json_names() -> None:
    first, second = json.loads(as_json([training(), waiting()]))
    assert first == {
        "run": "hg38",
        "directory": str(Path("runs/hg38").absolute()),
        "state": "hanging",
        "detail": details([training()])[0].removeprefix("hg38: "),
        "step": 50,
        "max_steps": 100,
        "bits_per_base": 1.9,
        "tokens_per_second": None,
        "seconds_left": None,
        "checkpoint_step": 40,
        "checkpoint_age": 180.0,
        "restarts": 2,
        "stalls": 1,
        "stop_requested": False,
        "ranks": 2,
        "heartbeats": 2,
        "youngest_heartbeat": 3.0,
        "oldest_heartbeat": 200.0,
        "hanging": [{"rank": 1, "node": "n2", "step": 5, "doing": "training"}],
        "job": 7,
        "job_state": "RUNNING",
        "job_reason": None,
        "nodes": "n[1-2]",
        "jobs_left": 0,
    }
    assert set(first) == set(second)
    assert (second["job"], second["job_reason"], second["nodes"], second["jobs_left"]) == (
        9,
        "Dependency",
        None,
        1,
    )
    assert (second["checkpoint_step"], second["bits_per_base"]) == (None, None)


def test_a_loss_that_is_not_finite_is_null_in_json() -> None:
    run = seen("running", 1)
    run.figures.add({"step": 3, "loss": "nan", "bits_per_base": "nan"})
    report = judge(run, NO_SLURM)
    assert json.loads(as_json([report]), parse_constant=lambda name: name)[0]["bits_per_base"] is None
    assert " nan " in as_text(as_table([report]))
