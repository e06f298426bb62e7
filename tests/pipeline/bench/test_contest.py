"""Which contestant runs when, what is left out, and why."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline.bench import contest
from megabase.pipeline.bench.contest import Budget, Entry, LeftOut, Point, Probe, Reason

MIB = 2**20


class FakeLab:
    """Contestants whose time and memory are formulas. stops: (name, size) -> the reason why its probe fails."""

    def __init__(
        self, seconds: dict[str, Any], *, free: int | None = None, stops: dict | None = None
    ) -> None:
        self.seconds, self.free, self.stops = seconds, free, stops or {}
        self.calls: list[tuple[str, str, int, int]] = []

    def free_bytes(self) -> int | None:
        return self.free

    def probe(self, name: str, size: int, limit_s: float) -> Probe:
        self.calls.append(("probe", name, size, 0))
        if (name, size) in self.stops:
            raise LeftOut(self.stops[name, size])
        return Probe(self.seconds[name](size), size * MIB)

    def clock(self, name: str, size: int, seed: int) -> float:
        self.calls.append(("clock", name, size, seed))
        return self.seconds[name](size) * (1 + 0.01 * seed)


def linear(size: int) -> float:
    return size / 1000


def square(size: int) -> float:
    return size * size / 1000


A, B = Entry("a", "A"), Entry("b", "B", growth=2.0)


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(0, 6)))
def test_schedule_gives_every_contestant_its_turns_and_one_to_warm_up(repeats):
    turns = list(contest.schedule(repeats))
    for name, count in repeats.items():
        rounds = [turn for turn, who in turns if who == name]
        assert rounds == (list(range(count + 1)) if count else [])
    assert [turn for turn, _ in turns] == sorted(turn for turn, _ in turns)


def test_each_round_begins_with_another_contestant():
    turns = list(contest.schedule({"a": 2, "b": 2, "c": 2}))
    assert [name for _, name in turns] == [*"abc", *"bca", *"cab"]


def test_contestants_take_turns_and_the_warm_up_is_not_counted():
    fake = FakeLab({"a": linear, "b": linear})
    points = contest.hold([A, B], [8], fake, Budget(seconds=10.0, repeats=3))
    clocked = [(name, seed) for kind, name, _, seed in fake.calls if kind == "clock"]
    assert clocked == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 3)]
    assert [len(point.samples) for point in points] == [3, 3]
    assert points[0].seconds == pytest.approx(0.008 * 1.02)  # the median: round 2


def test_time_that_does_not_fit_is_foreseen_by_growth():
    fake = FakeLab({"a": linear, "b": square})
    points = contest.hold([A, B], [64, 16, 32, 128], fake, Budget(seconds=3.0, repeats=1))
    left_out = {(p.contestant, p.size): p.left_out.text for p in points if p.left_out}
    assert left_out == {("b", 64): "too slow (~4.1 s)", ("b", 128): "too slow (~17 s)"}
    assert not [call for call in fake.calls if call[1] == "b" and call[2] > 32]


def test_too_little_memory_is_foreseen():
    points = contest.hold([A], [1024, 2048], FakeLab({"a": linear}, free=1500 * MIB), Budget(99.0, repeats=1))
    assert [p.left_out and p.left_out.text for p in points] == [None, "out of memory (~2 GiB)"]


def test_a_contestant_that_ran_out_of_memory_is_not_tried_at_larger_sizes():
    fake = FakeLab({"a": linear}, stops={("a", 2): contest.out_of_memory()})
    points = contest.hold([A], [1, 2, 4], fake, Budget(99.0, repeats=1))
    assert [p.left_out and p.left_out.text for p in points] == [None, "out of memory", "out of memory"]
    assert ("probe", "a", 4, 0) not in fake.calls


def test_a_contestant_that_cannot_run_at_one_size_is_tried_at_the_next():
    fake = FakeLab({"a": linear}, stops={("a", 2): Reason("takes lengths that are multiples of 4")})
    points = contest.hold([A], [2, 4], fake, Budget(99.0, repeats=1))
    assert [bool(p.samples) for p in points] == [False, True]


def test_a_contestant_whose_probe_is_far_over_the_budget_is_left_out():
    points = contest.hold([A], [5000, 6000], FakeLab({"a": linear}), Budget(1.0, repeats=3))
    assert [p.left_out.text for p in points if p.left_out] == ["too slow (~5.0 s)", "too slow (~6.0 s)"]


@pytest.mark.parametrize(("seconds", "repeats"), [(0.1, 9), (2.0, 5), (9.0, 3), (20.0, 3)])
def test_repeats_fit_the_budget_but_are_never_fewer_than_three(seconds, repeats):
    assert contest.repeats_of(Budget(10.0, 9), seconds) == repeats


def test_no_repeats_means_the_probe_alone():
    fake = FakeLab({"a": linear})
    points = contest.hold([A], [2, 4], fake, Budget(10.0, repeats=0))
    assert {kind for kind, *_ in fake.calls} == {"probe"}
    assert [p.seconds for p in points] == [0.002, 0.004]


def test_climbing_ends_at_the_first_size_that_does_not_fit():
    sizes: list[int] = []
    fake = FakeLab({"a": linear}, stops={("a", 32): contest.out_of_memory()})
    points = contest.climb(A, 4, fake, Budget(10.0, 0), lambda points: sizes.append(points[0].size))
    assert [p.size for p in points] == sizes == [4, 8, 16, 32]
    assert [p.left_out is None for p in points] == [True, True, True, False]


def test_ratio_is_of_medians_at_the_same_size():
    points = [Point("ours", 8, [1.0, 2.0, 9.0]), Point("b", 8, [6.0, 5.0, 7.0]), Point("b", 16, [1.0])]
    assert contest.ratio(points, points[1], "ours") == 3.0
    assert contest.ratio(points, points[2], "ours") is None
    points[0].left_out = Reason("failed")
    assert contest.ratio(points, points[1], "ours") is None


def test_a_reason_can_be_sent_from_another_process():
    assert pickle.loads(pickle.dumps(Reason("x", for_good=True))) == Reason("x", for_good=True)
