"""Decides which windows of a split exist, from the index alone.

Windows lie at multiples of `stride` within a segment, so none crosses a split's border; without a stride they do not
overlap. A segment with BED intervals has windows for each of them instead: at multiples of `stride` from the interval's
start if it is at least `length` long, else one window that is centred on it and moved to stay inside the segment. Two
of these may overlap; the same window never exists twice. A segment shorter than `length` is in no window; with packing,
it is in the windows of a tape (see `packing`). Windows with too few letters are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.config import DataConfig
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.letters import Letters
from megabase.datamodules.index.segments import TRAIN, Segments
from megabase.datamodules.order.mixture import groups_of
from megabase.datamodules.order.packing import Tape
from megabase.datamodules.order.ranges import counted_up, integers, ranges_of, united
from megabase.datamodules.order.windows import PACKED, Runs, WindowPlan


def plan_training(config: DataConfig, alphabet: Alphabet, segments: Segments) -> WindowPlan:
    """Plan the windows to train on.

    Raises:
        DataError: there is none (see `plan_windows`), or a setting does not fit the alphabet.
    """
    if config.reverse_complement and alphabet.complement is None:
        raise DataError(
            f"data.reverse_complement {config.reverse_complement}: alphabet {alphabet.name} has no reverse "
            "complement: set it to 0"
        )
    if config.softmask_weight != 1 and alphabet.soft is None:
        raise DataError(
            f"data.softmask_weight {config.softmask_weight}: lower case does not mark repeats in alphabet "
            f"{alphabet.name}: set it to 1"
        )
    return plan_windows(
        segments,
        TRAIN,
        config.length,
        config.min_real,
        stride=config.stride,
        pack=config.pack,
        mixture=config.mixture,
    )


def plan_windows(
    segments: Segments,
    split: str,
    length: int,
    min_real: float = 0.5,
    *,
    stride: int | None = None,
    pack: bool = False,
    mixture: Mapping[str, float] | None = None,
) -> WindowPlan:
    """Plan the windows of a split whose letters are at least `min_real` of `length`, and at least one.

    Args:
        segments: the index.
        split: name of the split.
        length: bases per window.
        min_real: least fraction of letters, 0 to 1.
        stride: bases from the start of one window to the start of the next; None: `length`.
        pack: put segments shorter than `length` on a tape.
        mixture: weights of groups of records, see `groups_of`; None: one group.

    Raises:
        DataError: length or stride is below 1, or min_real outside [0, 1]; the split or a group has no window, because
            it does not exist, no segment is long enough, or all windows have too few letters; the mixture does not fit.
    """
    stride = length if stride is None else stride
    _check_settings(length, stride, min_real)
    mixture = mixture or {}
    rows = segments.rows_of(split)
    _check_split(segments, split, rows)
    groups = groups_of(segments, rows, mixture)
    if not pack:
        for name, members in groups.items():
            _check_lengths(segments, split, name, members, length)
    every = _every_window(segments, split, list(groups.values()), length, stride, pack)
    sparse = _sparse(every, max(min_real * length, 1))
    plan = _without(every, sparse)
    for number, name in enumerate(groups):
        if plan.bounds[number] == plan.bounds[number + 1]:
            total = every.bounds[number + 1] - every.bounds[number]
            raise DataError(
                f"split {split!r}{_in_group(name)}: none of its {total} windows of {length} bases has "
                f"{min_real:.0%} letters: lower data.min_real, or look at the input"
            )
    return replace(plan, weights=tuple(float(mixture.get(name, 1.0)) for name in groups))


def _every_window(
    segments: Segments,
    split: str,
    groups: Sequence[NDArray[np.int64]],
    length: int,
    stride: int,
    pack: bool,
) -> WindowPlan:
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
    return WindowPlan(
        split=split,
        length=length,
        letters=letters,
        segment_length=segments.length,
        runs=Runs(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), first),
        skip_ids=np.zeros(0, np.int64),
        skipped=np.zeros(1, np.int64),
        bounds=tuple(first[bounds].tolist()),
        weights=(1.0,) * len(groups),
        tape=tape,
        left_out=0 if pack else sum(int(segments.length[rows].sum()) for rows in short),
    )


def _without(every: WindowPlan, ranges: NDArray[np.int64]) -> WindowPlan:
    """A plan that skips nothing, with the windows in sorted ranges of its ids skipped."""
    sizes = ranges[:, 1] - ranges[:, 0]
    skipped = np.concatenate([[0], np.cumsum(sizes)])
    bounds = np.array(every.bounds)
    before = np.clip(bounds[:, None] - ranges[:, 0], 0, sizes).sum(axis=1)
    return replace(
        every,
        skip_ids=ranges[:, 0] - skipped[:-1],
        skipped=skipped,
        bounds=tuple((bounds - before).tolist()),
    )


def _runs(segments: Segments, rows: NDArray[np.int64], length: int, stride: int) -> NDArray[np.int64]:
    """(runs, 4) row, start, step, count of the windows of rows that are at least `length` long, in order."""
    has_intervals = np.diff(segments.interval_bounds)[rows] > 0
    plain = rows[~has_intervals]
    counts = (segments.length[plain] - length) // stride + 1
    tiled = np.stack([plain, np.zeros_like(plain), np.full_like(plain, stride), counts], axis=1)
    runs = np.concatenate([tiled, _interval_runs(segments, rows[has_intervals], length, stride)])
    return runs[np.argsort(runs[:, 0], kind="stable")]


def _interval_runs(
    segments: Segments, rows: NDArray[np.int64], length: int, stride: int
) -> NDArray[np.int64]:
    """(runs, 4) as `_runs`, for rows with BED intervals."""
    bounds = segments.interval_bounds
    row = np.repeat(rows, np.diff(bounds)[rows])
    begin, size = segments.intervals[counted_up(bounds[rows], bounds[rows + 1])].T
    centred = np.clip(begin + size // 2 - length // 2, 0, segments.length[row] - length)
    is_long = size >= length
    start = np.where(is_long, begin, centred)
    count = np.where(is_long, (size - length) // stride + 1, 1)
    runs = np.stack([row, start, np.full_like(row, stride), count], axis=1)
    runs = runs[np.lexsort((start, row))]
    last = runs[:, 1] + (runs[:, 3] - 1) * stride
    # The same window can occur twice only in rows where a run starts before the one ahead of it ends.
    overlaps = (np.diff(runs[:, 0]) == 0) & (runs[1:, 1] <= last[:-1])
    doubtful = np.isin(runs[:, 0], runs[1:, 0][overlaps])
    return np.concatenate([runs[~doubtful], _distinct(runs[doubtful], stride)])


def _distinct(runs: NDArray[np.int64], stride: int) -> NDArray[np.int64]:
    """The windows of runs, each once, as runs."""
    number = np.repeat(np.arange(len(runs)), runs[:, 3])
    start = runs[number, 1] + counted_up(np.zeros(len(runs), np.int64), runs[:, 3]) * stride
    windows = np.unique(np.stack([runs[number, 0], start], axis=1), axis=0)
    breaks = (np.diff(windows[:, 0]) != 0) | (np.diff(windows[:, 1]) != stride)
    begins = np.concatenate([[0], np.flatnonzero(breaks) + 1]) if len(windows) else np.zeros(0, np.int64)
    counts = np.diff(begins, append=len(windows))
    return np.column_stack([windows[begins], np.full_like(begins, stride), counts])


def _sparse(every: WindowPlan, least: float) -> NDArray[np.int64]:
    """Sorted ranges (n, 2) of ids of the windows that hold fewer than `least` letters, in a plan that skips nothing."""
    found = [np.zeros((0, 2), np.int64)]
    for ids in integers(_with_gaps(every)):
        found.append(ranges_of(ids[every.count_letters(*every.locate(ids)) < least]))
    return np.concatenate(found)


def _with_gaps(every: WindowPlan) -> NDArray[np.int64]:
    """Sorted ranges (n, 2) of ids of the windows that touch a gap, and of all packed ones. All others are full."""
    letters, runs, length = every.letters, every.runs, every.length
    counts = np.diff(runs.first)
    plain = np.flatnonzero(runs.rows != PACKED)
    extent = (counts - 1) * runs.steps + length
    low, high = letters.gaps_of(runs.rows[plain], runs.starts[plain], extent[plain])
    run, gap = np.repeat(plain, high - low), counted_up(low, high)
    origin = letters.base[runs.rows[run]] + runs.starts[run]
    begin, end = letters.begin[gap] - origin, letters.end[gap + 1] - origin
    # Window k of a run holds bases [k * step, k * step + length).
    first = np.maximum((begin - length) // runs.steps[run] + 1, 0)
    after = np.minimum(-(-end // runs.steps[run]), counts[run])
    some = first < after
    touched = np.stack([first, after], axis=1)[some] + runs.first[run[some], None]
    packed = np.flatnonzero(runs.rows == PACKED)
    return united(np.concatenate([touched, np.stack([runs.first[packed], runs.first[packed + 1]], axis=1)]))


def _check_settings(length: int, stride: int, min_real: float) -> None:
    for name, value in (("length", length), ("stride", stride)):
        if value < 1:
            raise DataError(f"data.{name} {value}: must be at least 1 base")
    if not 0 <= min_real <= 1:
        raise DataError(f"data.min_real {min_real}: must lie between 0 and 1")


def _check_split(segments: Segments, split: str, rows: NDArray[np.int64]) -> None:
    if not len(rows):
        option = f"prepare them with --{split}, or " if split in ("valid", "test") else ""
        raise DataError(
            f"split {split!r} is not in the shards (they hold {', '.join(segments.splits())}):"
            f" {option}choose another split"
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
