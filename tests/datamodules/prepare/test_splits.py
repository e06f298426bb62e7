import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segment
from megabase.datamodules.prepare.splits import Splits, draw, warn_of_shares


def test_fractions_come_from_the_end_in_order() -> None:
    assert Splits.parse("0.2", 0.1).of("a", 100) == [
        Segment("train", 0, 70),
        Segment("valid", 70, 20),
        Segment("test", 90, 10),
    ]
    assert Splits.parse(None, "0.25").of("a", 10) == [Segment("train", 0, 8), Segment("test", 8, 2)]
    assert Splits.parse().of("a", 7) == [Segment("train", 0, 7)]


def test_named_records_are_not_cut_and_others_are_by_fraction() -> None:
    splits = Splits.parse("chr8, chr9", 0.5)
    assert splits.of("chr8", 10) == [Segment("valid", 0, 10)]
    assert splits.of("chr1", 10) == [Segment("train", 0, 5), Segment("test", 5, 5)]


def test_chromosomes_may_be_numbers() -> None:
    assert Splits.parse("1,2", "22").records == {"1": "valid", "2": "valid", "22": "test"}


@given(
    length=st.integers(0, 10**9),
    valid=st.none() | st.floats(0.001, 0.5, exclude_max=True),
    test=st.none() | st.floats(0.001, 0.5),
)
def test_segments_tile_the_record(length: int, valid: float | None, test: float | None) -> None:
    segments = Splits.parse(valid, test).of("a", length)
    end = 0
    for _, start, size, _ in segments:
        assert start == end
        assert size > 0
        end += size
    assert end == length
    sizes = {split: size for split, _, size, _ in segments}
    for split, fraction in (("valid", valid), ("test", test)):
        assert abs(sizes.get(split, 0) - (fraction or 0) * length) <= 1


@pytest.mark.parametrize(
    ("valid", "test", "message"),
    [
        ("0.6", "0.4", "--valid 0.6 and --test 0.4 leave nothing to train on"),
        ("a,b", "b", "record 'b' is in both --valid and --test"),
        (" , ", None, "--valid ' , ' names no record"),
    ],
)
def test_impossible_splits_are_refused(valid: str, test: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Splits.parse(valid, test)


def check(valid: str, *names: str) -> None:
    splits = Splits.parse(valid)
    splits.check_names(splits.named & set(names), lambda: list(names))


def test_named_record_must_exist() -> None:
    check("a", "a", "b")
    for value in ("1.5", "0"):
        with pytest.raises(DataError, match=f"--valid: no record is named '{value}', and a fraction lies"):
            check(value, "a")
    with pytest.raises(DataError, match=r"^--valid: no record is named 'chrb'; did you mean 'chrB'\?"):
        check("chrA,chrb", "chrA", "chrB")


def test_patterns_name_records() -> None:
    splits = Splits.parse("chr1?,*_alt", "chr1*,chr12")
    assert splits.of("chr1_alt2", 9) == [Segment("test", 0, 9)]
    assert splits.of("chr12", 9) == [Segment("test", 0, 9)]  # by name, whatever a pattern says
    assert splits.of("CHR12", 9) == [Segment("train", 0, 9)]
    with pytest.raises(
        DataError, match=r"record 'chr19' matches --valid 'chr1\?' and --test 'chr1\*': it can"
    ):
        splits.of("chr19", 9)
    check("c*", "chr1")
    check("odd[1]", "odd[1]")
    assert Splits.parse("odd[1]").of("odd[1]", 9) == [Segment("valid", 0, 9)]
    with pytest.raises(DataError, match=r"--valid: no record matches 'k\*'; the records are chr1$"):
        check("c*,k*", "chr1")


DRAWN = [0.177144, 0.260688, 0.866604]
DNA, PROTEIN, BYTES = map(Alphabet.named, ("dna", "protein", "bytes"))


def test_equal_records_are_drawn_alike() -> None:
    assert draw(b"ACGTTN", DNA) == draw(memoryview(b"acgTTn"), DNA) == draw(b"NAACGT", DNA)
    assert draw(b"MKV", PROTEIN) == draw(b"mkv", PROTEIN) != draw(b"VKM", PROTEIN)
    assert draw(b"The", BYTES) != draw(b"the", BYTES)
    # Other values would move the records of shards that exist to other splits.
    assert [round(draw(text, DNA), 6) for text in (b"ACGT", b"AAAA", b"")] == DRAWN


def test_fractions_of_whole_records() -> None:
    chance = random.Random(1)
    reads = ["".join(chance.choices("ACGT", k=100)).encode() for _ in range(4000)]
    splits = Splits.parse("0.1", "0.2", by="record")
    found = [splits.of("r", 100, lambda read=read: draw(read, DNA)) for read in reads]
    assert all(len(segments) == 1 and segments[0][1:3] == (0, 100) for segments in found)
    names = [segments[0].split for segments in found]
    for split, fraction in (("valid", 0.1), ("test", 0.2), ("train", 0.7)):
        assert abs(names.count(split) / len(reads) - fraction) < 0.03
    # A test split that is added later takes nothing from validation.
    before = [
        Splits.parse("0.1", by="record").of("r", 100, lambda read=read: draw(read, DNA)) for read in reads
    ]
    assert [one for one, two in zip(before, found, strict=True) if two[0].split == "valid"] == [
        two for two in found if two[0].split == "valid"
    ]
    assert Splits.parse("0.9", "r", by="record").of("r", 5) == [Segment("test", 0, 5)]
    assert splits.of("r", 0) == []


def test_splitting_by_record_needs_a_fraction() -> None:
    for valid, by, message in (
        ("a", "record", "--split-by record needs a fraction: add --valid 0.1"),
        (None, "record", "--split-by record needs a fraction"),
        ("0.1", "chance", "--split-by chance: choose one of end, record"),
    ):
        with pytest.raises(DataError, match=message):
            Splits.parse(valid, by=by)


def test_a_share_far_from_its_fraction_is_named(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"train": 2_351_294, "valid": 3_140_878, "test": 900_000}
    warn_of_shares({"valid": 0.2, "test": 0.1}, sizes, "records are drawn whole")
    assert caplog.messages == ["valid has 49.1% of the bases, not 20%: records are drawn whole"]
