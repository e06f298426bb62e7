"""How runs stand, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from megabase.pipeline.readable import age, counted
from megabase.pipeline.rundir.figures import clock
from megabase.pipeline.slurm.status import Report
from megabase.pipeline.tables import new_table

_HEADINGS = (
    "run",
    "state",
    "step",
    "bits/base",
    "tokens/s",
    "left",
    "checkpoint",
    "restarts",
    "heartbeats",
    "SLURM",
)
_LEFT = ("run", "state", "checkpoint", "restarts", "heartbeats", "SLURM")


def as_table(reports: Sequence[Report]) -> Table:
    """A row for each run."""
    table = new_table(_HEADINGS, left=_LEFT)
    for each in reports:
        table.add_row(
            each.name, each.state, *_figures(each), _restarts(each), _heartbeats(each), _slurm(each)
        )
    return table


def details(reports: Sequence[Report]) -> list[str]:
    """What the states in the table do not tell: a line for each run that needs one."""
    return [f"{each.name}: {each.detail}" for each in reports if each.detail]


def as_json(reports: Sequence[Report]) -> str:
    """A list with an object for each run."""
    return json.dumps([as_dict(each) for each in reports], indent=2)


def as_dict(report: Report) -> dict[str, Any]:
    """A report for JSON. The names are documented in docs/slurm.md and stay; what is not known is null."""
    seen, figures, job = report.seen, report.seen.figures, report.job
    bits = figures.bits if figures.bits is not None and math.isfinite(figures.bits) else None
    ages = [seen.now - each.written for each in report.heartbeats] if report.alive else []
    return {
        "run": report.name,
        "directory": str(seen.directory.absolute()),
        "state": report.state,
        "detail": report.detail or None,
        "step": figures.step,
        "max_steps": figures.max_steps,
        "bits_per_base": bits,
        "tokens_per_second": report.tokens_per_second,
        "seconds_left": _rounded(report.seconds_left),
        "checkpoint_step": seen.checkpoint,
        "checkpoint_age": None if seen.checkpoint is None else _rounded(seen.now - seen.checkpoint_time),
        "restarts": seen.restarts,
        "stalls": seen.stalls,
        "stop_requested": seen.stop,
        "ranks": seen.size.ranks,
        "heartbeats": len(report.heartbeats) if report.alive else 0,
        "youngest_heartbeat": _rounded(min(ages, default=None)),
        "oldest_heartbeat": _rounded(max(ages, default=None)),
        "hanging": [
            {"rank": each.rank, "node": each.node, "step": each.step, "doing": each.doing}
            for each in (report.hang.ranks if report.hang else ())
        ],
        "job": job.id if job else next(iter(seen.jobs.submitted), None),
        "job_state": job.state if job else None,
        "job_reason": (job.reason or None) if job else None,
        "nodes": (job.nodes or None) if job else None,
        "jobs_left": report.jobs_left,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(seconds, 0.0), 1)


def _figures(report: Report) -> tuple[str, str, str, str, str]:
    """Step, bits per base, speed, time left, last checkpoint."""
    seen, figures = report.seen, report.seen.figures
    step = f"{figures.step:,}" if figures.step or figures.max_steps else ""
    speed, left = report.tokens_per_second, report.seconds_left
    return (
        step if figures.max_steps is None else f"{step} of {figures.max_steps:,}",
        "" if figures.bits is None else f"{figures.bits:.4f}",
        "" if speed is None else f"{speed:,.0f}",
        "" if left is None else clock(left),
        "" if seen.checkpoint is None else f"{seen.checkpoint:,}, {age(seen.now - seen.checkpoint_time)} ago",
    )


def _restarts(report: Report) -> str:
    """How often it was started again; a number of stalls only if the last start was one."""
    restarts, stalls = report.seen.restarts, report.seen.stalls
    text = str(restarts) if report.seen.jobs.all else ""
    return f"{text}, {counted(stalls, 'stall')}" if stalls else text


def _heartbeats(report: Report) -> str:
    """How many ranks have written one, and the age of the youngest and of the oldest."""
    if not report.alive or not report.heartbeats:
        return ""
    ages = [report.seen.now - each.written for each in report.heartbeats]
    youngest, oldest = age(min(ages)), age(max(ages))
    ranks = report.seen.size.ranks
    number = f"{len(ages)} of {ranks}" if ranks else str(len(ages))
    return f"{number}, {youngest}" if youngest == oldest else f"{number}, {youngest} to {oldest}"


def _slurm(report: Report) -> str:
    """Job, its state, its reason or nodes, and how many further jobs wait."""
    job = report.job
    if job is None:
        return ""
    text = f"{job.id} {job.state}"
    if job.waits and job.reason:
        text += f" ({job.reason})"
    elif job.nodes:
        text += f" {job.nodes}"
    return f"{text}, {report.jobs_left} more" if report.jobs_left else text
