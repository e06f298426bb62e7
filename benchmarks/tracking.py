"""What MLflow costs a training, whatever state the server is in, and how long a long journal takes to arrive.

    python -m benchmarks.tracking [--steps 200] [--repeat 3] [--points 100000] [--json FILE]

Each row is one `megabase train` of a small model on one rank, with a row of the journal for each step: without
tracking, and with a server that answers, answers after SLOW_S seconds, answers with error 500, or is not there. step:
median time of a step, from the journal, without the first WARM_UP; the median over the repeats, which go round the
kinds in turn. beside off: the step with tracking, as a multiple of that without. At the end a journal of --points steps
is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.bench.result import machine
from megabase.pipeline.config.load import load, save
from megabase.pipeline.rundir.journal import Journal, read
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import write_status
from megabase.pipeline.tracking.sync import Sync
from tests.pipeline.tracking.servers import FAIL, PASS, Proxy, Server

ROOT = Path(__file__).resolve().parents[1]
OFF = "off"
SLOW_S = 10.0
WARM_UP = 10
BEHAVIOURS: dict[str, Callable[[str], str | float]] = {
    "healthy": lambda path: PASS,
    "slow": lambda path: SLOW_S,
    "error 500": lambda path: FAIL,
}
AWAY = "away"
KINDS = (OFF, *BEHAVIOURS, AWAY)


@dataclass
class Row:
    """Trainings with a server in one state. steps: median seconds of a step, one value for each repeat."""

    server: str
    steps: list[float] = field(default_factory=list)

    @property
    def step(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.steps)


def train(kind: str, uri: str, steps: int, shards: Path, root: Path) -> float:
    """Train once; returns the median seconds of a step."""
    name = f"{kind.replace(' ', '-')}-{len(list(root.iterdir()))}"
    settings = [
        *(f"run.name={name}", f"run.root={root}", f"data.shards={shards}", f"tracking.uri={uri}"),
        *("data.length=512", "data.global_batch=2", "data.micro_batch=2", "model.dim=64", "model.depth=2"),
        *("model.heads=2", "trainer.devices=1", f"trainer.max_steps={steps}", "trainer.eval_every_steps=0"),
        *("trainer.log_every_steps=1", "checkpoint.every_steps=0", "checkpoint.every_minutes=0"),
        f"tracking.enabled={'false' if kind == OFF else 'true'}",
    ]
    command = [sys.executable, "-m", "megabase.pipeline.cli", "train", *settings]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=variables, cwd=ROOT, capture_output=True)
    times = [
        moment for row in read(RunPaths(root / name).performance) for moment in row.get("step_times", [])
    ]
    pairs = zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)
    return statistics.median(later - earlier for earlier, later in pairs)


def arrive(points: int, uri: str, root: Path) -> float:
    """Send a journal of `points` steps with one metric each; returns the seconds until MLflow has all of them."""
    config = load([], ["run.name=long", "data.shards=s", f"run.root={root}", f"tracking.uri={uri}"])
    config.directory.mkdir(parents=True)
    paths = RunPaths(config.directory)
    save(config, paths.config)
    write_status(config.directory, "finished", points)
    steps = range(1, points + 1)
    Journal(paths.metrics, 0).append([{"step": step, "loss": 2.0 / step} for step in steps])
    started = {"step": 0, "time": time.time() - points, "started": True}
    times = [started["time"] + step for step in steps]
    Journal(paths.performance, 0).append([started, {"step": points, "time": times[-1], "step_times": times}])
    sync = Sync(config.directory)
    began = time.monotonic()
    sync.once()
    return time.monotonic() - began


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description="What MLflow costs a training.")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--repeat", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--points", type=int, default=100_000, help="steps of the journal that is sent")
    parser.add_argument("--json", type=Path, help="also write the figures, with machine and versions")
    options = parser.parse_args()
    rows = {kind: Row(kind) for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="tracking-") as temporary:
        directory = Path(temporary)
        (directory / "runs").mkdir()
        prepare([ROOT / "tests" / "data" / "lambda_phage.fna.gz"], directory / "shards", progress=False)
        server = Server(directory)
        server.start()
        proxy = Proxy(server.port)
        try:
            for _ in range(options.repeat):
                for kind, row in rows.items():
                    proxy.behave = BEHAVIOURS.get(kind, lambda path: PASS)
                    uri = "http://127.0.0.1:9" if kind == AWAY else proxy.uri
                    row.steps.append(
                        train(kind, uri, options.steps, directory / "shards", directory / "runs")
                    )
            seconds = arrive(options.points, server.uri, directory / "long")
        finally:
            proxy.stop()
            server.stop()
    print(f"{'MLflow':10}  {'step, ms':>8}  {'beside off':>10}")
    for row in rows.values():
        print(f"{row.server:10}  {1000 * row.step:8.2f}  {row.step / rows[OFF].step:10.3f}")
    print(f"{options.points:,} points arrived in {seconds:.1f} s")
    if options.json:
        content = {
            "steps": options.steps,
            "rows": [asdict(row) for row in rows.values()],
            "points": options.points,
            "seconds": seconds,
            "machine": machine("cpu"),
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
