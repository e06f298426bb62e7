"""The plan of a run as a table, and as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from megabase.pipeline.config.slurm import seconds_of_limit
from megabase.pipeline.plan.batches import Batches
from megabase.pipeline.plan.memory import DEVICE, DISK, HOST, PASS, UPDATE
from megabase.pipeline.plan.run import Plan
from megabase.pipeline.readable import counted, readable_size, readable_time
from megabase.pipeline.tables import new_table

_PLACES = {DEVICE: "", HOST: "in host memory", DISK: "on the disk"}
_WHEN = {PASS: "in the backward pass", UPDATE: "in the optimizer's step"}
_STEP = {
    "products": "matrix products",
    "attention": "with hashing and sorting",
    "streams": "what memory's bandwidth limits",
    "moving": "streams between host memory and GPU",
    "launches": "waiting for the host to launch them",
    "update": "AdamW",
    "reduction": "gradients and weights between ranks",
    "exchange": "positions of shared windows between ranks",
}
Row = tuple[str, str, str]


def as_table(plan: Plan, *more: Row) -> Table:
    """The plan as a table: what, how much, and how that comes about. more: further rows for its end."""
    table = new_table(("what", "how much", "how"), left=("what", "how"))
    table.show_header = False
    for row in [
        *_model(plan),
        *_batches(plan.batches),
        *_memory(plan),
        *_speed(plan),
        *_checkpoints(plan),
        *more,
    ]:
        table.add_row(*row)
    return table


def in_short(plan: Plan) -> str:
    """The plan in one line."""
    step, speed, space = plan.speed.step, plan.speed, plan.space
    return (
        f"{plan.profile.name}: by estimate a rank needs {readable_size(space.needed)} of memory, a step takes"
        f" {_seconds(step.total)}, the run {readable_time(speed.seconds)}"
    )


def limits_of(plan: Plan) -> list[Row]:
    """The rows of what fits."""
    fitting, config = plan.fitting, plan.config
    longest, micro = fitting.longest(config), fitting.largest_micro_batch(config)
    fewest = fitting.fewest_ranks(config)
    return [
        ("longest window that fits", f"{longest:,}" if longest else "none", "data.length"),
        ("largest micro batch that fits", f"{micro:,}" if micro else "none", "data.micro_batch"),
        (
            "fewest ranks that fit",
            "none" if fewest is None else f"{fewest:,}",
            "trainer.nodes x trainer.devices",
        ),
    ]


def as_json(plan: Plan, notes: list[str], warnings: list[str]) -> dict[str, Any]:
    """The plan as JSON: bytes, seconds, tokens."""
    fitting, config, space = plan.fitting, plan.config, plan.space
    return {
        "hardware": plan.profile.name,
        "precision": plan.precision,
        "parameters": plan.parameters,
        "batches": vars(plan.batches) | {"tokens_per_step": plan.batches.tokens_per_step},
        "memory": [vars(part) for part in [*plan.memory.states, *plan.memory.work]],
        "space": vars(space) | {"fits": space.fits},
        "step": vars(plan.speed.step) | {"total": plan.speed.step.total, "limit": plan.speed.step.limit},
        "tokens_per_second": plan.speed.tokens_per_second,
        "mfu": plan.speed.mfu,
        "seconds": plan.speed.seconds,
        "device_hours": plan.speed.device_hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "longest": fitting.longest(config),
        "largest_micro_batch": fitting.largest_micro_batch(config),
        "fewest_ranks": fitting.fewest_ranks(config),
        "limit": limit_of(plan),
        "notes": notes,
        "warnings": warnings,
    }


def limit_of(plan: Plan) -> str:
    """What limits the run: memory if it does not fit, else what takes the longest."""
    return plan.speed.step.limit if plan.space.fits else "memory"


def _model(plan: Plan) -> list[Row]:
    rows = [("parameters", f"{sum(plan.parameters.values()):,}", "")]
    return rows + [(f"  {part}", f"{count:,}", "") for part, count in plan.parameters.items()]


def _batches(batches: Batches) -> list[Row]:
    rows = [
        ("global batch", f"{batches.global_batch:,}", f"windows: {batches.product}"),
        ("tokens of a step", f"{batches.tokens_per_step:,}", f"windows of {batches.length:,} bases"),
    ]
    epochs = ""
    if batches.epochs is not None:
        least, most = (f"{epochs:,.3g}" for epochs in batches.epochs)
        epochs = f"{least} epochs" if least == most else f"{least} to {most} epochs, by genome"
        rows.append(("windows of an epoch", f"{batches.windows:,}", "all training windows"))
    return [
        *rows,
        ("steps", f"{batches.steps:,}", epochs),
        ("tokens of the run", f"{batches.tokens:,}", ""),
    ]


def _memory(plan: Plan) -> list[Row]:
    memory, space = plan.memory, plan.space
    verdict = "fits" if space.needed <= space.available else "DOES NOT FIT"
    rows = [
        (
            "memory of a rank",
            readable_size(space.needed),
            f"{verdict}: {plan.profile.name} has {readable_size(space.available)} for it",
        ),
        (
            "  states",
            readable_size(memory.total(DEVICE)),
            f"zero.stage={plan.config.zero.stage}, precision {plan.precision}",
        ),
    ]
    rows += [(f"    {part.name}", readable_size(part.bytes), _PLACES[part.place]) for part in memory.states]
    rows += [
        (f"  {part.name}", readable_size(part.bytes), _PLACES[part.place] or _WHEN.get(part.when, ""))
        for part in memory.work
    ]
    if space.host_needed > space.host_available:
        rows.append(
            (
                "host memory of a node",
                readable_size(space.host_needed),
                f"DOES NOT FIT: {readable_size(space.host_available)}",
            )
        )
    return rows


def _speed(plan: Plan) -> list[Row]:
    speed = plan.speed
    step = speed.step
    rows = [("time of a step", _seconds(step.total), f"limited by {step.limit}")]
    rows += [
        (f"  {kind}", _seconds(seconds), _STEP[kind]) for kind, seconds in vars(step).items() if seconds > 0
    ]
    each = speed.tokens_per_second / plan.batches.ranks
    hours = f"{_hours(speed.device_hours)} {'GPU' if plan.profile.device != 'cpu' else 'rank'}-hours"
    return [
        *rows,
        ("tokens a second", f"{speed.tokens_per_second:,.0f}", f"{each:,.0f} of a rank; MFU {speed.mfu:.1%}"),
        (
            "time of the run",
            readable_time(speed.seconds),
            f"{hours}, without evaluations and checkpoints{_starts(plan)}",
        ),
    ]


def _starts(plan: Plan) -> str:
    limit = seconds_of_limit(plan.config.slurm.time)
    if limit is None or limit <= plan.config.slurm.signal_seconds:
        return ""
    starts = -(-plan.speed.seconds // (limit - plan.config.slurm.signal_seconds))
    return f"; {counted(max(1, int(starts)), 'start')} of {plan.config.slurm.time}"


def _checkpoints(plan: Plan) -> list[Row]:
    size, kept = plan.checkpoint_bytes, plan.config.checkpoint
    steps = kept.every_steps * plan.speed.step.total
    every = [seconds for seconds in (steps, kept.every_minutes * 60) if seconds]
    interval = f"every {readable_time(min(every))}; " if every else ""
    text = (
        f"{interval}checkpoint.keep={kept.keep}: {readable_size((kept.keep + 1) * size)} while one is written"
    )
    return [("checkpoint", readable_size(size), text)]


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
