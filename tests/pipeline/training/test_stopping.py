"""Every way to stop a run, at every moment; ranks that die or hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabase.pipeline.ranks.stop import ANSWER, EXIT_AGAIN, INTERRUPTED
from megabase.pipeline.ranks.supervisor import free_port
from tests.conftest import train_settings, training_rows
from tests.processes import Python

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("stopping_worker.py")
ENDLESS = ["trainer.max_steps=100000", "tracking.enabled=false"]


def status(run: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "status.json").read_text())
    return content


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def test_stopped_at_any_moment_and_resumed_the_journal_is_that_of_the_undisturbed_run(
    undisturbed: Path, runs: Path, lambda_shards: Path
) -> None:
    run = runs / "stopped"
    settings = train_settings(lambda_shards, runs, "stopped")
    steps = []
    for moment in ("startup", "checkpoint", "evaluation", "never"):
        # The checkpoint of step 10 is still being written when the evaluation of step 10 is broken off.
        background = f"checkpoint.background={str(moment == 'evaluation').lower()}"
        code, output = Python(str(WORKER), moment, *settings, background, cwd=runs).wait()
        finished = moment == "never"
        assert code == (0 if finished else EXIT_AGAIN), output
        assert status(run) == {"state": "finished" if finished else "again", "step": newest(run)}
        assert ("stopping: another rank received a stop request" in output) == (not finished), output
        assert not list((run / "checkpoints").glob("*.partial"))
        steps.append(newest(run))
    # Before the first step; at the checkpoint of step 5, or one or two steps later; in the evaluation at step 10.
    assert steps[0] == 0 and 5 <= steps[1] <= 7 and steps[2] == 10
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_stop_file_stops_until_it_is_removed_and_max_minutes_stop_by_themselves(
    runs: Path, lambda_shards: Path, start_job
) -> None:
    run = runs / "file"
    settings = train_settings(lambda_shards, runs, "file", *ENDLESS)
    job = start_job("train", *settings)
    job.until(lambda: len(training_rows(run)) >= 1)
    (run / "STOP").touch()
    code, output = job.wait()
    assert code == EXIT_AGAIN, output
    assert f"stopping: {run / 'STOP'}" in output and f"remove {run / 'STOP'}, then run it again" in output
    stopped_at = newest(run)
    assert status(run) == {"state": "stopped", "step": stopped_at}

    code, output = start_job("train", *settings).wait()
    assert code == 2
    [line] = [line for line in output.splitlines() if "STOP" in line]
    assert "remove it to go on" in line
    assert status(run) == {"state": "stopped", "step": stopped_at}

    (run / "STOP").unlink()
    # The limit passes before the first step. The run trains a step all the same, or no start would make progress.
    code, output = start_job("train", *settings, "trainer.max_minutes=0.001").wait()
    assert code == EXIT_AGAIN, output
    assert "stopping: trainer.max_minutes=0.001" in output
    assert status(run) == {"state": "again", "step": newest(run)}
    assert newest(run) > stopped_at

    # A rank that does not move: the first Ctrl-C is answered all the same, and the second ends the run now.
    job = start_job("train", *settings)
    job.until(lambda: status(run)["state"] == "running" and (run / "logs" / "rank-1.heartbeat").exists())
    job.until(lambda: len(job.children()) == 2)
    os.kill(job.children()[1], signal.SIGSTOP)
    job.send_signal(signal.SIGINT)
    job.until(lambda: ANSWER in job.stderr())
    job.send_signal(signal.SIGINT)
    code, output = job.wait(60)
    assert code == INTERRUPTED, output
    assert f"interrupted; run it again to resume from step {newest(run)}" in output
    assert status(run)["state"] == "crashed"


def test_the_stacks_of_a_rank_that_hangs_are_written_and_the_job_ends(
    runs: Path, lambda_shards: Path, start_job
) -> None:
    run = runs / "hangs"
    quiet = ["trainer.hang_minutes=0.2", "trainer.eval_every_steps=0", "checkpoint.every_steps=0"]
    job = start_job("train", *train_settings(lambda_shards, runs, "hangs", *ENDLESS, *quiet))
    job.until(lambda: len(training_rows(run)) >= 1)
    ranks = job.children()
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    code, output = job.wait(120)
    assert code == 1, output
    # 12 s of silence, 3 s for the stacks, 10 s of grace, and a busy machine.
    assert time.monotonic() - began < 60
    stacks = run / "logs" / "rank-0.stacks.txt"
    assert f"rank 0 on {os.uname().nodename}, process {ranks[0]}, has not moved" in output
    assert str(stacks) in output and "trainer.hang_minutes=0.2" in output
    # The stacks show which collective waits, and who called it.
    text = stacks.read_text()
    assert "distributed_c10d.py" in text or "agreement.py" in text, text
    assert "pipeline/training/run.py" in text
    hearts = [json.loads((run / "logs" / f"rank-{rank}.heartbeat").read_text()) for rank in (0, 1)]
    assert [heart["pid"] for heart in hearts] == ranks
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert status(run)["state"] == "crashed"  # the launcher writes it, because no rank could


def test_under_torchrun_a_rank_that_dies_takes_the_others_down(
    runs: Path, lambda_shards: Path, tmp_path: Path
) -> None:
    run = runs / "torchrun"
    log = (tmp_path / "log").open("w+")
    settings = train_settings(lambda_shards, runs, "torchrun", *ENDLESS)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        + ["-m", "megabase.pipeline.cli", "train", *settings],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=runs,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(WORKER.parents[3])},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not training_rows_or_none(run):
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        hearts = [json.loads((run / "logs" / f"rank-{rank}.heartbeat").read_text()) for rank in (0, 1)]
        os.kill(hearts[1]["pid"], signal.SIGKILL)
        assert launcher.wait(90) == 1, (tmp_path / "log").read_text()
        assert not any(Path(f"/proc/{heart['pid']}").exists() for heart in hearts)
        # Rank 0 ended with a broken connection, or before it could write its status.
        assert status(run)["state"] in ("crashed", "running")
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        log.close()


def training_rows_or_none(run: Path) -> list[dict[str, object]]:
    return training_rows(run) if (run / "metrics.jsonl").exists() else []


@pytest.mark.parametrize(
    ("error", "message"), [("RunError('worn out')", "megabase: worn out"), ("OSError(5)", "OSError: 5")]
)
def test_a_rank_that_fails_leaves_with_its_code_whatever_the_teardown_does(error: str, message: str) -> None:
    program = (
        "import atexit, os, sys\n"
        "from megabase.pipeline import cli\n"
        "from megabase.pipeline.ranks import rendezvous\n"
        "from megabase.pipeline.training import run as train\n"
        "from megabase.pipeline.errors import RunError\n"
        "def fail(*_):\n"
        "    rendezvous.start()\n"
        f"    raise {error}\n"
        "train.train = fail\n"
        "atexit.register(os.abort)\n"
        "sys.exit(cli.main(['train', 'data.shards=x', 'run.name=x']))\n"
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | alone | meeting,
    )
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr
