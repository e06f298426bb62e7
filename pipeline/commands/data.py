"""`megabase data SHARDS`: what is in a shard set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from megabase.datamodules.report.description import Description, SplitReport
    from megabase.datamodules.report.lengths import LengthReport

HELP = "what is in a shard set"
MOST_SOURCES = 8
MUCH = 0.2  # a split that loses a larger fraction of its bases to short records gets a hint


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="SHARDS", help="directory or URL of the shards")
    parser.add_argument(
        "--length", type=int, metavar="L", help="count the windows of data.length L, and what is in none"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="base composition and runs of N, drawn"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from megabase.datamodules.index.shard_index import ShardIndex
    from megabase.datamodules.report import description, lengths, picture
    from megabase.pipeline.tables import show

    index = ShardIndex.open(options.directory)
    found = description.describe(index)
    at_length = []
    if options.length is not None:
        at_length = [lengths.at_length(index.segments, part.split, options.length) for part in found.splits]
    if options.picture:
        picture.draw(index, options.picture)
    if options.json:
        more = {"length": [report.as_dict() for report in at_length]} if at_length else {}
        print(json.dumps({**found.as_dict(), **more}, indent=2))
    else:
        show(*_parts(found, index.alphabet.unit))
        show(*_parts_at_length(at_length, index.alphabet.unit))
    return 0


def _parts(found: Description, unit: str) -> Iterator[Table | str]:
    """What is printed, for `tables.show`; `unit` is what one letter is called."""
    from megabase.pipeline.readable import counted, readable_size

    yield (
        f"{found.directory}: {counted(found.records, 'record')} in {counted(found.shards, 'shard')}, "
        f"{readable_size(found.bytes)}, alphabet {found.alphabet}"
    )
    longest, shortest = found.longest, found.shortest
    yield (
        f"longest record {longest.record}, {longest.bases:,} {unit}s; shortest {shortest.record}, "
        f"{shortest.bases:,}"
    )
    yield _splits_table(found.splits, unit)
    if sources := [(name, bases) for name, bases in found.sources.items() if name]:
        yield _sources_table(sources, unit)
    if len(sources) > MOST_SOURCES:
        yield f"and {len(sources) - MOST_SOURCES:,} more files"


def _splits_table(splits: list[SplitReport], unit: str) -> Table:
    from megabase.datamodules.report.description import LENGTHS
    from megabase.pipeline.tables import new_table

    columns = ["split", "segments", f"{unit}s", "letters", *(f"{name} windows" for name in LENGTHS)]
    is_measured = any(part.leakage is not None for part in splits)
    table = new_table([*columns, *(["31-mers in train"] if is_measured else [])], left=["split"])
    for part in splits:
        numbers = (part.segments, part.bases, part.letters, *part.windows.values())
        leakage = "-" if part.leakage is None else f"{part.leakage:.1%}"
        table.add_row(part.split, *(f"{number:,}" for number in numbers), *([leakage] if is_measured else []))
    return table


def _parts_at_length(reports: list[LengthReport], unit: str) -> Iterator[Table | str]:
    """The windows of one length, and a hint for each split that loses much to short records."""
    from megabase.pipeline.readable import counted
    from megabase.pipeline.tables import new_table

    if not reports:
        return
    length = reports[0].length
    places = ["in windows", "in shorter segments", "behind the last window", "few letters"]
    columns = ["split", f"windows of {length:,}", *places]
    table = new_table(columns, left=["split"])
    for found in reports:
        inside = found.bases - found.short_bases - found.end_bases - found.sparse_bases
        parts = (inside, found.short_bases, found.end_bases, found.sparse_bases)
        table.add_row(
            found.split, f"{found.windows:,}", *(f"{part:,} ({part / found.bases:.1%})" for part in parts)
        )
    yield table
    for found in reports:
        if found.short_bases > MUCH * found.bases:
            segments = counted(found.short_segments, "segment")
            pack = (
                f"data.pack=true joins short ones ({counted(found.packed_windows, 'window')} instead of "
                f"{found.windows:,}), or "
            )
            yield (
                f"{found.split}: {segments} with {found.short_bases / found.bases:.1%} of its {unit}s "
                f"{'is' if found.short_segments == 1 else 'are'} shorter than {length:,}: "
                f"{pack if found.packed_windows > found.windows else ''}lower data.length"
            )


def _sources_table(sources: list[tuple[str, int]], unit: str) -> Table:
    """The files with the most letters."""
    from megabase.pipeline.tables import new_table

    table = new_table(["file", f"{unit}s"], left=["file"])
    for name, bases in sorted(sources, key=lambda source: -source[1])[:MOST_SOURCES]:
        table.add_row(name, f"{bases:,}")
    return table
