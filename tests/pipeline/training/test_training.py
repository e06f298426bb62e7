"""Real trainings of two DeepSpeed ranks: killed, stopped and resumed, a run gives the same bytes."""

import json
import operator
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.planning import plan_windows
from megabase.datamodules.order.training_order import Order
from megabase.pipeline.inference.scoring import bits
from megabase.pipeline.ranks.agreement import hash_samples
from megabase.pipeline.ranks.stop import EXIT_AGAIN
from megabase.pipeline.rundir.journal import read
from tests.conftest import SECRETS, STEPS, train_settings, training_rows
from tests.processes import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_the_run_directory_describes_itself(undisturbed: Path, lambda_shards: Path) -> None:
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "performance.jsonl",
        "checkpoints",
        "mlflow.json",
        "dataset.json",
    } <= {path.name for path in undisturbed.iterdir()}
    assert json.loads((undisturbed / "status.json").read_text()) == {"state": "finished", "step": STEPS}
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    (system,) = (undisturbed / "logs").glob("system-*.jsonl")  # two ranks, one node
    assert [json.loads(line)["sample"] for line in system.read_text().splitlines()][:2] == [0, 1]
    rows = training_rows(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["bits_per_base"] == bits(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_no_file_of_a_run_shows_the_credentials_of_mlflow(undisturbed: Path) -> None:
    database = Path(json.loads((undisturbed / "mlflow.json").read_text())["uri"].removeprefix("sqlite:///"))
    files = [path for path in undisturbed.rglob("*") if path.is_file() and path.suffix != ".pt"]
    assert len(files) > 5
    for path in (*files, database):
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


def test_the_journal_proves_what_every_rank_consumed(undisturbed: Path, lambda_shards: Path) -> None:
    index = ShardIndex.open(lambda_shards)
    windows = len(plan_windows(index.segments, "train", 512, 0.5))
    for row in training_rows(undisturbed):
        ids = Order(1, (0, windows)).of_step(row["step"] - 1, 8)[0].tolist()
        assert int(row["samples"], 16) == hash_samples(ids) % 2**64


def test_rows_of_evaluations_have_the_markov_models(undisturbed: Path) -> None:
    rows = [row for row in read(undisturbed / "metrics.jsonl") if "valid_loss" in row]
    assert [row["step"] for row in rows] == [10, 20, 30, STEPS]
    for row in rows:
        assert row["valid_bits_per_base"] == bits(row["valid_loss"])
        assert row["valid_bases"] == 4 * 512
        assert 1.9 < row["markov_0_bits_per_base"] == rows[0]["markov_0_bits_per_base"] < 2.05
        assert ("full_valid_loss" in row) == (row["step"] == STEPS)
        # 8 copies of 64 bases, 40 of which are scored. A model of 40 steps has no recall yet.
        assert abs(row["valid_copy_bits_per_base"] - row["valid_bits_per_base"]) < 0.2
        assert abs(row["valid_recall_bits"]) < 0.1
        # Every base is in one of the bins of positions; lambda phage has no lower case.
        starts = [0, 16, 32, 64, 128, 256]
        bins = [row[f"valid_from_{start}_bits_per_base"] for start in starts]
        weights = [16, 16, 32, 64, 128, 256]
        mean = sum(map(operator.mul, bins, weights)) / 512
        assert mean == pytest.approx(row["valid_bits_per_base"], rel=1e-5)
        assert not any("case" in name for name in row)
    hashing = [row for row in read(undisturbed / "performance.jsonl") if "lsh_1_balance" in row]
    assert [row["step"] for row in hashing] == [10, 20, 30, STEPS]
    assert all(0 < row["lsh_1_balance"] <= 1 and 0 <= row["lsh_1_unmatched"] < 0.5 for row in hashing)
    assert all(0 < row["rank_memory_bytes_least"] <= row["rank_memory_bytes_most"] for row in hashing)
    assert all(1e-6 < row["update_ratio"] < 0.1 for row in hashing)
    # The end of the run has both: the windows of every evaluation, and the whole split with Markov models of its own.
    assert rows[-1]["full_valid_bases"] == 4850 // 512 * 512
    assert rows[-1]["full_valid_loss"] != rows[-1]["valid_loss"]
    assert rows[-1]["full_markov_0_bits_per_base"] != rows[-1]["markov_0_bits_per_base"]


@pytest.fixture(scope="module")
def disturbed(runs: Path, lambda_shards: Path) -> Path:
    """The run directory of the same training, killed at one step, stopped at another, and resumed each time."""

    def start_job(*arguments: str) -> Job:
        return Job(*arguments, cwd=runs)

    settings = train_settings(lambda_shards, runs, "disturbed")
    run = runs / "disturbed"

    killed = start_job("train", *settings)
    killed.until(lambda: len(training_rows(run)) >= 8)
    killed.kill()
    killed.wait()
    at = len(training_rows(run))
    assert 8 <= at < STEPS

    stopped = start_job("train", *settings, "trainer.max_steps=100000")
    stopped.until(lambda: len(training_rows(run)) > at + 1)
    stopped.send_signal(signal.SIGUSR1)
    code, output = stopped.wait()
    assert code == EXIT_AGAIN, output
    assert "resuming disturbed from" in output
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "again"
    assert (run / "checkpoints" / f"step-{status['step']}").is_dir()

    # The last start has a callback of the user's as well, from the working directory.
    (runs / "probe.py").write_text(PROBE)
    callbacks = "trainer.callbacks=[{class: probe.Probe, arguments: {file: probe.json}}]"
    code, output = start_job("train", *settings, callbacks).wait()
    assert code == 0, output
    assert f"step-{status['step']}" in output
    assert "class: probe.Probe" in (run / "config.yaml").read_text()

    return run


# Notes on rank 0 what a user's callback sees.
PROBE = """
import json
import pathlib
import pytorch_lightning as pl


class Probe(pl.Callback):
    def __init__(self, file):
        self.file, self.steps, self.valid = pathlib.Path(file), {}, {}

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 0 and "train/loss" in trainer.callback_metrics:
            self.steps.setdefault(trainer.global_step, trainer.callback_metrics["train/loss"].item())

    def on_validation_end(self, trainer, module):
        self.valid[trainer.global_step] = trainer.callback_metrics["valid/bits_per_base"].item()

    def on_train_end(self, trainer, module):
        if trainer.global_rank == 0:
            self.file.write_text(json.dumps([self.steps, self.valid]))
"""


def test_a_callback_of_the_user_sees_what_the_journal_has(disturbed: Path, runs: Path) -> None:
    steps, valid = json.loads((runs / "probe.json").read_text())
    losses = {row["step"]: row["loss"] for row in training_rows(disturbed)}
    steps.pop(min(steps, key=int))  # at its first micro batch this start had written no row yet
    # What was written when the step before ended: all but its own row, which is written at once where it is saved.
    written = {int(step): int(step) - (1 if int(step) % 5 == 1 else 2) for step in steps}
    assert {int(step): loss for step, loss in steps.items()} == {
        step: pytest.approx(losses[last]) for step, last in written.items()
    }
    assert len(steps) > 3
    rows = read(disturbed / "metrics.jsonl", having="valid_loss")
    evaluated = {str(row["step"]): row["valid_bits_per_base"] for row in rows}
    assert valid == {step: pytest.approx(evaluated[step]) for step in valid} and str(STEPS) in valid


def test_killed_stopped_and_resumed_gives_the_same_bytes(undisturbed: Path, disturbed: Path) -> None:
    assert (disturbed / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_once_finished_the_same_command_says_so_and_changes_nothing(
    disturbed: Path, runs: Path, lambda_shards: Path, start_job
) -> None:
    before = {path: path.stat().st_mtime_ns for path in disturbed.rglob("*.jsonl")}
    code, output = start_job("train", *train_settings(lambda_shards, runs, "disturbed")).wait()
    assert code == 0 and "is finished" in output
    assert before == {path: path.stat().st_mtime_ns for path in disturbed.rglob("*.jsonl")}


def test_one_mlflow_run_with_continuous_steps_across_the_kill(disturbed: Path) -> None:
    known = json.loads((disturbed / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=known["uri"])
    experiment = client.get_experiment_by_name("megabase")
    found = [
        run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "disturbed"
    ]
    assert [run.info.run_id for run in found] == [known["run_id"]]
    assert found[0].info.status == "FINISHED"
    history = client.get_metric_history(known["run_id"], "train/loss")
    rows = training_rows(disturbed)
    assert [(point.step, point.value) for point in sorted(history, key=lambda p: p.step)] == [
        (row["step"], row["loss"]) for row in rows
    ]
    # Each point has the time of its step, also of the steps that were trained again.
    times = [point.timestamp for point in sorted(history, key=lambda p: p.step)]
    assert times == sorted(times) and len(set(times)) > STEPS // 2
    assert found[0].data.params["model.dim"] == "32" and not any(
        "markov" in name for name in found[0].data.metrics
    )
    assert {each.tags[0].value for each in found[0].inputs.dataset_inputs} == {"train", "valid"}


def test_a_second_job_is_refused_and_a_signal_stops_a_run_that_saves_at_every_step(
    runs: Path, lambda_shards: Path, start_job
) -> None:
    # A checkpoint and an evaluation after every step, and reader processes that get the signal as well.
    pace = [
        "checkpoint.every_steps=1",
        "trainer.eval_every_steps=1",
        "data.workers=2",
    ]
    settings = train_settings(
        lambda_shards, runs, "locked", "trainer.max_steps=100000", "tracking.enabled=false", *pace
    )
    first = start_job("train", *settings)
    first.until(lambda: len(training_rows(runs / "locked")) >= 1)
    code, output = start_job("train", *settings).wait()
    assert code == 2 and "another job is training" in output
    # Signals to every process of the job, twice: they stop it as one signal to one process does.
    for _ in range(2):
        os.killpg(first.pid, signal.SIGTERM)
    code, output = first.wait()
    assert code == EXIT_AGAIN, output
    assert "stopping: SIGTERM" in output
    newest = max(int(path.name[5:]) for path in (runs / "locked" / "checkpoints").glob("step-*"))
    assert f"run it again to resume from step {newest}" in output


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(
    runs: Path, lambda_shards: Path, start_job
) -> None:
    wild = [
        "optim.lr=1e30",
        "optim.clip=0",
        "trainer.devices=1",
        "data.micro_batch=8",
        "tracking.enabled=false",
    ]
    code, output = start_job("train", *train_settings(lambda_shards, runs, "wild", *wild)).wait()
    assert code == 1, output
    assert "megabase: the loss of step" in output and "stopped before a checkpoint" in output
    assert list((runs / "wild" / "checkpoints").iterdir()) == []


def test_a_run_prints_why_it_ends_before_it_waits_for_mlflow(
    runs: Path, lambda_shards: Path, start_job
) -> None:
    """The server never answers. Rank 0 must give up before the supervisor kills it, 10 s after the other rank exits."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        uri = f"tracking.uri=http://127.0.0.1:{hole.getsockname()[1]}"
        wild = ["optim.lr=1e30", "optim.clip=0", uri]
        code, output = start_job("train", *train_settings(lambda_shards, runs, "unanswered", *wild)).wait()
    assert code == 1, output
    assert output.count("megabase: the loss of step") == 1 and "ended by SIGKILL" not in output
    assert json.loads((runs / "unanswered" / "status.json").read_text())["state"] == "failed"


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    undisturbed: Path, runs: Path, lambda_shards: Path, start_job
) -> None:
    run = runs / "purged"
    shutil.copytree(undisturbed, run, ignore=shutil.ignore_patterns("step-*"))
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "status.json")}
    code, output = start_job("train", *train_settings(lambda_shards, runs, "purged")).wait()
    assert code == 2 and f"says that the run wrote one of step {STEPS}: put them back" in output, output
    assert before == {name: (run / name).read_bytes() for name in before}


def test_losses_follow_the_golden_curve(undisturbed: Path) -> None:
    """Numerics must not change by accident. Renew the file with the run's own values in a commit that says why."""
    golden = json.loads((Path(__file__).parents[2] / "golden" / "lambda.json").read_text())
    assert [row["loss"] for row in training_rows(undisturbed)] == pytest.approx(golden, rel=2e-3)


def test_a_rank_that_dies_takes_the_job_down(runs: Path, lambda_shards: Path, start_job) -> None:
    settings = train_settings(
        lambda_shards, runs, "orphan", "trainer.max_steps=100000", "tracking.enabled=false"
    )
    job = start_job("train", *settings)
    job.until(lambda: len(training_rows(runs / "orphan")) >= 1)
    children = job.children()
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    code, output = job.wait()
    assert code == 1 and "rank 1 was ended by SIGKILL" in output
    assert "Traceback" not in output  # rank 0, whose connection broke, prints none
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
