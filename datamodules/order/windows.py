"""Which windows exist: pure functions of numbers, known from the index alone.

Windows lie at multiples of `stride` within a segment (null: of `length`, so that they do not overlap), so none
crosses a split's border. A segment with BED intervals has windows for each of them instead: at multiples of
`stride` from its start if the interval is at least `length` long, else one that is centred on it and moved to stay
inside the segment; two of these may overlap, the same window never comes twice. A segment shorter than `length` is
in no window, or, packed, in those of a tape (`packing`).

Windows of one segment or interval are a run: first, step and number. Those with too few letters are ranges that
numbering jumps over. So memory is a few numbers per segment, interval and gap (a run of non-letters), whatever the
number of windows: the 3 million windows of 1024 bases of a human genome take less than 1 MB.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.letters import Letters
from megabase.datamodules.index.segments import Segments
from megabase.datamodules.order.mixture import groups_of
from megabase.datamodules.order.packing import Tape

PACKED = -1
"""The row of a packed window; its start is a position of the tape."""

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """The windows of a split, numbered 0 .. n-1: by group, and within it in the order of the index, packed ones last.

    split: its name. length: bases per window.
    segment_letters: letters of any part of any row. segment_length: (rows of the index,) bases.
    rows, starts, steps: (runs,) of each run of windows its row in the index or `PACKED`, the first window's first
        base within the segment or position on the tape, and the distance to the next one's.
    first: (runs + 1,) number of windows before each run, skipped ones included ("raw" numbers).
    skip_ids, skipped: of the i-th range of skipped windows the id of the window that would be its first, (ranges,),
        and the number skipped before it, (ranges + 1,).
    bounds: (groups + 1,) window ids; group g is [bounds[g], bounds[g + 1]). weights: of the groups.
    tape: what is packed; None without packing.
    left_out: bases of the segments that are too short for a window and are not packed.
    All int64.
    """

    split: str
    length: int
    segment_letters: Letters
    segment_length: NDArray[np.int64]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    steps: NDArray[np.int64]
    first: NDArray[np.int64]
    skip_ids: NDArray[np.int64]
    skipped: NDArray[np.int64]
    bounds: tuple[int, ...]
    weights: tuple[float, ...]
    tape: Tape | None
    left_out: int

    @classmethod
    def of(
        cls,
        segments: Segments,
        split: str,
        length: int,
        min_real: float = 0.5,
        *,
        stride: int | None = None,
        pack: bool = False,
        mixture: Mapping[str, float] | None = None,
    ) -> "WindowPlan":
        """Plan the windows of `split` whose letters are at least `min_real` of `length`, and at least one.

        stride: None is `length`. pack: put segments shorter than `length` on a tape. mixture: see `groups_of`.

        Raises DataError if there is none in the split or in a group: the split is not there, no segment is long
        enough, or all have too few letters; for a mixture that does not fit; and for a length or stride below 1
        or a min_real outside [0, 1].
        """
        stride = length if stride is None else stride
        for name, value in (("length", length), ("stride", stride)):
            if value < 1:
                raise DataError(f"data.{name} {value}: must be at least 1 base")
        if not 0 <= min_real <= 1:
            raise DataError(f"data.min_real {min_real}: must lie between 0 and 1")
        mixture = mixture or {}
        rows = segments.rows_of(split)
        _check_split(segments, split, rows)
        groups = groups_of(segments, rows, mixture)
        if not pack:
            for name, members in groups.items():
                _check_lengths(segments, split, name, members, length)
        plan = cls._unfiltered(segments, split, length, stride, list(groups.values()), pack)
        raw_bounds = np.array(plan.bounds)
        plan = plan._without(plan._sparse(max(min_real * length, 1)))
        for name, before, after, total in zip(
            groups, plan.bounds, plan.bounds[1:], np.diff(raw_bounds), strict=False
        ):
            if before == after:
                raise DataError(
                    f"split {split!r}{_in_group(name)}: none of its {total} windows of {length} bases has "
                    f"{min_real:.0%} letters: lower data.min_real, or look at the input"
                )
        return replace(plan, weights=tuple(float(mixture.get(name, 1.0)) for name in groups))

    @classmethod
    def _unfiltered(
        cls,
        segments: Segments,
        split: str,
        length: int,
        stride: int,
        groups: Sequence[NDArray[np.int64]],
        pack: bool,
    ) -> "WindowPlan":
        """The plan of all windows, whatever they hold; every group weighs 1."""
        letters = Letters(segments)
        short = [rows[segments.length[rows] < length] for rows in groups]
        tape = Tape(letters, segments.length, short, length) if pack else None
        runs, bounds = [], [0]
        for group, rows in enumerate(groups):
            runs.append(_runs(segments, rows[segments.length[rows] >= length], length, stride))
            if tape is not None and tape.windows[group, 1]:
                start, count = tape.windows[group]
                runs.append(np.array([[PACKED, start, length, count]]))
            bounds.append(sum(len(run) for run in runs))
        table = np.concatenate(runs)
        first = np.concatenate([[0], np.cumsum(table[:, 3])])
        return cls(
            split=split,
            length=length,
            segment_letters=letters,
            segment_length=segments.length,
            rows=table[:, 0].copy(),
            starts=table[:, 1].copy(),
            steps=table[:, 2].copy(),
            first=first,
            skip_ids=np.zeros(0, np.int64),
            skipped=np.zeros(1, np.int64),
            bounds=tuple(first[bounds].tolist()),
            weights=(1.0,) * len(groups),
            tape=tape,
            left_out=0 if pack else sum(int(segments.length[rows].sum()) for rows in short),
        )

    def __len__(self) -> int:
        """n, the number of windows."""
        return int(self.first[-1] - self.skipped[-1])

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Window ids (any shape) in [0, n) -> their row in the index, and first base within that segment.

        A packed window's row is `PACKED`, and its start the position on the tape. IndexError for an id outside.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"window ids of split {self.split!r} must lie in [0, {len(self)})")
        return self._place(ids + self.skipped[np.searchsorted(self.skip_ids, ids, side="right")])

    def letters(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Window ids (any shape) in [0, n) -> letters in each, int64, known from the index alone."""
        return self.count(*self.locate(ids))

    def count(self, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Letters of windows anywhere: rows and starts (any shape) as `locate` gives them -> int64, same shape."""
        if self.tape is None:
            return self.segment_letters.count(rows, starts, self.length)
        packed, found = rows == PACKED, np.empty_like(starts)
        found[~packed] = self.segment_letters.count(rows[~packed], starts[~packed], self.length)
        found[packed] = self.tape.count(starts[packed])
        return found

    def moved(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], by: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Starts of windows after a move of so many bases each, kept inside their segments; packed ones stay."""
        inside = np.clip(starts + by, 0, self.segment_length[rows] - self.length)
        return np.where(rows == PACKED, starts, inside)

    def _place(self, raw: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Raw numbers -> rows and starts."""
        run = np.searchsorted(self.first, raw, side="right") - 1
        return self.rows[run], self.starts[run] + (raw - self.first[run]) * self.steps[run]

    def _without(self, ranges: NDArray[np.int64]) -> "WindowPlan":
        """This plan, whose ids are raw numbers, with the windows in the sorted ranges (n, 2) [first, end) skipped."""
        skipped = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])])
        bounds = np.array(self.bounds)[:, None]
        inside = np.clip(bounds - ranges[:, 0], 0, ranges[:, 1] - ranges[:, 0]).sum(axis=1)
        return replace(
            self,
            skip_ids=ranges[:, 0] - skipped[:-1],
            skipped=skipped,
            bounds=tuple((np.array(self.bounds) - inside).tolist()),
        )

    def _sparse(self, least: float) -> NDArray[np.int64]:
        """Ranges (n, 2) of raw numbers of the windows that hold fewer than `least` letters."""
        found = [np.zeros((0, 2), np.int64)]
        for raw in _numbers(self._doubtful()):
            few = raw[self.count(*self._place(raw)) < least]
            found.append(_as_ranges(few))
        return np.concatenate(found)

    def _doubtful(self) -> NDArray[np.int64]:
        """Disjoint ranges (n, 2) of raw numbers of the windows that a gap touches, and of all packed ones."""
        letters = self.segment_letters
        counts = np.diff(self.first)
        runs = np.flatnonzero(self.rows != PACKED)
        extent = (counts - 1) * self.steps + self.length
        low, high = letters.gaps_of(self.rows[runs], self.starts[runs], extent[runs])
        run, gap = np.repeat(runs, high - low), _counted_up(low, high)
        origin = letters.base[self.rows[run]] + self.starts[run]
        begin, end = letters.begin[gap] - origin, letters.end[gap + 1] - origin
        # Window k of a run holds bases [k * step, k * step + length).
        least = np.maximum((begin - self.length) // self.steps[run] + 1, 0)
        most = np.minimum(-(-end // self.steps[run]), counts[run])
        touched = np.stack([least, most], axis=1)[least < most] + self.first[run[least < most], None]
        packed = np.flatnonzero(self.rows == PACKED)
        whole = np.stack([self.first[packed], self.first[packed + 1]], axis=1)
        return _united(np.concatenate([touched, whole]))


def _runs(segments: Segments, rows: NDArray[np.int64], length: int, stride: int) -> NDArray[np.int64]:
    """(runs, 4) row, start, step, count of the windows of rows that are at least `length` long, in order."""
    marked = np.diff(segments.interval_bounds)[rows] > 0
    plain = rows[~marked]
    counts = (segments.length[plain] - length) // stride + 1
    whole = np.stack([plain, np.zeros_like(plain), np.full_like(plain, stride), counts], axis=1)
    runs = np.concatenate([whole, _interval_runs(segments, rows[marked], length, stride)])
    return runs[np.argsort(runs[:, 0], kind="stable")]


def _interval_runs(
    segments: Segments, rows: NDArray[np.int64], length: int, stride: int
) -> NDArray[np.int64]:
    """The same for rows with intervals."""
    bounds = segments.interval_bounds
    counts = np.diff(bounds)[rows]
    row = np.repeat(rows, counts)
    begin, size = segments.intervals[_counted_up(bounds[rows], bounds[rows] + counts)].T
    centred = np.clip(begin + size // 2 - length // 2, 0, segments.length[row] - length)
    tiled = size >= length
    start = np.where(tiled, begin, centred)
    count = np.where(tiled, (size - length) // stride + 1, 1)
    runs = np.stack([row, start, np.full_like(row, stride), count], axis=1)
    runs = runs[np.lexsort((start, row))]
    reach = runs[:, 1] + (runs[:, 3] - 1) * stride
    # Only rows in which runs get into each other can hold the same window twice: they are written out.
    met = (np.diff(runs[:, 0]) == 0) & (runs[1:, 1] <= reach[:-1])
    mixed = np.isin(runs[:, 0], runs[1:, 0][met])
    return np.concatenate([runs[~mixed], _distinct(runs[mixed], stride)])


def _distinct(runs: NDArray[np.int64], stride: int) -> NDArray[np.int64]:
    """The windows of runs, each once, as runs."""
    number = np.repeat(np.arange(len(runs)), runs[:, 3])
    start = runs[number, 1] + _counted_up(np.zeros(len(runs), np.int64), runs[:, 3]) * stride
    windows = np.unique(np.stack([runs[number, 0], start], axis=1), axis=0)
    breaks = (np.diff(windows[:, 0]) != 0) | (np.diff(windows[:, 1]) != stride)
    begins = np.concatenate([[0], np.flatnonzero(breaks) + 1]) if len(windows) else np.zeros(0, np.int64)
    counts = np.diff(begins, append=len(windows))
    return np.column_stack([windows[begins], np.full_like(begins, stride), counts])


def _counted_up(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """low[0], low[0] + 1, ... high[0] - 1, low[1], ...; nothing where high <= low."""
    counts = np.maximum(high - low, 0)
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(low - before, counts)


def _united(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranges (n, 2) [first, end) -> sorted ranges of the same numbers, none touching another."""
    if not len(ranges):
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    begins = np.concatenate([[0], np.flatnonzero(ranges[1:, 0] > reach[:-1]) + 1])
    ends = np.concatenate([begins[1:] - 1, [len(ranges) - 1]])
    return np.stack([ranges[begins, 0], reach[ends]], axis=1)


def _numbers(ranges: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The numbers in sorted ranges (n, 2), `_CHUNK` at a time."""
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    for start in range(0, int(ends[-1]) if len(ends) else 0, _CHUNK):
        turn = np.arange(start, min(start + _CHUNK, int(ends[-1])))
        within = np.searchsorted(ends, turn, side="right")
        yield ranges[within, 1] - ends[within] + turn


def _as_ranges(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorted numbers -> ranges (n, 2) [first, end)."""
    if not len(numbers):
        return np.zeros((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    begins, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(numbers) - 1]])
    return np.stack([numbers[begins], numbers[ends] + 1], axis=1)


def _check_split(segments: Segments, split: str, rows: NDArray[np.int64]) -> None:
    if not len(rows):
        raise DataError(
            f"split {split!r} is not in the shards (they hold {', '.join(segments.splits())}): prepare them "
            f"with --{split}, or choose another split"
        )


def _check_lengths(segments: Segments, split: str, group: str, rows: NDArray[np.int64], length: int) -> None:
    """Raise DataError unless a segment of the group is at least `length` bases long."""
    longest = rows[segments.length[rows].argmax()]
    if segments.length[longest] < length:
        raise DataError(
            f"split {split!r}{_in_group(group)} has no window of data.length {length}: the longest part of a record "
            f"in it, of {segments.record[longest]!r}, has {segments.length[longest]} bases: lower data.length to "
            "that, prepare longer records, or set data.pack=true"
        )


def _in_group(name: str) -> str:
    return f" (data.mixture {name!r})" if name else ""
