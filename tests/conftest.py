"""Shared by all tests: real input, prepared shards, and `megabase` as a process that cannot outlive its test."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.rundir.journal import Row, read

# How long an example takes is no property of the code: machines are noisy.
hypothesis.settings.register_profile("megabase", deadline=None)
hypothesis.settings.load_profile("megabase")

DATA = Path(__file__).parent / "data"
# A process of two ranks imports torch, Lightning and DeepSpeed twice: about 20 s on two busy cores.
START_S = 240.0

STEPS = 40
# Two ranks, two micro batches to a step, dropout, a constant rate (so that a run may stop before a later max_steps).
SETTINGS = [
    "data.length=512",
    "data.global_batch=8",
    "data.micro_batch=2",
    "model.dim=32",
    "model.depth=2",
    "model.dropout=0.1",
    "model.lsh.rounds=2",
    "model.lsh.chunk_length=16",
    "model.local.window=32",
    "trainer.devices=2",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_steps=1",
    "trainer.eval_every_steps=10",
    "checkpoint.every_steps=5",
    "optim.warmup_steps=5",
    "optim.min_lr=1",
]


def train_settings(shards: Path, root: Path, name: str, *more: str) -> list[str]:
    """CONFIG and KEY=VALUE arguments of a small training run of two ranks."""
    return [f"data.shards={shards}", f"run.root={root}", f"run.name={name}", *SETTINGS, *more]


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """A test that runs a command in this process leaves the logger `megabase` as it was."""
    logger = logging.getLogger("megabase")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def lambda_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The genome of phage lambda (48,502 bases) as shards; the last 10% are for validation."""
    output = tmp_path_factory.mktemp("lambda") / "shards"
    prepare([DATA / "lambda_phage.fna.gz"], output, valid="0.1", progress=False)
    return output


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `run.root`."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def undisturbed(runs: Path, lambda_shards: Path) -> Path:
    """The run directory of a training that nothing interrupted."""
    code, output = Job("train", *train_settings(lambda_shards, runs, "whole"), cwd=runs).wait()
    assert code == 0, output
    return runs / "whole"


class Job:
    """`megabase ...` in a process group of its own."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.command = arguments[0]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megabase.pipeline.cli", *arguments],
            cwd=cwd,
            # Two ranks need two GPUs or none.
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, timeout: float = START_S) -> tuple[int, str]:
        """(exit code, stderr); kills the group and fails when it takes longer, or when training prints on stdout."""
        try:
            stdout, messages = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            _, messages = self.process.communicate()
            pytest.fail(f"megabase did not end within {timeout} s:\n{messages[-4000:]}")
        if self.command == "train":
            assert stdout == "", f"stdout is for results, and training has none: {stdout[-4000:]}"
        return self.process.returncode, messages

    def kill(self) -> None:
        """SIGKILL to every process of the job."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def ranks(self) -> list[int]:
        """The processes that train, in the order of ranks."""
        parent = self.process.pid
        return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]

    def until(self, condition: Callable[[], bool], timeout: float = START_S) -> None:
        """Wait until `condition` holds; fails when the job ends or time runs out first."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                code = self.process.poll()
                self.kill()
                _, messages = self.process.communicate()
                pytest.fail(f"the job (code {code}) did not come so far:\n{messages[-4000:]}")
            time.sleep(0.05)


@pytest.fixture
def start_job(tmp_path: Path):
    """Start `megabase` processes; whatever still runs at the end of the test is killed."""
    jobs: list[Job] = []

    def start(*arguments: str, cwd: Path = tmp_path) -> Job:
        jobs.append(Job(*arguments, cwd=cwd))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def training_rows(run: Path) -> list[Row]:
    """The training rows of a run's journal."""
    return [row for row in read(run / "metrics.jsonl") if "loss" in row]
