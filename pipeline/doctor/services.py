"""SLURM, MLflow and the shards."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.doctor.disk import MOST_SKEW_S
from megabase.pipeline.doctor.finding import Finding, note, ok, wrong
from megabase.pipeline.errors import UserError
from megabase.pipeline.readable import counted
from megabase.pipeline.slurm.partition import TIMEOUT_S, as_limit, partitions
from megabase.pipeline.tracking.server import SQLITE, Server
from megabase.pipeline.training.submission import unreachable

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
OPTIONAL = ("sacct",)


def check_slurm(config: RunConfig, which: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    """SLURM's commands, whether its controller answers, and its partitions.

    Args:
        config: `slurm.partition` is looked for, if it is set.
        which: finds a command on PATH.
    """
    missing = [name for name in COMMANDS if which(name) is None]
    if len(missing) == len(COMMANDS):
        return [note("SLURM", "not on this machine: `megabase submit` needs it, `megabase train` does not")]
    if missing:
        return [
            wrong(
                "SLURM",
                f"{', '.join(missing)}: not found on PATH",
                "load the cluster's module, or correct PATH",
            )
        ]
    found = partitions()
    if not found:
        if not is_configured():
            return [note("SLURM", "its commands are here, but no cluster is: there is no slurm.conf")]
        reason = _answer(["sinfo"]) or f"no answer in {TIMEOUT_S:.0f} s"
        return [
            wrong(
                "SLURM", f"the controller does not answer: {reason}", "scontrol ping; ask the administrators"
            )
        ]
    findings = [
        ok(
            "SLURM",
            f"{_answer(['sinfo', '--version'])}; "
            + ", ".join(
                f"{each.name}{'*' * each.default} ({counted(each.nodes, 'node')}, "
                f"{'no time limit' if each.limit is None else as_limit(each.limit)}{'' if each.up else ', not up'})"
                for each in found
            ),
        )
    ]
    names = [each.name for each in found]
    if (wanted := config.slurm.partition) and (absent := [n for n in wanted.split(",") if n not in names]):
        text = f"slurm.partition={wanted}: there is no {absent[0]}"
        findings.append(wrong("partition", text, f"choose one of {', '.join(names)}"))
    if any(which(name) is None for name in OPTIONAL):
        findings.append(
            note(
                "sacct", "not found: `megabase status` does not know how jobs ended that SLURM has forgotten"
            )
        )
    return findings


def is_configured() -> bool:
    """Whether this machine has SLURM's configuration, of its own or from its controller."""
    named = os.environ.get("SLURM_CONF")
    places = [Path(named)] if named else [Path("/etc/slurm/slurm.conf"), Path("/run/slurm/conf/slurm.conf")]
    return any(place.exists() for place in places)


def check_mlflow(config: RunConfig, now: Callable[[], float] = time.time) -> list[Finding]:
    """Whether MLflow's server answers, and its clock; or where the database is.

    Args:
        config: `tracking.*`.
        now: this machine's clock, seconds.
    """
    if not config.tracking.enabled:
        return [note("MLflow", "tracking.enabled=false: runs are in their directories only")]
    try:
        uri = Server.of(config).uri
    except UserError as error:
        return [wrong("MLflow", str(error), "put the password into MLFLOW_TRACKING_PASSWORD")]
    if uri.startswith(SQLITE):
        return [ok("MLflow", f"no server: runs go to the database {uri.removeprefix(SQLITE)}")]
    if not uri.startswith(("http://", "https://")):
        return [ok("MLflow", uri)]
    if problem := unreachable(uri):
        return [
            note(
                "MLflow",
                f"{uri} does not answer from here ({problem}): training does not wait for it",
                "correct tracking.uri, or send runs later with `megabase sync RUN`",
            )
        ]
    found = [ok("MLflow", f"{uri} answers")]
    skew = _skew(uri, now)
    if skew is not None and abs(skew) > MOST_SKEW_S:
        text = f"MLflow's server is {skew:+.0f} s from this machine's clock"
        found.append(wrong("clock", text, "synchronise the clocks: chronyc makestep"))
    return found


def check_shards(config: RunConfig) -> list[Finding]:
    """Whether the shards of a config can be opened; nothing if it names none."""
    shards = config.data.shards
    if not shards or shards == "???":
        return []
    try:
        index = ShardIndex.open(shards)
    except DataError as error:
        return [wrong("shards", str(error), "correct data.shards; `megabase prepare --check` reads them all")]
    splits = ", ".join(index.segments.splits())
    return [
        ok("shards", f"{shards}: {counted(int(index.segments.length.sum()), 'letter')}; splits: {splits}")
    ]


def _answer(command: Sequence[str]) -> str:
    """The first line that a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[0] if lines else ""


def _skew(uri: str, now: Callable[[], float]) -> float | None:
    """Seconds that a server's clock is ahead of this machine's; None if its answer has no date."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT_S) as answer:
            date = answer.headers.get("Date")
    except (OSError, ValueError):
        return None
    return None if date is None else parsedate_to_datetime(date).timestamp() - now()


def nvme_finding(config: RunConfig) -> list[Finding]:
    """Whether `zero.nvme_path` can be written, if it is set."""
    if config.zero.nvme_path is None:
        return []
    path = Path(config.zero.nvme_path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".megabase-doctor"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return [
            wrong(
                "NVMe", f"zero.nvme_path={path}: {error.strerror}", "name a directory on a disk of each node"
            )
        ]
    return [ok("NVMe", f"{path} can be written")]
