"""Which contestant runs when, and how often. Pure: `lab.py` runs and measures the calls.

At every size each contestant first makes a probe: one call whose memory is measured. Then all contestants take turns,
so that other load on the machine affects all of them alike; each round begins with another contestant. If the smaller
sizes show that a contestant would take too long or too much memory at a size, it is left out there, with a reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

OURS = "ours"
"""The contestant that the others are compared with. Names of our other contestants begin with it."""

LEAST_REPEATS = 3
"""The least number of timed calls, if there are any: fewer have no meaningful spread."""


WARM_UP = 0
"""The round that is not timed."""


@dataclass(frozen=True)
class Reason:
    """Why a contestant did not run at a size.

    Attributes:
        text: for the table.
        for_good: it cannot run at a larger size either.
        memory: there was not enough memory.
        failed: it should have run.
    """

    text: str
    for_good: bool = False
    memory: bool = False
    failed: bool = False


class LeftOut(Exception):
    """A contestant does not run. Keep its reason, not the exception, which keeps frames and their tensors alive."""

    def __init__(self, reason: Reason | str) -> None:
        self.reason = Reason(reason) if isinstance(reason, str) else reason
        super().__init__(self.reason.text)


@dataclass(frozen=True)
class Entry:
    """A contestant.

    Attributes:
        name: on the command line.
        label: in tables and pictures.
        growth: its time grows with this power of a large size.
    """

    name: str
    label: str
    growth: float = 1.0


@dataclass(frozen=True)
class Budget:
    """Limits. seconds: longest time of a call. repeats: timed calls of a contestant at a size; 0: the probe alone."""

    seconds: float
    repeats: int


@dataclass(frozen=True)
class Probe:
    """One call: its seconds, and the most bytes it held beyond those before it; None: not measured."""

    seconds: float
    peak_bytes: int | None


@dataclass
class Point:
    """A contestant at a size: its timed calls in seconds, or why there are none."""

    contestant: str
    size: int
    samples: list[float] = field(default_factory=list)
    probe: Probe | None = None
    left_out: Reason | None = None

    @property
    def seconds(self) -> float | None:
        """The median of the samples; the probe's time if nothing else was timed."""
        if self.samples:
            return statistics.median(self.samples)
        return None if self.probe is None else self.probe.seconds

    @property
    def peak_bytes(self) -> int | None:
        """The probe's peak memory."""
        return None if self.probe is None else self.probe.peak_bytes


Call = Callable[[], object]
"""What a contestant does once, with its inputs drawn."""


class Lab(Protocol):
    """Runs and measures calls. `probe` and `clock` raise LeftOut."""

    def probe(self, name: str, size: int, limit_s: float) -> Probe:
        """Run one call and measure its memory, if that is possible; it may be killed after much more than limit_s."""

    def clock(self, name: str, size: int, seed: int) -> float:
        """Seconds of one call, on inputs drawn with this seed."""

    def free_bytes(self) -> int | None:
        """Bytes that a probe may take; None: no limit, because running out of memory does no harm."""


def hold(
    entries: Sequence[Entry],
    sizes: Iterable[int],
    lab: Lab,
    budget: Budget,
    after: Callable[[list[Point]], None] = lambda points: None,
) -> list[Point]:
    """Measure every entry at every size, sizes ascending; `after` gets the points of each size."""
    points: list[Point] = []
    for size in sorted(sizes):
        here = []
        for entry in entries:
            before = [point for point in points if point.contestant == entry.name]
            here.append(probe(entry, size, before, lab, budget))
        take_turns(here, lab, budget)
        points += here
        after(here)
    return points


def climb(
    entry: Entry, start: int, lab: Lab, budget: Budget, after: Callable[[list[Point]], None]
) -> list[Point]:
    """Sizes start, 2 start, 4 start, ... up to the first at which the entry is left out: that is the last point."""
    points: list[Point] = []
    size = start
    while not points or points[-1].left_out is None:
        points.append(probe(entry, size, points, lab, budget))
        after(points[-1:])
        size *= 2
    return points


def probe(entry: Entry, size: int, before: Sequence[Point], lab: Lab, budget: Budget) -> Point:
    """The entry's point at a size, not timed yet. before: its points at smaller sizes, ascending."""
    point = Point(entry.name, size)
    try:
        foresee(entry, size, before, budget, lab.free_bytes())
        point.probe = lab.probe(entry.name, size, budget.seconds)
        # `foresee` may have expected less, or had no smaller size to judge by.
        if point.probe.seconds > 2 * budget.seconds:
            raise LeftOut(too_slow(point.probe.seconds))
    except LeftOut as error:
        point.left_out = error.reason
    return point


def foresee(entry: Entry, size: int, before: Sequence[Point], budget: Budget, free_bytes: int | None) -> None:
    """Raise LeftOut if the smaller sizes show that the entry cannot run at this size within budget and memory."""
    stopped = next((p.left_out for p in before if p.left_out is not None and p.left_out.for_good), None)
    ran = [point for point in before if point.probe is not None]
    if ran and not (stopped and stopped.memory):
        last = ran[-1]
        assert last.seconds is not None
        seconds = last.seconds * (size / last.size) ** entry.growth
        if seconds > budget.seconds:
            raise LeftOut(too_slow(seconds))
        if free_bytes is not None and last.peak_bytes is not None:
            needed = last.peak_bytes * size / last.size
            if needed > free_bytes:
                raise LeftOut(out_of_memory(f"out of memory (~{needed / 2**30:.0f} GiB)"))
    if stopped is not None:
        raise LeftOut(stopped)


def too_slow(seconds: float) -> Reason:
    """The reason of a contestant whose call takes so many seconds."""
    return Reason(f"too slow (~{seconds:,.{0 if seconds >= 10 else 1}f} s)", for_good=True)


def out_of_memory(text: str = "out of memory") -> Reason:
    """The reason of a contestant that has too little memory at this size, and therefore at larger ones."""
    return Reason(text, for_good=True, memory=True)


def take_turns(points: Sequence[Point], lab: Lab, budget: Budget) -> None:
    """Time the contestants whose probe succeeded: each warms up, then they take turns."""
    running = {point.contestant: point for point in points if point.left_out is None}
    repeats = {name: repeats_of(budget, point.seconds or 0.0) for name, point in running.items()}
    for turn, name in schedule(repeats):
        point = running[name]
        if point.left_out is None:
            try:
                seconds = lab.clock(name, point.size, seed=turn)
            except LeftOut as error:
                point.left_out = error.reason
                continue
            if turn != WARM_UP:
                point.samples.append(seconds)


def repeats_of(budget: Budget, seconds: float) -> int:
    """Timed calls of a contestant whose call takes `seconds`: as many as fit in the budget of one, within limits."""
    fitting = int(budget.seconds / seconds) if seconds > 0 else budget.repeats
    return min(budget.repeats, max(LEAST_REPEATS, fitting))


def schedule(repeats: dict[str, int]) -> Iterator[tuple[int, str]]:
    """Yield (round, name): each contestant once a round until its repeats are done. Who begins changes with the round.

    Round 0 warms up; the timed rounds are 1 to `repeats`.
    """
    names = [name for name, timed in repeats.items() if timed]
    for turn in range(max(repeats.values(), default=0) + 1):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            if turn <= repeats[name]:
                yield turn, name


def ratio(points: Sequence[Point], point: Point, to: str) -> float | None:
    """The time of a point as a multiple of that of contestant `to` at the same size; None if either has no time."""
    other = next((p for p in points if p.contestant == to and p.size == point.size), None)
    if other is None or other.left_out or point.left_out or not other.seconds or point.seconds is None:
        return None
    return point.seconds / other.seconds
