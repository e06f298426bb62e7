"""Records that share 31-mers are in one split, whatever chain connects them."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.leakage import read_leakage
from megabase.datamodules.prepare import relatives
from megabase.datamodules.prepare.check import check
from megabase.datamodules.prepare.relatives import groups_of, split_groups, without_relatives
from megabase.datamodules.prepare.run import prepare
from megabase.datamodules.prepare.sketch import Kmers
from tests.datamodules.prepare.test_leaks import genome, strain


def kmers(*hashes: int) -> Kmers:
    return np.array(sorted(set(hashes)), np.uint64)


def by_hand(records: Sequence[Kmers], threshold: float) -> list[int]:
    """The group of each record, by comparing every pair of records."""
    group, by_size = (
        list(range(len(records))),
        sorted(range(len(records)), key=lambda each: -len(records[each])),
    )
    for place, one in enumerate(by_size):
        shared = [len(set(records[one].tolist()) & set(records[two].tolist())) for two in by_size[:place]]
        if shared and max(shared) > threshold * len(records[one]):
            group[one] = group[by_size[shared.index(max(shared))]]
    return group


@given(
    st.lists(st.lists(st.integers(0, 25), max_size=8).map(lambda hashes: kmers(*hashes)), max_size=9),
    st.sampled_from([0.0, 0.1, 0.34, 0.5, 0.9]),
)
def test_groups_are_those_of_all_pairs(records: list[Kmers], threshold: float) -> None:
    assert groups_of(records, threshold).tolist() == by_hand(records, threshold)


def test_a_small_record_does_not_join_two_species() -> None:
    """A contig of ribosomal genes shares a third with another species, and is part of its own."""
    one, two, ribosomal = range(1000), range(2000, 3000), [*range(20), *range(2000, 2010)]
    group = groups_of(
        [kmers(*ribosomal), kmers(*one), kmers(*two), kmers(*range(500), *range(3000, 3400))], 0.1
    )
    assert group.tolist() == [1, 1, 2, 1]


def test_a_kmer_of_many_records_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relatives, "_FARTHEST", 3)
    strains = [kmers(*range(100), 1000 + number) for number in range(500)]
    others = [kmers(0, *range(10_000 * number, 10_000 * number + 100)) for number in range(1, 500)]
    group = groups_of([*strains, *others], 0.1)
    assert len(set(group[:500])) == 1 and len(set(group)) == 500


def test_groups_fill_their_fraction_and_names_decide() -> None:
    group = np.repeat(np.arange(100), 3)
    names = [f"r{number}" for number in range(300)]
    lengths = np.full(300, 10)
    splits = split_groups(group, names, lengths, {"valid": 0.1, "test": 0.2})
    assert [splits.count(split) for split in ("valid", "test", None)] == [30, 60, 210]
    assert all(len({splits[number] for number in np.flatnonzero(group == each)}) == 1 for each in range(100))
    back = split_groups(group[::-1], names[::-1], lengths, {"valid": 0.1, "test": 0.2})
    assert back[::-1] == splits
    # Where no group fits, the smallest is taken; the last is left for training.
    large = split_groups(np.arange(3), ["a", "b", "c"], np.array([50, 30, 40]), {"valid": 0.1, "test": 0.1})
    assert large == [None, "valid", "test"]
    assert split_groups(np.zeros(2, int), ["a", "b"], np.array([5, 5]), {"valid": 0.1}) == [None, None]


def test_what_shares_enough_with_all_of_training_together_is_moved() -> None:
    records = [
        kmers(*range(8), 90),
        kmers(*range(8, 16), 91),
        kmers(*range(4, 12), *range(20, 100)),
        kmers(7),
    ]
    moved = without_relatives([None, None, "valid", "test"], records, 0.08)
    assert moved == [
        None,
        None,
        None,
        None,
    ]  # the third shares 4 of 88 with each, and the fourth is in the first
    assert without_relatives([None, None, "valid", None], records, 0.2) == [None, None, "valid", None]


def test_strains_are_in_one_split(
    tmp_path: Path, write_fasta: Callable[[Path, dict[str, bytes]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    records = {}
    for species in range(8):
        wild = genome(20_000, species)
        records |= {f"s{species}.{number}": strain(wild, 90 + number) for number in range(3)}
    fasta = write_fasta(tmp_path / "a.fa", records)
    with caplog.at_level(logging.INFO):
        index = prepare(
            [fasta], tmp_path / "out", valid=0.15, test=0.2, split_by="similarity", progress=False
        )
    segments = index.segments
    assert "records: 24; groups of similar ones: 8" in caplog.text
    splits = {(name[:2], split) for name, split in zip(segments.record, segments.split, strict=True)}
    assert len(splits) == 8
    assert [(segments.split == split).sum() for split in ("train", "valid", "test")] == [18, 3, 3]
    assert [leak.share for leak in read_leakage(index.store)] == [0, 0]
    assert check(tmp_path / "out", 1, progress=False) == 24 * 20_000


def test_splits_that_cannot_be_are_refused(
    tmp_path: Path, write_fasta: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    wild = genome(20_000, 1)
    fasta = write_fasta(tmp_path / "a.fa", {"a": wild, "b": strain(wild, 100)})
    with pytest.raises(DataError, match=r"nothing is left for valid: .* there is only 1: add"):
        prepare([fasta], tmp_path / "out", valid=0.1, split_by="similarity", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]
    for options, message in (
        ({"similarity": 0.2}, "--similarity 0.2 is for --split-by similarity"),
        ({"similarity": 1.5, "split_by": "similarity"}, "--similarity 1.5: must be a fraction"),
        ({"alphabet": "protein", "split_by": "similarity"}, "compares DNA, not protein"),
        ({"test": "a", "split_by": "similarity"}, "with record 'a': it takes fractions only"),
    ):
        with pytest.raises(DataError, match=message):
            prepare([fasta], tmp_path / "out", valid=0.1, progress=False, **options)
