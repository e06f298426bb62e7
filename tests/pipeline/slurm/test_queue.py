"""The jobs of a run in its directory, and what SLURM's programs print about them."""

from pathlib import Path

import pytest

from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.slurm.queue import read_jobs, write_jobs


def test_jobs_are_kept_in_their_order(tmp_path: Path) -> None:
    write_jobs(tmp_path, [12, 9, 30])
    assert read_jobs(tmp_path) == [12, 9, 30]


@pytest.mark.parametrize(
    ("content", "jobs"),
    [
        ('{"job": 7}', [7]),  # as versions before chains wrote it
        ('{"jobs": [7, "x"]}', []),
        ('{"jobs": 7}', []),
        ('{"job": null}', []),
        ("{torn", []),
        ("{}", []),
    ],
)
def test_other_contents(tmp_path: Path, content: str, jobs: list[int]) -> None:
    RunPaths(tmp_path).job.write_text(content)
    assert read_jobs(tmp_path) == jobs


def test_a_run_that_was_not_submitted_has_no_jobs(tmp_path: Path) -> None:
    assert read_jobs(tmp_path) == []
