"""An evaluation as tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from megabase.pipeline.inference.evaluation.result import Evaluation, Recall
from megabase.pipeline.inference.evaluation.tally import Interval
from megabase.pipeline.tables import new_table

INTERVAL = ("bits/base", "95 % from", "to", "bases")


def as_tables(found: Evaluation) -> list[Table | str]:
    """The tables, each after a line that says what it is."""
    parts: list[Table | str] = [
        f"{found.model.path} (step {found.model.step:,}) on split {found.split} of {found.shards}:"
        f" {found.windows:,} windows of {found.length:,} bases",
        _summary(found),
    ]
    if found.contexts:
        parts += [
            "\nThe same bases with contexts of different length",
            _table("length", ((f"{each.length:,}", each.bits) for each in found.contexts)),
        ]
    parts += [
        "\nBy position in the window",
        _table("positions", ((f"{each.start:,}-{each.end - 1:,}", each.bits) for each in found.positions)),
    ]
    for title, groups in (("letter case", found.cases), ("class", found.classes)):
        if groups:
            parts += [f"\nBy {title}", _table(title, ((each.name, each.bits) for each in groups), left=True)]
    if found.recall:
        parts += ["\n" + _about(found.recall), _recall(found.recall)]
    return parts


def _summary(found: Evaluation) -> Table:
    table = new_table(("", *INTERVAL), left=("",))
    table.add_row("model", *_cells(found.bits_per_base))
    for order, value in found.markov.items():
        table.add_row(f"Markov order {order}", f"{value:.4f}", "", "", "")
    for program in found.compressors:
        table.add_row(program.name, f"{program.bits_per_base:.4f}", "", "", f"{program.bases:,}")
    return table


def _table(heading: str, rows: Iterable[tuple[str, Interval | None]], left: bool = False) -> Table:
    table = new_table((heading, *INTERVAL), left=(heading,) if left else ())
    for name, bits in rows:
        table.add_row(name, *_cells(bits))
    return table


def _about(recall: Recall) -> str:
    without = "" if recall.without is None else f"; without a source {recall.without.value:.4f} bits/base"
    return (
        f"Recall: copies of {recall.copy} bases, the first {recall.unscored} not scored{without}."
        f" A mutated source has {recall.changed:.0%} changed bases."
    )


def _recall(recall: Recall) -> Table:
    table = new_table(("copy", "distance", "bits/base", "gain", "95 % from", "to"), left=("copy",))
    for copy in recall.copies:
        bits, gain = copy.bits, copy.gain
        table.add_row(
            copy.kind,
            f"{copy.distance:,}",
            "" if bits is None else f"{bits.value:.4f}",
            *(("", "", "") if gain is None else _cells(gain, signed=True)[:3]),
        )
    return table


def _cells(bits: Interval | None, signed: bool = False) -> tuple[str, str, str, str]:
    if bits is None:
        return "", "", "", "0"
    sign = "+" if signed else ""
    return (*(f"{value:{sign}.4f}" for value in (bits.value, bits.low, bits.high)), f"{bits.bases:,}")  # type: ignore[return-value]
