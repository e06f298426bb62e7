"""Shared by all tests: real input, prepared shards, an undisturbed training, jobs that end with their test."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.rundir.journal import Row, read
from tests.processes import ENVIRONMENT, START_S, Job

# No deadline for an example: how long it takes depends on what else runs on the machine.
hypothesis.settings.register_profile("megabase", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)  # `make quick`
hypothesis.settings.load_profile("megabase")

DATA = Path(__file__).parent / "data"

STEPS = 40
# Two ranks, two micro batches in a step, dropout, and a constant learning rate, so that runs with different max_steps
# are comparable.
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
    "tracking.system_seconds=1",
    "tracking.report=false",
    "trainer.eval_every_steps=10",
    "trainer.eval_sequences=4",
    "checkpoint.every_steps=5",
    "optim.warmup_steps=5",
    "optim.min_lr=1",
]


def train_settings(shards: Path, root: Path, name: str, *more: str) -> list[str]:
    """CONFIG and KEY=VALUE arguments of a small training run of two ranks."""
    return [f"data.shards={shards}", f"run.root={root}", f"run.name={name}", *SETTINGS, *more]


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """Restores the logger `megabase` after a test, because commands that run in this process set it up."""
    logger = logging.getLogger("megabase")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects no garbage while tests are imported, nor later among what they imported.

    Each such search goes through millions of objects of the libraries: a quarter of the time to import the tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Undoes `gc.freeze`: libraries report what is left when Python ends."""
    gc.unfreeze()


# Groups of pytest-xdist, each in one process, in the order in which they start. Tests on SLURM mostly wait.
GROUPS = ("slurm", "distributed")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests that start ranks in one group, so that they do not run at once, and tests on SLURM in another.

    The groups come first, because they take longest, then slow tests, so that none of them runs alone at the end.
    """

    def place(item: pytest.Item) -> int:
        last = len(GROUPS) + (item.get_closest_marker("slow") is None)
        return next((n for n, name in enumerate(GROUPS) if item.get_closest_marker(name)), last)

    items.sort(key=place)
    for item in items:
        if place(item) < len(GROUPS):
            item.add_marker(pytest.mark.xdist_group(GROUPS[place(item)]))


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


# Credentials of MLflow, which no file and no log of a run may show.
SECRETS = {"MLFLOW_TRACKING_USERNAME": "secret-user-17", "MLFLOW_TRACKING_PASSWORD": "secret-password-17"}


@pytest.fixture(scope="session")
def undisturbed(runs: Path, lambda_shards: Path) -> Path:
    """The run directory of a training that nothing interrupted.

    The real command starts it. Jobs that are compared with it are forks (processes.py).
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "megabase.pipeline.cli",
            "train",
            *train_settings(lambda_shards, runs, "whole"),
        ],
        cwd=runs,
        env=os.environ | ENVIRONMENT | SECRETS,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not any(secret in done.stderr for secret in SECRETS.values())
    return runs / "whole"


@pytest.fixture
def start_job(tmp_path: Path):
    """Starts `megabase` processes, and kills those that still run at the end of the test."""
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
