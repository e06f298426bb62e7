"""What is read from a run directory: complete, empty, damaged."""

import json
from pathlib import Path

import pytest

from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status
from megabase.pipeline.rundir.view import Size
from megabase.pipeline.slurm.queue import write_jobs
from megabase.pipeline.slurm.seen import Jobs, Seen, find_jobs, look


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run of two jobs, of which the first was started three times and the second once."""
    paths = RunPaths(tmp_path / "hg38")
    for start in ("7.0", "7.1", "7.2", "8.0", "6.0"):
        (paths.logs / f"slurm-{start}").mkdir(parents=True)
    write_jobs(paths.directory, [7, 8])
    paths.environment.write_text('{"slurm": {"SLURM_JOB_ID": "8", "SLURM_JOB_NAME": "hg38"}}')
    paths.config.write_text("trainer:\n  max_steps: 90\n  nodes: 2\n  devices: 4\n")
    paths.slurm_log(7).with_suffix(".json").write_text('{"restarts": 2, "stalls": 0}')
    paths.slurm_log(8).with_suffix(".json").write_text('{"restarts": 0, "stalls": 1}')
    for step in (9, 10):
        (paths.checkpoints / f"step-{step}").mkdir(parents=True)
    paths.metrics.write_text(
        "".join(f'{{"step": {n}, "loss": 1, "bits_per_base": {n}}}\n' for n in range(9_000))
    )
    write_status(paths.directory, "running", 0)
    return paths


def test_a_run(paths: RunPaths) -> None:
    heartbeat = {"rank": 1, "host": "h", "pid": 1, "step": 3, "doing": "x", "beat": 1.0, "written": 2.0}
    for rank in (1, 8):  # rank 8 is of a start with more ranks
        paths.heartbeat(rank).write_text(json.dumps(heartbeat | {"rank": rank}))
    paths.stop.touch()
    jobs = find_jobs(paths.directory)
    assert jobs == Jobs((7, 8), 8, "hg38") and jobs.all == (7, 8)
    seen = look(paths.directory, jobs)
    assert (seen.status, seen.size, seen.checkpoint) == ("running", Size(90, 8), 10)
    assert (seen.figures.step, seen.figures.max_steps) == (8_999, 90)
    assert [each.rank for each in seen.heartbeats] == [1]
    assert (seen.restarts, seen.stalls, seen.stop) == (3, 1, True)
    assert 0 <= seen.now - seen.checkpoint_time < 60 and 0 <= seen.now - seen.status_time < 60


def test_what_is_missing_or_damaged_is_as_if_it_were_not_there(paths: RunPaths) -> None:
    for file in (paths.status, paths.config, paths.environment, paths.job, paths.heartbeat(0), paths.metrics):
        file.write_text('{"torn": [\n')
    damaged, empty = find_jobs(paths.directory), find_jobs(paths.directory / "logs")
    assert damaged == empty == Jobs()
    seen = look(paths.directory, damaged)
    assert (seen.status, seen.size, seen.figures.step, seen.heartbeats) == ("", Size(), 0, ())
    assert seen.checkpoint == 10
    nothing = look(paths.directory / "logs", empty)
    assert nothing == Seen(nothing.directory, figures=nothing.figures, now=nothing.now)


def test_a_job_that_was_submitted_by_hand_is_known_from_its_start(paths: RunPaths) -> None:
    paths.job.unlink()
    assert find_jobs(paths.directory).all == (8,)
    paths.environment.write_text('{"slurm": {}}')
    assert find_jobs(paths.directory).all == ()
