"""A `megabase` that trains nothing, for jobs of tests: it writes what a training writes, and stops as a training stops.

    run_stub.py train RUN STEPS    one rank; a step takes 0.05 s and has a checkpoint
    run_stub.py job-end ...        as `megabase job-end`

Heartbeats are those of the real watchdog, but every HEARTBEAT_S seconds. It imports no torch.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megabase.datamodules.files import publish_json
from megabase.pipeline import cli
from megabase.pipeline.ranks import watchdog
from megabase.pipeline.ranks.stop import EXIT_AGAIN, StopRequest
from megabase.pipeline.rundir.journal import Journal
from megabase.pipeline.rundir.paths import RunPaths, newest_step
from megabase.pipeline.rundir.status import write_launcher_status, write_status

HEARTBEAT_S = 0.2
STEP_S = 0.05


def train(directory: Path, steps: int) -> int:
    """Train one rank; returns the exit code. Rank 0 writes what belongs to the run."""
    rank, ranks = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
    paths, stop = RunPaths(directory), StopRequest().listen()
    watchdog.HEARTBEAT_S = HEARTBEAT_S
    dog = watchdog.Watchdog(directory, rank, 0).start()
    if rank:
        while not (directory / "ended").exists():
            watchdog.beat("training", 1)
            time.sleep(STEP_S)
        dog.stop()
        return 0
    (directory / "ended").unlink(missing_ok=True)
    if paths.stop.exists():
        print(f"{paths.stop} keeps it stopped", file=sys.stderr)
        (directory / "ended").touch()
        return 2
    first = newest_step(paths.checkpoints) or 0
    paths.config.write_text(f"trainer:\n  max_steps: {steps}\n  nodes: 1\n  devices: {ranks}\n")
    slurm = {name: value for name, value in os.environ.items() if name.startswith("SLURM_JOB")}
    publish_json(paths.environment, {"slurm": slurm})
    write_status(directory, "running", first)
    write_launcher_status("running", first, directory)
    stop.watch(paths.stop)
    metrics, performance = Journal(paths.metrics, first), Journal(paths.performance, first)
    performance.append([{"step": first, "time": time.time(), "started": True}])
    step, state = first, "finished"
    while step < steps:
        if stop:
            state = "stopped" if stop.by_person else "again"
            break
        step += 1
        watchdog.beat("training", step)
        metrics.append([{"step": step, "loss": 1.4, "bits_per_base": 2.0}])
        performance.append([{"step": step, "time": time.time(), "tokens_per_second": 1000.0}])
        time.sleep(STEP_S)
    (paths.checkpoints / f"step-{step}").mkdir(parents=True, exist_ok=True)
    write_status(directory, state, step)
    write_launcher_status(state, step, directory)
    (directory / "ended").touch()
    dog.stop()
    return 0 if state == "finished" else EXIT_AGAIN


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    sys.exit(
        train(Path(arguments[0]), int(arguments[1]))
        if command == "train"
        else cli.main([command, *arguments])
    )
