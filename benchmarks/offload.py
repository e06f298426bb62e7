"""The memory that offload saves and the time that it costs (ZeRO-3), without and with a limit of memory: a table.

    python -m benchmarks.offload [--dim 768] [--depth 14] [--ranks 2] [--steps 5] [--limits 4,3] [--disk DIR]
        [--json FILE]

Every row is one `megabase train`; only `zero.offload` and `zero.offload_parameters` differ. --limits: GiB of memory for
all processes of a run together, page cache included, set by a cgroup of the kernel; needs root. step: seconds, median
without the first. anonymous: GiB of memory that is not mapped from a file, the largest sum over the ranks; on a CPU
it includes weights, activations and gradients. The kernel kills a run that needs more than its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from megabase.datamodules.prepare.run import prepare
from megabase.models import Reformer
from megabase.pipeline.config.load import load
from megabase.pipeline.rundir import environment
from megabase.pipeline.rundir.journal import read

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 256
# Directory of the memory controller and the file with the limit, in versions 1 and 2 of cgroups.
CONTROLLERS = [
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
]
KINDS = {
    "none": [],
    "cpu": ["zero.offload=cpu"],
    "nvme": ["zero.offload=nvme"],
    "cpu, parameters too": ["zero.offload=cpu", "zero.offload_parameters=cpu"],
    "nvme, parameters too": ["zero.offload=nvme", "zero.offload_parameters=nvme"],
}


@dataclass
class Row:
    """One training. limit: GiB (0: none). ended: finished, or why not. step: seconds. anonymous: GiB."""

    offload: str
    limit: float
    ended: str
    step: float
    anonymous: float


def settings(options: argparse.Namespace) -> list[str]:
    """KEY=VALUE of every run."""
    return [
        f"data.length={LENGTH}",
        f"data.global_batch={options.ranks}",
        "data.micro_batch=1",
        f"model.dim={options.dim}",
        f"model.depth={options.depth}",
        f"model.heads={options.dim // 64}",
        "model.lsh.chunk_length=16",
        "model.local.window=32",
        f"trainer.devices={options.ranks}",
        f"trainer.max_steps={options.steps}",
        "trainer.log_every_steps=1",
        "trainer.eval_every_steps=0",
        "checkpoint.every_steps=0",
        "tracking.enabled=false",
        "zero.stage=3",
        "zero.bucket_mb=32",
    ]


def train(kind: str, limit: float, options: argparse.Namespace, shards: Path, directory: Path) -> Row:
    """Run one training in new processes."""
    run = f"{kind}-{limit:g}".replace(", ", "-").replace(" ", "-")
    command = [
        *(sys.executable, "-m", "megabase.pipeline.cli", "train"),
        *(f"data.shards={shards}", f"run.root={directory}", f"run.name={run}"),
        f"zero.nvme_path={options.disk or directory}",
        *settings(options),
        *KINDS[kind],
    ]
    log = directory / f"{run}.log"
    with memory_limit(limit) as group, log.open("wb") as output:
        job = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=(lambda: (group / "cgroup.procs").write_text("0")) if group else None,
        )
        most = 0
        try:
            while job.poll() is None:
                most = max(most, anonymous(job.pid))
                time.sleep(0.05)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
    ended = "finished" if job.returncode == 0 else "killed" if "SIGKILL" in log.read_text() else f"see {log}"
    rows = read(directory / run / "performance.jsonl") if job.returncode == 0 else []
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][1:]
    step = options.ranks * LENGTH / statistics.median(speeds) if speeds else 0.0
    return Row(kind, limit, ended, round(step, 3), round(most / 2**30, 2))


@contextmanager
def memory_limit(gibibytes: float) -> Iterator[Path | None]:
    """Make a cgroup with this limit of memory; yields its directory, or None if `gibibytes` is 0."""
    if not gibibytes:
        yield None
        return
    parent, key = next((place, key) for place, key in CONTROLLERS if (place / "cgroup.procs").exists())
    group = parent / f"megabase-{os.getpid()}"
    group.mkdir()
    try:
        (group / key).write_text(str(int(gibibytes * 2**30)))
        yield group
    finally:
        while (group / "cgroup.procs").read_text():  # processes that were just killed leave it after a moment
            time.sleep(0.1)
        group.rmdir()


def anonymous(supervisor: int) -> int:
    """Bytes of memory that is not mapped from a file, summed over the ranks of a supervisor."""
    try:
        memories = [rank.memory_info() for rank in psutil.Process(supervisor).children()]
    except psutil.NoSuchProcess:
        return 0
    return sum(memory.rss - memory.shared for memory in memories)


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description="The memory that offload saves and the time that it costs.")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--depth", type=int, default=14)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limits", default="", metavar="GIB,...", help="also with so much memory")
    parser.add_argument("--disk", type=Path, help="zero.nvme_path (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="also write the rows, with machine and versions")
    options = parser.parse_args()
    limits = [0.0, *map(float, filter(None, options.limits.split(",")))]
    rows = []
    with tempfile.TemporaryDirectory(prefix="offload-") as temporary:
        directory = Path(temporary)
        shards = directory / "shards"
        prepare([ROOT / "tests" / "data" / "lambda_phage.fna.gz"], shards, progress=False)
        model = load([], [f"data.shards={shards}", "run.name=x", *settings(options)]).model
        model.vocab_size = 9
        parameters = sum(p.numel() for p in Reformer(model).parameters())
        print(f"{parameters:,} parameters, {options.ranks} ranks, ZeRO-3, fp32")
        print(f"{'limit, GiB':>10}  {'offload':22}  {'ended':10}  {'step, s':>8}  {'anonymous, GiB':>14}")
        for limit in limits:
            for kind in KINDS:
                row = train(kind, limit, options, shards, directory)
                rows.append(row)
                print(
                    f"{limit or 'none':>10}  {row.offload:22}  {row.ended:10}  {row.step:8.2f}  {row.anonymous:14.2f}",
                    flush=True,
                )
    if options.json:
        content = {"parameters": parameters, "ranks": options.ranks, "environment": environment.describe()}
        options.json.write_text(
            json.dumps(content | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
