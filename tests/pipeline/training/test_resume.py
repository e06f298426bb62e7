"""Resuming: bit for bit on as many ranks, within rounding on others; in every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megabase.pipeline.checkpoint.manifest import list_checkpoints, step_of
from megabase.pipeline.rundir.journal import Row, read
from megabase.pipeline.zero.states import MOMENTS, WEIGHTS
from tests.conftest import train_settings, training_rows
from tests.pipeline.shards import open_shards
from tests.processes import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Start = Callable[..., Job]


def finish(start: Start, shards: Path, root: Path, name: str, *settings: str) -> str:
    """Start a run and wait for its end; returns what it printed."""
    code, output = start(
        "train", *train_settings(shards, root, name, "tracking.enabled=false", *settings)
    ).wait()
    assert code == 0, output
    return output


def assert_same_states(run: Path, other: Path) -> None:
    """The newest checkpoints of two runs hold the same weights and AdamW states, to the last bit."""
    newest = [list_checkpoints(path / "checkpoints")[0] for path in (run, other)]
    one, two = map(open_shards, newest)
    assert step_of(newest[0]) == step_of(newest[1]) and one.names == two.names
    assert one.optimizer_step == two.optimizer_step
    for name in one.names:
        for what in (WEIGHTS, *MOMENTS):
            assert torch.equal(one.read(name, what), two.read(name, what)), (name, what)


OVERLAP, HPZ = "zero.overlap_comm=true", "zero.deepspeed.zero_optimization.zero_hpz_partition_size"


# Stage 2 is in test_training.py. Stage 3 writes its checkpoints in the background here, stage 1 computes in bf16; both
# overlap communication with computation.
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (0, []),
        (1, ["trainer.precision=bf16", OVERLAP]),
        (3, ["checkpoint.background=true", OVERLAP, f"{HPZ}=2"]),
    ],
    ids=["0", "1-bf16", "3-background"],
)
def test_killed_and_resumed_gives_the_bytes_of_the_undisturbed_run(
    tmp_path: Path, lambda_shards: Path, start_job: Start, stage: int, more: list[str]
) -> None:
    settings = [f"zero.stage={stage}", "trainer.max_steps=16", *more]
    finish(start_job, lambda_shards, tmp_path, "whole", *settings)

    killed = start_job(
        "train", *train_settings(lambda_shards, tmp_path, "killed", "tracking.enabled=false", *settings)
    )
    killed.until(lambda: len(training_rows(tmp_path / "killed")) >= 8)
    killed.kill()
    killed.wait()
    assert len(training_rows(tmp_path / "killed")) < 16
    output = finish(start_job, lambda_shards, tmp_path, "killed", *settings)

    assert "resuming killed from" in output
    journals = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert journals[0] == journals[1]
    assert_same_states(tmp_path / "whole", tmp_path / "killed")


def test_states_and_weights_on_a_disk_come_back_as_they_were(
    tmp_path: Path, lambda_shards: Path, start_job: Start
) -> None:
    stage = ["zero.stage=3", "trainer.max_steps=12"]
    in_memory = [*stage, "zero.offload=cpu", "zero.offload_parameters=cpu"]
    disk = tmp_path / "disk"
    on_disk = [*stage, "zero.offload=nvme", "zero.offload_parameters=nvme", f"zero.nvme_path={disk}"]
    finish(start_job, lambda_shards, tmp_path, "whole", *in_memory)
    killed = start_job(
        "train", *train_settings(lambda_shards, tmp_path, "killed", "tracking.enabled=false", *on_disk)
    )
    killed.until(lambda: len(training_rows(tmp_path / "killed")) >= 7)
    # Both ranks have mapped files, of several sub-groups each: weights, gradients, moments, and the device's weights.
    mapped = [mappings(child, disk) for child in killed.children()]
    assert len(mapped) == 2 and all(len(of_rank) >= 10 for of_rank in mapped)
    assert not list(disk.iterdir())  # the files have no names, so nothing stays however a rank ends
    killed.kill()
    killed.wait()
    output = finish(start_job, lambda_shards, tmp_path, "killed", *on_disk)

    assert "resuming killed from" in output
    journals = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert journals[0] == journals[1]
    assert_same_states(tmp_path / "whole", tmp_path / "killed")


def mappings(process: int, directory: Path) -> set[str]:
    """The files in a directory that a process has mapped."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if f" {directory}/" in line}


# Parts of a run: last step, ranks, ranks that share each window, ZeRO stage, micro batch.
CHAIN = [(3, 4, 2, 3, 3), (6, 2, 1, 1, 3), (9, 1, 1, 0, 4), (12, 3, 1, 3, 1), (15, 2, 2, 2, 6)]


def moved(root: Path, shards: Path, precision: str) -> tuple[list[Row], list[Row]]:
    """Training rows of a run that stayed on two ranks, and of one that resumed along CHAIN."""
    batch = ["data.global_batch=12", "trainer.eval_every_steps=0", "checkpoint.every_steps=0"]
    batch += [f"trainer.precision={precision}", "tracking.enabled=false"]

    def train(name: str, step: int, ranks: int, shared: int, stage: int, micro: int) -> None:
        settings = [f"trainer.max_steps={step}", f"trainer.devices={ranks}", f"zero.stage={stage}"]
        settings.append(f"trainer.sequence_ranks={shared}")
        if (
            name == "moved" and stage == 3
        ):  # weights are gathered within two nodes of two ranks, then within one
            settings += [OVERLAP, f"{HPZ}={2 if ranks == 4 else ranks}"]
        arguments = train_settings(shards, root, name, *batch, *settings, f"data.micro_batch={micro}")
        code, output = Job("train", *arguments, cwd=root).wait()
        assert code == 0, output
        assert ("resuming" in output) == (name == "moved" and step > CHAIN[0][0])

    train("whole", CHAIN[-1][0], 2, 1, 2, 6)
    for part in CHAIN:
        train("moved", *part)
    return training_rows(root / "whole"), training_rows(root / "moved")


def furthest(ours: list[Row], theirs: list[Row]) -> float:
    """The largest relative difference of two curves' losses."""
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("precision", "rounding"), [("32", 2e-5), ("bf16", 2e-3)])
def test_other_ranks_and_stages_continue_the_curve(
    tmp_path: Path, lambda_shards: Path, precision: str, rounding: float
) -> None:
    whole, other = moved(tmp_path, lambda_shards, precision)
    assert [row["step"] for row in other] == list(range(1, CHAIN[-1][0] + 1))
    assert [row["samples"] for row in other] == [row["samples"] for row in whole]
    # Only the order in which gradients are added differs.
    assert furthest(other, whole) < rounding
    # The last evaluation is of both ranks' parts of the windows here, and of their windows there: positions, recall.
    ours, theirs = (last_evaluation(tmp_path / name) for name in ("moved", "whole"))
    assert ours.keys() == theirs.keys() and "valid_from_16_bits_per_base" in ours
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=20 * rounding, abs=20 * rounding), name


def last_evaluation(run: Path) -> Row:
    """The last evaluation in the journal of a run."""
    return [row for row in read(run / "metrics.jsonl") if "valid_loss" in row][-1]


def test_a_lost_tail_of_the_journal_comes_back_from_the_checkpoint(
    tmp_path: Path, lambda_shards: Path, start_job: Start
) -> None:
    settings = ["trainer.max_steps=10", "trainer.eval_every_steps=0"]
    finish(start_job, lambda_shards, tmp_path, "torn", *settings)
    journal = tmp_path / "torn" / "metrics.jsonl"
    before = journal.read_bytes()
    journal.write_bytes(before[: len(before) // 3])
    output = finish(start_job, lambda_shards, tmp_path, "torn", *settings)
    assert "lacks rows before the checkpoint's step: put back from the checkpoint" in output
    assert journal.read_bytes() == before
