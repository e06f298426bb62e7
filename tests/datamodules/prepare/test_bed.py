"""BED intervals: what the file may say, and that no base can belong to two splits."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segment
from megabase.datamodules.prepare.bed import Bed, Interval
from megabase.datamodules.prepare.splits import Splits

SPLITS = ("train", "valid", "test")


@st.composite
def intervals(draw: st.DrawFn) -> tuple[list[Interval], int]:
    """Intervals sorted by start, without overlap between splits, and the length of their record."""
    found: list[Interval] = []
    end = 0
    for line in range(draw(st.integers(1, 12))):
        split = draw(st.sampled_from(SPLITS))
        start = end + draw(st.integers(0, 50))
        if found and split == found[-1].split:  # may touch, overlap or repeat the one before
            start = draw(st.integers(found[-1].start, start))
        found.append(Interval(start, start + draw(st.integers(1, 40)), split, line + 1))
        end = max(end, found[-1].end)
    return found, end + draw(st.integers(0, 60))


@given(intervals())
def test_territories_keep_splits_apart(drawn: tuple[list[Interval], int]) -> None:
    found, length = drawn
    territories = Bed(Path("x.bed"), {"a": sorted(found)}).territories("a", length)
    held = []
    end = 0
    for split, start, size, inside in territories:
        assert start == end and size > 0  # in order, disjoint, without a hole
        end = start + size
        assert inside
        for at, bases in inside:
            assert at >= 0 and bases > 0 and at + bases <= size
            held.append((start + at, start + at + bases, split))
    assert end == length
    assert sorted(held) == sorted(interval[:3] for interval in found)
    for before, after in itertools.pairwise(territories):
        assert before.split != after.split
        gap = max(a + b for a, b in before.intervals) + before.start, after.start + after.intervals[0][0]
        assert gap[0] <= after.start <= gap[1]
        assert after.start - gap[0] in ((gap[1] - gap[0]) // 2, (gap[1] - gap[0] + 1) // 2)


def write(folder: Path, text: str) -> Path:
    path = folder / "split.bed"
    path.write_text(text)
    return path


def test_bed_file_is_read(tmp_path: Path) -> None:
    bed = write(
        tmp_path,
        "# made by hand\ntrack name=x\nbrowser position\n\n"
        "chr2\t5\t8\tvalidation\r\nchr1\t40\t60\tval\tfold3\t.\nchr1\t10\t20\ttrain\n",
    )
    splits = Splits.parse(intervals=bed)
    assert splits.of("chr1", 100) == [
        Segment("train", 0, 30, ((10, 10),)),
        Segment("valid", 30, 70, ((10, 20),)),
    ]
    assert splits.of("chr2", 8) == [Segment("valid", 0, 8, ((5, 3),))]
    assert splits.of("chr3", 100) == []
    splits.check_names({"chr1", "chr2"}, list)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\t0\t9\ttrain\na\tx\t9\ttrain\n", r"split.bed: line 2: start 'x' is not a non-negative"),
        ("a\t-1\t9\ttrain\n", r"line 1: start '-1' is not a non-negative"),
        ("a\t0\t1e3\ttrain\n", r"line 1: end '1e3' is not a non-negative"),
        ("a\t9\t9\ttrain\n", r"line 1: \[9, 9\) holds no base: BED counts from 0 .* one base is \[9, 10\)"),
        ("a\t9\t3\ttrain\n", r"line 1: \[9, 3\) holds no base"),
        ("chrom\tstart\tend\tsplit\na\t0\t9\ttrain\n", r"line 1: .* is a header, and a BED file has none"),
        ("a\t0\t9\tTrain\n", r"line 1: unknown split 'Train': choose one of train, valid, test"),
        ("a\t0\t9\n", r"line 1: 'a\\t0\\t9' is not chr, start, end and split with tabs"),
        ("a 0 9 train\n", r"line 1: .* with tabs between"),
        ("# nothing\n", r"split.bed: holds no interval"),
        (
            "a\t5\t9\ttest\nb\t0\t9\ttrain\na\t0\t6\ttrain\n",
            r"line 1: a \[5, 9\) test overlaps the train interval \[0, 6\) of line 3",
        ),
        (
            "a\t0\t90\ttrain\na\t5\t9\ttrain\na\t50\t60\ttest\n",
            r"line 3: a \[50, 60\) test overlaps the train interval \[0, 90\) of line 1",
        ),
    ],
)
def test_bad_bed_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Splits.parse(intervals=write(tmp_path, text))


def test_intervals_must_fit_the_records(tmp_path: Path) -> None:
    splits = Splits.parse(intervals=write(tmp_path, "a\t0\t9\ttrain\na\t9\t12\ttest\n"))
    splits.of("a", 12)
    with pytest.raises(
        DataError, match=r"split.bed: line 2: \[9, 12\) reaches beyond record 'a' of 11 bases"
    ):
        splits.of("a", 11)
    with pytest.raises(DataError, match=r"split.bed: line 1: no record is named 'a'; did you mean 'chra'"):
        splits.check_names(set(), lambda: ["chra"])


def test_intervals_exclude_fractions_and_must_be_a_text_file(tmp_path: Path) -> None:
    bed = write(tmp_path, "a\t0\t9\ttrain\n")
    for others in ((0.1, None), (None, "a")):
        with pytest.raises(DataError, match=r"--intervals .*split.bed with --valid or --test"):
            Splits.parse(*others, bed)
    with pytest.raises(DataError, match=r"none.bed: cannot be read \(No such file"):
        Splits.parse(intervals=tmp_path / "none.bed")
    bed.write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(DataError, match=r"split.bed: not text"):
        Splits.parse(intervals=bed)
