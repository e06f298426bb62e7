"""Which windows exist, against definitions that look at every base."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segments
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.packing import Piece
from megabase.datamodules.order.planning import plan_windows
from megabase.datamodules.order.windows import PACKED, WindowPlan
from megabase.datamodules.prepare.splits import Splits
from tests.datamodules.order.made import Made, made


def letters_of(plan: WindowPlan, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Letters in each window."""
    return plan.count_letters(*plan.locate(ids))


def naive_windows(
    index: ShardIndex, split: str, length: int, min_real: float, stride: int | None = None
) -> list[tuple[int, int, int]]:
    """(row, start, letters) of every window, found by looking at every base."""
    found = []
    for row in index.segments.rows_of(split):
        for start in range(0, int(index.segments.length[row]) - length + 1, stride or length):
            bases = index.read(row, start, length)
            letters = int((index.alphabet.encode(bases) >= 5).sum())
            if letters >= max(min_real * length, 1):
                found.append((int(row), start, letters))
    return found


def listed(plan: WindowPlan) -> list[tuple[int, int]]:
    """Row and start of every window."""
    rows, starts = plan.locate(np.arange(len(plan)))
    return list(zip(rows.tolist(), starts.tolist(), strict=True))


@given(
    split=st.sampled_from(["train", "valid", "test"]),
    length=st.integers(1, 700),
    min_real=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    stride=st.none() | st.integers(1, 900),
)
@settings(max_examples=80, deadline=None)
def test_plan_equals_a_search_over_every_base(
    gappy_shards: ShardIndex, split: str, length: int, min_real: float, stride: int | None
) -> None:
    expected = naive_windows(gappy_shards, split, length, min_real, stride)
    if not expected:
        with pytest.raises(DataError):
            plan_windows(gappy_shards.segments, split, length, min_real, stride=stride)
        return
    plan = plan_windows(gappy_shards.segments, split, length, min_real, stride=stride)
    rows, starts = plan.locate(np.arange(len(plan)))
    assert list(zip(rows, starts, letters_of(plan, np.arange(len(plan))), strict=True)) == expected
    assert plan.bounds == (0, len(plan))


records = st.lists(st.text(alphabet="ACgtNN", max_size=40).map(str.encode), min_size=1, max_size=6)


def test_no_base_of_one_split_is_in_another_s_windows(gappy_shards: ShardIndex) -> None:
    segments = gappy_shards.segments
    owner: dict[tuple[str, int], str] = {}
    for split in segments.splits():
        plan = plan_windows(segments, split, 37, 0.0)
        for row, start in zip(*plan.locate(np.arange(len(plan))), strict=True):
            first = int(segments.start[row] + start)
            for base in range(first, first + 37):
                assert owner.setdefault((segments.record[row], base), split) == split
                assert segments.start[row] <= base < segments.start[row] + segments.length[row]


@st.composite
def bed_lines(draw: st.DrawFn, sizes: Sequence[int]) -> list[str]:
    """Lines of a BED file: intervals in records r0, r1, ... of those sizes, apart from each other."""
    lines = []
    for number, size in enumerate(sizes):
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=10, unique=True)))
        for start, end in zip(cuts[::2], cuts[1::2], strict=False):
            lines.append(f"r{number}\t{start}\t{end}\t{draw(st.sampled_from(['train', 'valid', 'test']))}\n")
    return lines


@given(sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3), data=st.data())
@settings(max_examples=60)
def test_no_base_is_seen_by_two_splits_whatever_the_intervals(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    """Windows of 8 bases to more than a record has, widened from their intervals and shifted."""
    lines = data.draw(bed_lines(sizes))
    assume(any(line.endswith("train\n") for line in lines))
    bed = tmp_path_factory.mktemp("bed") / "splits.bed"
    bed.write_text("".join(lines))
    splits = Splits.parse(intervals=bed)
    segments = made(
        [
            Made(
                b"A" * part.length,
                part.split,
                record=f"r{number}",
                start=part.start,
                intervals=part.intervals,
            )
            for number, size in enumerate(sizes)
            for part in splits.of(f"r{number}", size)
        ]
    )
    length, stride = data.draw(st.integers(8, 160)), data.draw(st.none() | st.integers(1, 60))
    shift, pack = data.draw(st.integers(0, 60)), data.draw(st.booleans())
    owner: dict[tuple[str, int], str] = {}
    for split in segments.splits():
        try:
            plan = plan_windows(segments, split, length, 0.0, stride=stride, pack=pack)
        except DataError:
            continue
        rows, starts = plan.locate(np.arange(len(plan)))
        for by in (0, -shift, shift):
            for row, start in zip(
                rows.tolist(), plan.moved(rows, starts, by + 0 * starts).tolist(), strict=True
            ):
                whole = [Piece(row, start, 0, length)]
                for piece in plan.tape.pieces(start) if plan.tape and row == PACKED else whole:
                    first = int(segments.start[piece.row]) + piece.start
                    assert 0 <= piece.start <= segments.length[piece.row] - piece.length
                    for base in range(first, first + piece.length):
                        assert owner.setdefault((segments.record[piece.row], base), split) == split


def naive_interval_windows(
    size: int, intervals: Sequence[tuple[int, int]], length: int, stride: int
) -> list[int]:
    """Starts of the windows of a segment of `size` bases, one by one."""
    starts: set[int] = set()
    for begin, bases in intervals if size >= length else ():
        if bases >= length:
            starts |= set(range(begin, begin + bases - length + 1, stride))
        else:
            starts.add(min(max(begin + bases // 2 - length // 2, 0), size - length))
    return sorted(starts)


@given(
    segments=st.lists(
        st.integers(1, 90).flatmap(
            lambda size: st.tuples(
                st.just(size),
                st.lists(
                    st.integers(0, size - 1).flatmap(
                        lambda begin: st.tuples(st.just(begin), st.integers(1, size - begin))
                    ),
                    max_size=5,
                ),
            )
        ),
        min_size=1,
        max_size=4,
    ),
    length=st.integers(1, 40),
    stride=st.integers(1, 50),
)
def test_intervals_have_their_windows(
    segments: list[tuple[int, list[tuple[int, int]]]], length: int, stride: int
) -> None:
    expected = [
        (row, start)
        for row, (size, intervals) in enumerate(segments)
        for start in naive_interval_windows(size, intervals or [(0, size)], length, stride)
    ]
    rows = made([Made(b"A" * size, intervals=intervals) for size, intervals in segments])
    if not expected:
        with pytest.raises(DataError, match=r"has no window of data\.length"):
            plan_windows(rows, "train", length, stride=stride)
        return
    assert listed(plan_windows(rows, "train", length, stride=stride)) == expected


def test_lambda_s_windows(lambda_shards: ShardIndex) -> None:
    plan = plan_windows(lambda_shards.segments, "train", 1024)
    assert len(plan) == 33_952 // 1024
    assert [int(x[0]) for x in plan.locate(np.array([2]))] == [0, 2048]
    assert letters_of(plan, np.arange(len(plan))).sum() == 1024 * len(plan)
    for outside in (-1, len(plan)):
        with pytest.raises(IndexError):
            plan.locate(np.array([outside]))


def human_sized() -> Segments:
    """24 chromosomes of 130 Mb with N at both ends and a centromere of 3 Mb."""
    rows, size = 24, 130_000_000
    segments = made([Made(b"") for _ in range(rows)])
    gaps = np.tile([[0, 10_000], [60_000_000, 3_000_000], [size - 10_000, 10_000]], (rows, 1))
    return replace(segments, length=segments.length + size, gaps=gaps, gap_bounds=np.arange(rows + 1) * 3)


def held(plan: WindowPlan) -> int:
    """Bytes of a plan's arrays."""
    arrays = [*vars(plan.letters).values(), *vars(plan.runs).values(), plan.skip_ids, plan.skipped]
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize(
    ("stride", "least", "most"), [(1024, 2_970_000, 2_980_000), (64, 47_500_000, 47_700_000)]
)
def test_a_human_sized_plan_needs_little_memory(stride: int, least: int, most: int) -> None:
    """3 million windows of 1024, or 48 million that overlap."""
    plan = plan_windows(human_sized(), "train", 1024, stride=stride)
    assert least < len(plan) < most
    assert held(plan) < 20_000
    some = np.linspace(0, len(plan) - 1, 1_000_000).astype(np.int64)
    assert letters_of(plan, some).sum() > 0.999 * 1024 * len(some)


GENOMES = [
    Made(b"A" * 30, source="a.fa", record="chr1"),
    Made(b"A" * 30, source="b.fa", record="plasmid"),
    Made(b"A" * 20, source="a.fa", record="chr2"),
    Made(b"A" * 7, source="b.fa", record="scaffold"),
    Made(b"A" * 6, source="a.fa", record="scaffold"),
]


def test_a_mixture_numbers_its_windows_group_by_group() -> None:
    mixture = {"b.fa": 1.0, "chr*": 3.0, "*": 0.0}
    plan = plan_windows(made(GENOMES), "train", 10, mixture=mixture)
    assert plan.bounds == (0, 3, 8)
    assert plan.weights == (1.0, 3.0)
    assert [row for row, _ in listed(plan)] == [1, 1, 1, 0, 0, 0, 2, 2]
    packed = plan_windows(made(GENOMES), "train", 10, pack=True, mixture={"b.fa": 1.0, "*": 2.0})
    assert [row for row, _ in listed(packed)] == [1, 1, 1, PACKED, 0, 0, 0, 2, 2, PACKED]
    assert letters_of(packed, np.arange(10)).tolist() == [10, 10, 10, 7, 10, 10, 10, 10, 10, 6]


def test_groups_keep_their_bounds_where_windows_are_skipped() -> None:
    rows = [Made(b"N" * 10 + b"A" * 20 + b"N" * 15), Made(b"N" * 20 + b"A" * 10, source="t.fa")]
    plan = plan_windows(made(rows), "train", 10, mixture={"s.fa": 1, "t.fa": 1})
    assert plan.bounds == (0, 2, 3)
    assert listed(plan) == [(0, 10), (0, 20), (1, 20)]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            {"a.fa": 1, "c.fa": 1},
            r"data.mixture: 'c.fa' matches no record .* the input files are 'a.fa', 'b.fa';",
        ),
        (
            {"a.fa": 1, "a.f?": 1, "*": 1},
            r"data.mixture: 'a.f\?' matches no record that an earlier key has not taken",
        ),
        (
            {"a.fa": 1},
            r"data.mixture: no key matches record 'plasmid' of 'b.fa': give a weight to 'b.fa', or to '\*'",
        ),
        (
            {"scaffold": 1, "*": 1},
            r"split 'train' \(data.mixture 'scaffold'\) has no window of data.length 10: .* has 7 bases",
        ),
    ],
)
def test_mixtures_that_do_not_fit_are_refused(mixture: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_windows(made(GENOMES), "train", 10, mixture=mixture)


@pytest.mark.parametrize(
    ("split", "length", "min_real", "message"),
    [
        (
            "train",
            40_000,
            0.5,
            r"split 'train' has no window of data.length 40000: .* of 'gi\|.*\|', has 33952 bases: lower data.length",
        ),
        # There is no option --dev to prepare it with.
        (
            "dev",
            10,
            0.5,
            r"split 'dev' is not in the shards \(they hold test, train, valid\): choose another split",
        ),
        ("train", 0, 0.5, "data.length 0: must be at least 1"),
        ("train", 10, 1.5, "data.min_real 1.5: must lie between 0 and 1"),
    ],
)
def test_plans_without_a_window_are_refused(
    lambda_shards: ShardIndex, split: str, length: int, min_real: float, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        plan_windows(lambda_shards.segments, split, length, min_real)


def test_a_split_of_gaps_only_is_refused(gappy_shards: ShardIndex) -> None:
    with pytest.raises(
        DataError, match="split 'train': none of its 2 windows of 3000 bases has 100% letters"
    ):
        plan_windows(gappy_shards.segments, "train", 3000, 1.0)


def test_a_stride_below_one_is_refused(lambda_shards: ShardIndex) -> None:
    with pytest.raises(DataError, match=r"data\.stride 0: must be at least 1 base"):
        plan_windows(lambda_shards.segments, "train", 10, stride=0)
