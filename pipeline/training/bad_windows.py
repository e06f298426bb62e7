"""The windows of a bad step: the first of them for the message, all of them for a file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabase.datamodules.batches.numbered import TrainBatches
from megabase.datamodules.files import publish_json
from megabase.datamodules.order.hashing import visit_keys
from megabase.datamodules.order.packing import Piece
from megabase.datamodules.order.training_order import slots
from megabase.datamodules.order.windows import PACKED
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import first_line
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.training.guard import Trouble

# The most windows that a message names.
SHOWN = 3
# A micro batch stands out if its loss is above this multiple of the median of its step.
OUTLIER = 2.0


def report(
    config: RunConfig,
    trouble: Trouble,
    groups: Groups,
    nats: list[float],
    windows_of_step: Callable[[int], list[dict[str, Any]]],
) -> str:
    """Write the windows of a step to `logs/bad-step-N.json` of the run directory. All ranks call it.

    The windows are a function of the step's number. Only the losses of micro batches are gathered from the ranks.

    Args:
        config: of the run.
        trouble: the step, and what is bad there.
        groups: of ranks.
        nats: of each micro batch of this rank in the step.
        windows_of_step: see `Task.windows_of`.

    Returns:
        What to print about the windows: the first that stand out, and the file that lists all.
    """
    world = groups.world
    gathered = groups.summed(world.gather(nats))
    if world.rank != 0:
        return str(world.broadcast(None))
    windows = windows_of_step(trouble.step)
    outliers = _outliers(gathered)
    for rank, losses in enumerate(gathered):
        for turn, loss in enumerate(losses):
            mine = slots(turn, rank, groups.data_size, config.data.micro_batch)
            for window in windows[mine]:
                window |= {
                    "rank": rank * groups.sequence_ranks,
                    "micro_batch": turn,
                    "micro_batch_nats": _number(loss),
                }
                window["stands_out"] = (rank, turn) in outliers
    windows.sort(key=lambda window: not window.get("stands_out", False))
    path = RunPaths(config.directory).bad_step(trouble.step)
    content = {"step": trouble.step, "why": trouble.text, "on_bad": config.guard.on_bad, "windows": windows}
    text = _describe(windows, len(outliers) == sum(map(len, gathered))) + _write(path, content)
    return str(world.broadcast(text))


def windows_of(config: RunConfig, batches: TrainBatches, step: int) -> list[dict[str, Any]]:
    """The windows of a step of the journal, in the order of the global batch, each with the places it was read from."""
    plan, segments = batches.windows.plan, batches.windows.index.segments
    samples, epochs = batches.order.of_step(step - 1, config.data.global_batch)
    visits = batches.windows.visits(samples, visit_keys(batches.seed, epochs, samples))
    found: list[dict[str, Any]] = []
    for sample, row, start, turned in zip(
        samples.tolist(), visits.rows.tolist(), visits.starts.tolist(), visits.reverse.tolist(), strict=True
    ):
        pieces = [Piece(row, start, 0, plan.length)]
        if row == PACKED:
            assert plan.tape is not None
            pieces = plan.tape.pieces(start)
        places = [
            {
                "source": str(segments.source[piece.row]),
                "record": str(segments.record[piece.row]),
                "start": int(segments.start[piece.row]) + piece.start,
                "end": int(segments.start[piece.row]) + piece.start + piece.length,
            }
            for piece in pieces
        ]
        found.append({"sample": sample, "places": places, "reverse_complement": turned})
    return found


def _outliers(nats: list[list[float]]) -> set[tuple[int, int]]:
    """(rank, micro batch) of the micro batches whose nats are not finite; if all are, of those far above the median."""
    known = {(rank, turn): loss for rank, losses in enumerate(nats) for turn, loss in enumerate(losses)}
    broken = {place for place, loss in known.items() if not math.isfinite(loss)}
    if broken or not known:
        return broken
    usual = statistics.median(known.values())
    return {place for place, loss in known.items() if loss > OUTLIER * usual}


def _describe(windows: list[dict[str, Any]], all_stand_out: bool) -> str:
    """The first windows that stand out, or the first of all, as a part of a sentence."""
    chosen = [window for window in windows if window.get("stands_out")]
    if not chosen:
        start = "windows of this step: "
    elif all_stand_out:
        start = (
            "every micro batch of this step is bad, so the weights may have been bad before it; its windows: "
        )
    else:
        start = "the loss stands out in "
    named = []
    for window in (chosen or windows)[:SHOWN]:
        places = ", ".join(
            f"{place['record']}:{place['start']}-{place['end']}" for place in window["places"][:2]
        )
        named.append(f"window {window['sample']} ({places}{', ...' * (len(window['places']) > 2)})")
    more = len(chosen or windows) - len(named)
    return start + ", ".join(named) + (f" and {more} more" if more else "")


def _write(path: Path, content: dict[str, Any]) -> str:
    """Write the file; returns the end of a sentence that names the file, or says why it cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        publish_json(path, content)
    except OSError as error:  # a full disk must not hide the message about bad numbers
        return f" ({path} cannot be written: {first_line(error)})"
    return f"; all are in {path}"


def _number(value: float) -> float | str:
    # As in the journal: JSON has no NaN and no infinities.
    return value if math.isfinite(value) else repr(value)
