"""The rendezvous of the ranks, and the messages when a rank is missing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabase.pipeline.ranks.supervisor import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_missing_ranks_are_named() -> None:
    program = (
        "from datetime import timedelta\n"
        "from megabase.pipeline import errors, log\n"
        "from megabase.pipeline.ranks import rendezvous\n"
        "log.set_up()\n"
        "rendezvous.MEETING_TIMEOUT = timedelta(seconds=3)\n"
        "try: rendezvous.start()\n"
        "except errors.RunError as error: print('RunError', error)\n"
    )
    ports = {0: free_port(), 1: free_port()}
    began = time.monotonic()
    processes = {
        rank: subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "3", "CUDA_VISIBLE_DEVICES": ""}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank, port in ports.items()
    }
    results, printed = {}, {}
    for rank, process in processes.items():
        try:
            results[rank], printed[rank] = process.communicate(timeout=90)
        finally:
            process.kill()
        assert results[rank].startswith("RunError"), printed[rank]
    assert time.monotonic() - began < 90
    assert f"rank 1, rank 2 of 3 did not connect to 127.0.0.1:{ports[0]} within 0.05 minutes" in results[0]
    assert f"cannot reach the store at 127.0.0.1:{ports[1]} within 0.05 minutes" in results[1]
    # The other ranks print this error themselves, because rank 0 does not have it.
    assert "megabase: rank 1 on" in printed[1]


def test_the_ranks_meet_at_a_port_that_rank_0_chooses(tmp_path: Path) -> None:
    """Rank 1 comes before rank 0."""
    program = (
        "from megabase.pipeline.ranks import rendezvous\n"
        "import os, torch.distributed as dist\n"
        "rendezvous.start()\n"
        "seen = [None, None]\n"
        "dist.all_gather_object(seen, os.environ['MASTER_PORT'])\n"
        "print(seen[0] == seen[1] != '0')"
    )
    processes = []
    for rank in (1, 0):
        variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MEGABASE_MEETING_FILE": str(tmp_path / "meeting.json")}
        environment = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program],
                stdout=subprocess.PIPE,
                text=True,
                env=environment | variables | meeting,
            )
        )
        time.sleep(0.5)
    try:
        assert [process.communicate(timeout=90)[0] for process in processes] == ["True\n"] * 2
    finally:
        for process in processes:
            process.kill()
