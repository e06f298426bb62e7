"""`make demo`: pretrain a reversible Reformer on the genome of E. coli 536, kill the job, resume it, show the results.

It runs `megabase prepare`, `train` and `evaluate` as a user does: two ranks, ZeRO-2, MLflow. At a random step it sends
SIGKILL to all processes of the job, which can therefore save nothing at that moment.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from megabase.pipeline.checkpoint.manifest import list_checkpoints, step_of
from megabase.pipeline.errors import RunError
from megabase.pipeline.rundir.journal import Row, read
from megabase.pipeline.rundir.paths import RunPaths

ROOT = Path(__file__).resolve().parents[1]
GENOME = ROOT / "examples" / "data" / "ecoli_536.fna.gz"
SHARDS = ROOT / "data" / "demo"
CONFIG = ROOT / "configs" / "demo.yaml"
RUN = ROOT / "runs" / "demo"
PATHS = RunPaths(RUN)
# Few windows, so that it takes seconds.
EVALUATE = ("--split", "valid", "--windows", "32", "--recall", "8")
EVALUATION = RUN / "evaluation"
# Training counts as stuck after this many seconds without a new row in the journal. A start imports torch, Lightning
# and DeepSpeed on every rank.
SILENCE_S = 300.0


def main() -> int:
    """Run the demo; returns an exit code."""
    began = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that it runs two ranks on a machine with one GPU, too
    os.environ["MEGABASE_OVERSUBSCRIBE"] = "1"  # and on one with a single CPU
    if not SHARDS.exists():
        _say(f"preparing {GENOME.name}: FASTA -> WebDataset shards; the last 10% are for validation")
        _megabase("prepare", str(GENOME), str(SHARDS), "--valid", "0.1")
    if RUN.exists():
        shutil.rmtree(RUN)

    _say("training on 2 processes with DeepSpeed ZeRO-2; at a random step the job will be killed")
    killed_at = _train_and_kill()
    saved = sorted(step_of(path) for path in list_checkpoints(PATHS.checkpoints))
    _say(
        f"SIGKILL to every process at step {killed_at}; checkpoints on disk: {saved}. The same command again:"
    )
    before = {row["step"]: row for row in _training_rows()}
    _megabase("train", str(CONFIG))
    _check_journal(before)
    _say("evaluating the model: what its context gains")
    _megabase("evaluate", str(RUN), *EVALUATE, "--output", str(EVALUATION), stdout=subprocess.DEVNULL)
    _summarize(killed_at, max(saved), time.monotonic() - began)
    return 0


def _train_and_kill() -> int:
    """Start training, send SIGKILL to its process group after a random step; returns the last step in the journal."""
    job = subprocess.Popen(_command("train", str(CONFIG)), start_new_session=True, cwd=ROOT)
    target, step, changed_at = 0, 0, time.monotonic()
    try:
        while step < target or not target:
            time.sleep(0.2)
            if job.poll() is not None:
                raise RunError(f"training ended with code {job.returncode} before it could be killed")
            if time.monotonic() - changed_at > SILENCE_S:
                raise RunError(f"training has written nothing for {SILENCE_S:.0f} s")
            steps = [row["step"] for row in _training_rows()]
            if steps and steps[-1] > step:
                step, changed_at = steps[-1], time.monotonic()
            if not target and PATHS.config.exists():
                target = _draw_step()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    return step


def _draw_step() -> int:
    """A random step in the first three quarters, some steps after a checkpoint, so that these steps are lost."""
    from megabase.pipeline.config.load import load

    config = load([CONFIG])
    every = config.checkpoint.every_steps
    saved = random.randint(1, config.trainer.max_steps * 3 // 4 // every)
    return saved * every + random.randint(2 * config.trainer.log_every_steps, every - 1)


def _check_journal(before: dict[int, Row]) -> None:
    """Raise RunError unless the journal has each step once, and the same numbers for steps that were trained twice.

    before: the rows in the journal when the job was killed, by step.
    """
    rows = _training_rows()
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(steps) + 1)):
        raise RunError(f"the journal {RUN / 'metrics.jsonl'} has a gap or a repeat")
    changed = [row["step"] for row in rows if row["step"] in before and before[row["step"]] != row]
    if changed:
        raise RunError(f"step {changed[0]} has another loss after the restart than before it")


def _summarize(killed_at: int, resumed_at: int, seconds: float) -> None:
    """Print what the run has reached, how fast, and where its results are."""
    rows = list(read(PATHS.metrics))
    speed = [row for row in read(PATHS.performance) if "tokens_per_second" in row]
    final = next(row for row in reversed(rows) if "full_valid_bits_per_base" in row)
    bits = final["full_valid_bits_per_base"]
    markov = [final[f"full_markov_{order}_bits_per_base"] for order in range(6)]
    rates = sorted(row["tokens_per_second"] for row in speed)
    memory = max(row["peak_memory_bytes"] for row in speed) / 2**20
    mlflow = json.loads(PATHS.mlflow.read_text()) if PATHS.mlflow.exists() else None
    print()
    print(f"  killed at step {killed_at}, resumed from step {resumed_at}: every step is in the journal once,")
    print(f"  and the {killed_at - resumed_at} steps trained twice gave the same losses to the last bit")
    print(f"  validation       {bits:.4f} bits per base after {final['step']} steps")
    for order, value in enumerate(markov):
        print(f"  Markov order {order}   {value:.4f}{'   beaten' if bits < value else ''}")
    print(f"  recall           {_recall()}")
    print(f"  speed            {rates[len(rates) // 2]:,.0f} tokens/s (median, 2 processes)")
    print(f"  peak memory      {memory:,.0f} MiB (rank 0, libraries included)")
    print(f"  time             {seconds / 60:.1f} minutes")
    print(f"  run directory    {RUN}")
    print(f"  loss curve       {PATHS.loss_curve}")
    print(f"  evaluation       {EVALUATION}")
    if mlflow:
        ui = Path(sys.executable).with_name("mlflow")
        print(f"  MLflow           {ui} ui --backend-store-uri {mlflow['uri']}")


def _recall() -> str:
    """How much better a copy is predicted than the same bases without its source."""
    found = json.loads((EVALUATION / "evaluation.json").read_text())["recall"]
    exact = [copy for copy in found["copies"] if copy["kind"] == "exact"]
    copied = sum(copy["bits"]["value"] for copy in exact) / len(exact)
    distances = f"{exact[0]['distance']} to {exact[-1]['distance']} bases"
    return f"a copy after {distances}: {copied:.4f} bits per base instead of {found['without']['value']:.4f}"


def _training_rows() -> list[Row]:
    return [row for row in read(PATHS.metrics) if "loss" in row]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "megabase.pipeline.cli", *arguments]


def _megabase(*arguments: str, stdout: int | None = None) -> None:
    code = subprocess.run(_command(*arguments), cwd=ROOT, stdout=stdout).returncode
    if code:
        raise RunError(f"megabase {arguments[0]} ended with code {code}")


def _say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunError as error:
        sys.exit(f"demo: {error}")
