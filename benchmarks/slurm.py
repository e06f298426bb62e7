"""Seconds from a failure on a SLURM cluster to training again, on the test cluster with real training: a table.

    python -m benchmarks.slurm [--repeat 10] [--kinds signal killed ...] [--json FILE]

Each row is a failure of a training of two nodes, one rank each: `scancel` sends SIGUSR1, a node is set down, a node
loses power, a rank gets SIGKILL, or SIGSTOP so that it hangs. The time ends when the journal has a new step of the next
start. It includes REQUEUE_DELAY_S until a requeued job may start, NODE_TIMEOUT_S until a node that does not answer is
given up, and HANG_MINUTES until a rank counts as hung. Every journal must be that of an undisturbed run, byte for byte,
and every run must come to its end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.bench import result
from megabase.pipeline.files import read_object
from megabase.slurm.testcluster.cluster import TestCluster, until
from megabase.slurm.testcluster.configuration import NODE_TIMEOUT_S, REQUEUE_DELAY_S

ROOT = Path(__file__).resolve().parents[1]
FASTA = ROOT / "tests" / "data" / "lambda_phage.fna.gz"
STEPS = 40
# The failure comes when the journal has this step. The newest checkpoint is then that of step 10.
FAIL_AT = 13
HANG_MINUTES = 0.3
# A run that has not trained again, or finished, by then hangs.
BOUND_S = 300.0
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
    "trainer.nodes=2",
    "trainer.devices=1",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_steps=1",
    "trainer.eval_every_steps=10",
    "trainer.eval_sequences=4",
    f"trainer.hang_minutes={HANG_MINUTES}",
    "checkpoint.every_steps=5",
    "tracking.enabled=false",
    "slurm.gpus=null",
]


@dataclass
class Row:
    """What came of a failure, repeated.

    Attributes:
        kind: of the failure, a key of KINDS.
        repeats: failures of this kind.
        seconds: to training again, of each repeat that did.
        hangs: runs that did not train again, or did not finish, within BOUND_S.
        unequal: runs whose journal is not that of the undisturbed run.
    """

    kind: str
    repeats: int = 0
    seconds: list[float] = field(default_factory=list)
    hangs: int = 0
    unequal: int = 0


class Run:
    """A training on the cluster, submitted with `megabase submit`."""

    def __init__(self, cluster: TestCluster, folder: Path, name: str) -> None:
        self.cluster, self.directory = cluster, folder / "runs" / name
        settings = [
            f"data.shards={folder / 'shards'}",
            f"run.root={folder / 'runs'}",
            f"run.name={name}",
            *SETTINGS,
        ]
        done = subprocess.run(
            [sys.executable, "-m", "megabase.pipeline.cli", "submit", *settings],
            env=cluster.environment | {"PYTHONPATH": str(ROOT)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"benchmarks.slurm: {done.stderr}")
        self.job = int(done.stdout.split()[1])

    @property
    def journal(self) -> bytes:
        try:
            return (self.directory / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return b""

    def pid(self, rank: int) -> int:
        """The process of a rank, from its heartbeat; 0 if there is none."""
        return int(read_object(self.directory / "logs" / f"rank-{rank}.heartbeat").get("pid", 0))

    def trains_again(self, before: int, rows: int) -> bool:
        """Whether rank 0 is another process than `before`, and the journal has more rows than it had."""
        return self.pid(0) not in (0, before) and self.journal.count(b"\n") > rows

    def finishes(self) -> bool:
        """Wait for the end of the run; whether it came."""
        return until(lambda: self.cluster.state(self.job) == "COMPLETED", BOUND_S)


def set_down(run: Run) -> None:
    run.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=benchmark")


def kill_node(run: Run) -> None:
    run.cluster.kill_node("n2")


KINDS: dict[str, Callable[[Run], None]] = {
    "signal": lambda run: run.cluster.signal(run.job, "USR1"),
    "node down": set_down,
    "node lost": kill_node,
    "rank killed": lambda run: os.kill(run.pid(1), signal.SIGKILL),
    "rank stopped": lambda run: os.kill(run.pid(1), signal.SIGSTOP),
}


def measure(cluster: TestCluster, folder: Path, row: Row, number: int, expected: bytes) -> None:
    """Start a run, let it fail, and add to a row what came of it."""
    run = Run(cluster, folder, f"{row.kind.replace(' ', '-')}-{number}")
    if not until(lambda: run.journal.count(b"\n") >= FAIL_AT, BOUND_S):
        raise SystemExit(f"benchmarks.slurm: {run.directory} does not train")
    before, rows = run.pid(0), run.journal.count(b"\n")
    began = time.monotonic()
    KINDS[row.kind](run)
    if until(lambda: run.trains_again(before, rows), BOUND_S):
        row.seconds.append(round(time.monotonic() - began, 1))
    row.repeats += 1
    if not (run.finishes() and len(row.seconds) + row.hangs == row.repeats):
        row.hangs += 1
    elif run.journal != expected:
        row.unequal += 1
    say(
        f"{run.directory.name}: {row.seconds[-1:]} s, {cluster.state(run.job)}, equal: {run.journal == expected}"
    )
    if row.kind == "node lost":
        cluster.start_node("n2")
    cluster.clear()
    if not until(lambda: "n2:idle" in cluster.run("sinfo", "-hN", "--format=%N:%t"), BOUND_S):
        raise SystemExit("benchmarks.slurm: n2 does not come back")


def say(text: str) -> None:
    print(f"slurm: {text}", file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| failure | repeats | to training again, p50 | max | hangs | other journals |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, most = (
            f"{each:.1f} s" for each in (statistics.median(row.seconds or [0]), max(row.seconds or [0]))
        )
        lines.append(f"| {row.kind} | {row.repeats} | {median} | {most} | {row.hangs} | {row.unequal} |")
    return "\n".join(lines)


def main() -> int:
    """Measure; returns 1 if a run hung, or its journal is another one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=10, help="failures of each kind (default: 10)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--json", type=Path, help="write every sample to this file, after each failure")
    options = parser.parse_args()
    rows = [Row(kind) for kind in options.kinds]
    with tempfile.TemporaryDirectory(prefix="mb-") as name:
        folder = Path(name)
        prepare([FASTA], folder / "shards", valid="0.1", progress=False)
        # Three nodes, so that a job that has lost one need not wait for it.
        with TestCluster(folder / "cluster", nodes=3) as cluster:
            whole = Run(cluster, folder, "undisturbed")
            if not whole.finishes():
                raise SystemExit(f"benchmarks.slurm: {whole.directory} does not finish")
            for number in range(1, options.repeat + 1):
                for row in rows:
                    measure(cluster, folder, row, number, whole.journal)
                    if options.json:
                        options.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    print(table(rows))
    return int(any(row.hangs or row.unequal for row in rows))


def as_json(rows: list[Row]) -> dict[str, object]:
    """Everything that was measured, with machine, versions and settings."""
    return {
        "rows": [asdict(row) for row in rows],
        "settings": {"requeue_delay_s": REQUEUE_DELAY_S, "node_timeout_s": NODE_TIMEOUT_S, "run": SETTINGS},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": result.machine("cpu"),
        "versions": result.versions(("torch", "pytorch-lightning", "deepspeed")),
    }


if __name__ == "__main__":
    sys.exit(main())
