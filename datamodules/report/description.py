"""What is in a shard set: as numbers, as a table, and as a small picture.

The numbers come from the index alone, so describing a terabyte costs reading its index. Only the picture reads bases:
a bounded sample, spread evenly over all splits, always the same.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.config import DataConfig
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import TEST, TRAIN, VALID, Segments
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.planning import plan_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LENGTHS = {"1k": 1 << 10, "8k": 8 << 10, "32k": 32 << 10, "131k": 128 << 10, "1M": 1 << 20}
"""Context lengths that windows are counted for, by what they are called."""

SAMPLE_BASES = 16_000_000
MOST_RECORDS, MOST_LETTERS, MOST_SOURCES = 12, 24, 8

_BLOCK = 1 << 16
_COLUMNS = 1000
_COLOURS = {TRAIN: "#9CC3DB", VALID: "#E69F00", TEST: "#CC79A7"}
_ABSENT = "#333333"


@dataclass(frozen=True)
class SplitReport:
    """One split. bases: all of them. letters: those inside the alphabet. windows: how many of each of LENGTHS a run
    with default settings trains on or evaluates."""

    split: str
    segments: int
    bases: int
    letters: int
    windows: dict[str, int]


@dataclass(frozen=True)
class RecordReport:
    """A record, and its bases up to the end of its last segment."""

    record: str
    bases: int


@dataclass(frozen=True)
class Description:
    """What an index says. bytes: of all shards. sources: bases by input file ("" where the index does not say).

    Records without a base are in no split and not counted.
    """

    directory: str
    alphabet: str
    records: int
    shards: int
    bytes: int
    longest: RecordReport
    shortest: RecordReport
    splits: list[SplitReport]
    sources: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def describe(index: ShardIndex) -> Description:
    """Count what is in an opened shard set. Reads no bases. Raises DataError for an index without a row."""
    segments = index.segments
    if not len(segments):
        raise DataError(f"{index.directory}: the index has no row: prepare the shards again")
    lengths = _record_lengths(segments)
    longest, shortest = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
    return Description(
        directory=str(index.directory),
        alphabet=index.alphabet.name,
        records=len(lengths),
        shards=len(index.sizes),
        bytes=sum(index.sizes.values()),
        longest=RecordReport(longest, lengths[longest]),
        shortest=RecordReport(shortest, lengths[shortest]),
        splits=[_describe_split(segments, split) for split in _in_order(segments.splits())],
        sources=_sum_by(segments.source, segments.length),
    )


def text(description: Description) -> str:
    """The description as lines to print, without the last line end."""
    many = len(description.sources)
    known = sorted(description.sources.items(), key=lambda source: -source[1])
    sources = [f"  {bases:>15,} bases from {name}" for name, bases in known[:MOST_SOURCES] if name]
    if many > MOST_SOURCES:
        sources.append(f"  and {many - MOST_SOURCES:,} more files")
    longest, shortest = description.longest, description.shortest
    return "\n".join(
        [
            f"{description.directory}: {description.records:,} records in {description.shards:,} shards, "
            f"{_storage(description.bytes)}, alphabet {description.alphabet}",
            f"  longest record {longest.record}, {longest.bases:,} bases; shortest {shortest.record}, "
            f"{shortest.bases:,}",
            *sources,
            *_table(description.splits),
        ]
    )


def draw(index: ShardIndex, path: Path) -> None:
    """Draw the picture: composition of a sample of the bases; splits and runs of non-letters along the longest
    records. Raises DataError for a path that does not end in .png or cannot be written."""
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
    keys = {split: _colour(split) for split in _in_order(index.segments.splits())} | {"no letters": _ABSENT}
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
    """Letter -> its share of about `bases` bases, case ignored, in the alphabet's order; "other" comes last."""
    letters = index.alphabet.letters
    counts = np.zeros(index.alphabet.vocab_size, np.int64)
    for row, start, length in sample(index.segments, bases):
        tokens = index.alphabet.encode(index.read(row, start, length))
        counts += np.bincount(tokens, minlength=len(counts))
    shares = counts / counts.sum()
    found = {_printed(letter): float(shares[FIRST_LETTER + i]) for i, letter in enumerate(letters)}
    return {**found, "other": float(shares[:FIRST_LETTER].sum())}


def sample(segments: Segments, bases: int) -> Iterator[tuple[int, int, int]]:
    """(row, start, length) of blocks of all segments: every one, or evenly spread ones of about `bases` bases."""
    total = int(segments.length.sum())
    passed = taken = 0
    for row, whole in enumerate(segments.length.tolist()):
        for start in range(0, whole, _BLOCK):
            length = min(_BLOCK, whole - start)
            if taken * total <= passed * bases:
                taken += length
                yield row, start, length
            passed += length


def longest_records(segments: Segments, most: int = MOST_RECORDS) -> dict[str, int]:
    """The names of the longest records, longest first, and their bases."""
    lengths = sorted(_record_lengths(segments).items(), key=lambda record: -record[1])
    return dict(lengths[:most])


def runs_of_gaps(segments: Segments, rows: NDArray[np.int64], column: int) -> NDArray[np.int64]:
    """(runs, 2) [start, length] in bases of a record: where the segments `rows` hold non-letters, at a resolution of
    `column` bases, so that a picture of a million gaps has no more marks than columns."""
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


def _describe_split(segments: Segments, split: str) -> SplitReport:
    rows = segments.rows_of(split)
    bases = int(segments.length[rows].sum())
    return SplitReport(
        split=split,
        segments=len(rows),
        bases=bases,
        letters=segments.letters_of(split),
        windows={name: _windows(segments, split, length) for name, length in LENGTHS.items()},
    )


def _windows(segments: Segments, split: str, length: int) -> int:
    try:
        return len(plan_windows(segments, split, length, DataConfig().min_real))
    except DataError:  # there is none
        return 0


def _record_lengths(segments: Segments) -> dict[str, int]:
    lengths: dict[str, int] = {}
    ends = (segments.start + segments.length).tolist()
    for record, end in zip(segments.record, ends, strict=True):
        lengths[record] = max(lengths.get(record, 0), end)
    return lengths


def _sum_by(names: NDArray[np.object_], numbers: NDArray[np.int64]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, number in zip(names, numbers.tolist(), strict=True):
        sums[name] = sums.get(name, 0) + number
    return sums


def _in_order(splits: list[str]) -> list[str]:
    """train, valid, test, then any other."""
    return sorted(splits, key=lambda split: ([TRAIN, VALID, TEST, split].index(split), split))


def _table(splits: list[SplitReport]) -> list[str]:
    """A line for each split under a line of headings, columns aligned."""
    heading = ["split", "segments", "bases", "letters", *(f"{name} windows" for name in LENGTHS)]
    rows = [
        [part.split, *(f"{n:,}" for n in (part.segments, part.bases, part.letters, *part.windows.values()))]
        for part in splits
    ]
    widths = [max(len(cell) for cell in column) for column in zip(heading, *rows, strict=True)]
    aligned = [str.ljust, *[str.rjust] * (len(heading) - 1)]
    return [
        "  " + "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True))
        for row in [heading, *rows]
    ]


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
    """A byte as a tick: itself, or its number where it cannot be seen."""
    return chr(letter) if 0x20 < letter < 0x7F else f"{letter:02x}"


def _storage(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,} bytes"
