"""Draws what is in a shard set: its composition, and where splits and gaps lie in the longest records.

Reads a bounded sample of the bases, spread evenly over all splits and always the same.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TEST, TRAIN, VALID, Segments
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report.blocks import spread_blocks
from megabase.datamodules.report.description import in_order, record_lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLE_BASES = 16_000_000
MOST_RECORDS, MOST_LETTERS = 12, 24

_BLOCK = 1 << 16
_COLUMNS = 1000
_COLOURS = {TRAIN: "#9CC3DB", VALID: "#E69F00", TEST: "#CC79A7"}
_ABSENT = "#333333"


def draw(index: ShardIndex, path: Path) -> None:
    """Draw the composition of a sample of the bases, and splits and gaps along the longest records.

    Args:
        index: the opened shards.
        path: the file to write; must end in .png.

    Raises:
        DataError: the path does not end in .png or cannot be written, or bases cannot be read.
    """
    if path.suffix != ".png":
        raise DataError(f"--picture {path}: the name must end in .png")
    # The object interface: pyplot keeps global state and looks for a display.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = longest_records(index.segments)
    figure = Figure(figsize=(12, max(3.6, 1.6 + 0.3 * len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    _draw_composition(left, index)
    _draw_records(right, index.segments, shown)
    keys = {split: _colour(split) for split in in_order(index.segments.splits())} | {"no letters": _ABSENT}
    handles = [Patch(color=colour, label=name) for name, colour in keys.items()]
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower right", ncols=len(handles))
    figure.suptitle(str(index.directory), fontsize=11, x=0.01, ha="left")
    partial = path.with_name(path.stem + ".partial.png")
    try:
        figure.savefig(partial, dpi=120)
        partial.rename(path)
    except OSError as error:
        raise DataError(f"--picture {path}: cannot be written ({error.strerror})") from None


def composition(index: ShardIndex, bases: int = SAMPLE_BASES) -> dict[str, float]:
    """Share of each letter among about `bases` bases, case ignored, in the alphabet's order; "other" comes last."""
    letters = index.alphabet.letters
    counts = np.zeros(index.alphabet.vocab_size, np.int64)
    for row, start, length in spread_blocks(index.segments, np.arange(len(index.segments)), bases, _BLOCK):
        tokens = index.alphabet.encode(index.read(row, start, length))
        counts += np.bincount(tokens, minlength=len(counts))
    shares = counts / counts.sum()
    found = {_printed(letter): float(shares[FIRST_LETTER + i]) for i, letter in enumerate(letters)}
    return {**found, "other": float(shares[:FIRST_LETTER].sum())}


def longest_records(segments: Segments, most: int = MOST_RECORDS) -> dict[str, int]:
    """The names of the longest records, longest first, and their bases."""
    lengths = sorted(record_lengths(segments).items(), key=lambda record: -record[1])
    return dict(lengths[:most])


def runs_of_gaps(segments: Segments, rows: NDArray[np.int64], column: int) -> NDArray[np.int64]:
    """Where a record has bases that are not letters, at a resolution that a picture can show.

    Args:
        segments: the index.
        rows: the record's rows.
        column: resolution in bases: a million gaps become at most one mark per column.

    Returns:
        (runs, 2) [start, length] in bases of the record.
    """
    gaps = np.concatenate(
        [
            segments.gaps[segments.gap_bounds[row] : segments.gap_bounds[row + 1]] + [segments.start[row], 0]
            for row in rows
        ]
    )
    first, last = gaps[:, 0] // column, (gaps.sum(axis=1) - 1) // column
    steps = np.zeros(int(last.max(initial=-1)) + 3, np.int64)
    np.add.at(steps, first + 1, 1)
    np.add.at(steps, last + 2, -1)
    marked = np.cumsum(steps) > 0
    edges = np.flatnonzero(marked[1:] != marked[:-1]).reshape(-1, 2)
    return np.stack([edges[:, 0], edges[:, 1] - edges[:, 0]], axis=1) * column


def _draw_composition(axes: "Axes", index: ShardIndex) -> None:
    shares = composition(index)
    other = shares.pop("other")
    common = sorted(shares, key=lambda letter: -shares[letter])[:MOST_LETTERS]
    shown = {letter: share for letter, share in shares.items() if letter in common}
    rest = other + sum(shares.values()) - sum(shown.values())
    values = [100 * share for share in (*shown.values(), rest)]
    colours = ["#0072B2"] * len(shown) + [_ABSENT]
    bars = axes.bar(range(len(values)), values, color=colours)
    if len(values) <= 6:
        axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], fontsize=9, padding=2)
        axes.margins(y=0.1)
    axes.set_xticks(range(len(values)), [*shown, "other"], fontsize=9)
    axes.set_title("composition (% of a sample)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_records(axes: "Axes", segments: Segments, shown: dict[str, int]) -> None:
    from matplotlib.ticker import EngFormatter

    column = max(1, -(-max(shown.values()) // _COLUMNS))
    for place, record in enumerate(shown):
        rows = np.flatnonzero(segments.record == record)
        for row in rows:
            span = (int(segments.start[row]), int(segments.length[row]))
            axes.broken_barh([span], (place - 0.35, 0.7), color=_colour(segments.split[row]))
        gaps = runs_of_gaps(segments, rows, column)
        axes.broken_barh([(int(a), int(b)) for a, b in gaps], (place - 0.35, 0.7), color=_ABSENT)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_yticks(range(len(shown)), [name if len(name) <= 24 else name[:23] + "…" for name in shown])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, max(shown.values()))
    axes.set_xlabel("bases")
    axes.set_title("longest records: splits, and runs that are no letters", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(split: str) -> str:
    return _COLOURS.get(split, "#BBBBBB")


def _printed(letter: int) -> str:
    """A byte as the label of a tick: itself, or its number if it cannot be printed."""
    return chr(letter) if 0x20 < letter < 0x7F else f"{letter:02x}"
