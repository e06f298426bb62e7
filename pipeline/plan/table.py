"""The plan of a run as a table."""

from __future__ import annotations

from rich.table import Table

from megabase.pipeline.plan.batches import Batches
from megabase.pipeline.plan.memory import DEVICE, DISK, HOST
from megabase.pipeline.plan.run import Plan
from megabase.pipeline.readable import readable_size
from megabase.pipeline.tables import new_table

_PLACES = {DEVICE: "", HOST: "in host memory", DISK: "on the disk"}
Row = tuple[str, str, str]


def as_table(plan: Plan) -> Table:
    """The plan as a table: what, how much, and how that comes about."""
    table = new_table(("what", "how much", "how"), left=("what", "how"))
    table.show_header = False
    for row in [*_model(plan), *_batches(plan.batches), *_memory(plan), *_checkpoints(plan), _start(plan)]:
        table.add_row(*row)
    return table


def _model(plan: Plan) -> list[Row]:
    rows = [("parameters", f"{sum(plan.parameters.values()):,}", "")]
    return rows + [(f"  {part}", f"{count:,}", "") for part, count in plan.parameters.items()]


def _batches(batches: Batches) -> list[Row]:
    least, most = (f"{epochs:,.3g}" for epochs in batches.epochs)
    epochs = f"{least} epochs" if least == most else f"{least} to {most} epochs, by genome"
    return [
        (
            "global batch",
            f"{batches.global_batch:,}",
            f"windows: {batches.product}",
        ),
        ("tokens of a step", f"{batches.tokens_per_step:,}", f"windows of {batches.length:,} bases"),
        ("windows of an epoch", f"{batches.windows:,}", "all training windows"),
        ("steps", f"{batches.steps:,}", epochs),
        ("tokens of the run", f"{batches.tokens:,}", ""),
    ]


def _memory(plan: Plan) -> list[Row]:
    memory = plan.memory
    rows = [
        (
            "states of a rank",
            readable_size(memory.total(DEVICE)),
            f"zero.stage={plan.stage}, precision {plan.precision}",
        )
    ]
    rows += [(f"  {part.name}", readable_size(part.bytes), _PLACES[part.place]) for part in memory.states]
    rows.append(
        ("streams of a micro batch", readable_size(memory.streams), "with their gradients, at any depth")
    )
    rows.append(("other activations", "not known", "what one layer computes with; buckets, libraries"))
    return rows


def _checkpoints(plan: Plan) -> list[Row]:
    size = plan.checkpoint_bytes
    kept = f"checkpoint.keep={plan.keep}: {readable_size((plan.keep + 1) * size)} while one is written"
    return [("checkpoint", readable_size(size), kept)]


def _start(plan: Plan) -> Row:
    start = plan.start
    if start.finished:
        return ("start", f"step {start.step:,}", "finished: nothing is left to do")
    if start.refused:
        return ("start", "refused", start.refused)
    if not start.step:
        weights = f", from the weights of {plan.init_from}" if plan.init_from else ""
        return ("start", "step 0", f"a new run in {plan.directory}{weights}")
    unchecked = "" if start.verified else "; its checksums were not compared"
    return ("start", f"step {start.step:,}", f"resumes from its checkpoint{unchecked}")
