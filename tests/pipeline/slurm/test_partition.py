"""Partitions: what sinfo prints, and which jobs a partition will never start."""

from pathlib import Path

import pytest

from megabase.pipeline.errors import UserError
from megabase.pipeline.slurm import partition
from megabase.pipeline.slurm.partition import Partition, check_partition, parse, partitions

DAY = 86400
PRINTED = """\
gpu*|up|1-00:00:00|3
gpu*|up|1-00:00:00|1
long|up|infinite|2
short|down|30:00|16
"""
CLUSTER = parse(PRINTED)


def call(*options: str) -> list[str]:
    return ["sbatch", *options, "/runs/a/submit.sbatch", "/runs/a/submit.yaml"]


def test_what_sinfo_prints() -> None:
    assert [
        Partition("gpu", True, True, DAY, 4),
        Partition("long", False, True, None, 2),
        Partition("short", False, False, 1800, 16),
    ] == CLUSTER
    assert parse("Welcome to the machine\n\ngpu|up|n/a|1\n") == [Partition("gpu", False, True, None, 1)]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "gpu: 4 nodes, time limit 24:00:00"),
        (["--nodes=4", "--time=24:00:00"], "gpu: 4 nodes, time limit 24:00:00"),
        (["--partition=long", "--time=99:00:00"], "long: 2 nodes, no time limit"),
        (["--partition=gpu,long", "--time=99:00:00"], "long: 2 nodes, no time limit"),
        (["--partition=gpu", "--partition=long"], "long: 2 nodes, no time limit"),
        (["--time=99:00:00", "--qos=long"], "gpu: 4 nodes, time limit 24:00:00"),
        (
            ["--partition=short"],
            "short: 16 nodes, time limit 00:30:00; it is not up now: the job waits until it is",
        ),
        (["--partition=none", "--clusters=other"], "not checked: the job is for another cluster"),
    ],
)
def test_a_job_that_a_partition_takes(options: list[str], found: str) -> None:
    assert check_partition(call(*options), CLUSTER) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--partition=gpux"],
            "slurm.partition=gpux: the cluster has no partition gpux: choose one of gpu, long, short",
        ),
        (["--partition=gpu,x"], "slurm.partition=gpu,x: the cluster has no partition x"),
        (["--nodes=5"], "trainer.nodes=5: partition gpu has 4: take fewer, or another slurm.partition"),
        (["--time=24:00:01"], "slurm.time=24:00:01: partition gpu allows 24:00:00: lower slurm.time"),
        (["--partition=gpu,long", "--nodes=5"], "partition gpu has 4"),
    ],
)
def test_a_job_that_would_never_start(options: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_partition(call(*options), CLUSTER)
    assert str(error.value).startswith(message) or message in str(error.value)


def test_no_default_partition() -> None:
    with pytest.raises(UserError, match="the cluster has no default: choose one of long, short"):
        check_partition(call(), CLUSTER[1:])


@pytest.mark.parametrize("body", ["exit 1", "sleep 60", None])
def test_a_slurm_that_does_not_answer(
    body: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if body is not None:
        (tmp_path / "sinfo").write_text(
            f"#!/bin/bash\nexec {body}\n" if "sleep" in body else f"#!/bin/bash\n{body}\n"
        )
        (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if body else str(tmp_path))
    monkeypatch.setattr(partition, "TIMEOUT_S", 0.2)
    assert partitions() == []
    assert check_partition(call(), []) == "not checked: sinfo does not answer"


def test_sinfo_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\n[ \"$4\" = '' ] && cat <<'E'\n{PRINTED}E\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert partitions() == CLUSTER
