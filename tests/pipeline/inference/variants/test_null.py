"""Random variants: their lengths, places and bases, and how a score is compared with theirs."""

from pathlib import Path

import numpy as np
import pytest

from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.variants.edits import Edit
from megabase.pipeline.inference.variants.null import compare, lengths_of, random_edits

LETTERS = b"NNNN" + b"ACGTTGCA" * 50 + b"cccc"
EDITS = [
    Edit("a", 9, 10, b"T"), Edit("a", 99, 100, b"G"), Edit("a", 7, 7, b"TTT"), Edit("b", 1, 3, b""),
    Edit("a", 4, 408, b"TG"),
]  # fmt: skip


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    (tmp_path / "x.fa").write_bytes(b">a\n" + LETTERS + b"\n>b\nACACAC\n>n\nNNNN\n")
    return Genome(tmp_path / "x.fa")


def test_random_edits_have_the_lengths_of_the_real_ones(genome: Genome) -> None:
    found = random_edits(genome, EDITS, 50, 3)
    assert list(found) == sorted({lengths_of(edit) for edit in EDITS}) and len(found) == 4
    for lengths, edits in found.items():
        assert len(edits) == 50 and {lengths_of(edit) for edit in edits} == {lengths}
        for edit in edits:
            replaced = genome.fetch(edit.record, edit.start, edit.end).tobytes().upper()
            assert set(edit.bases + replaced) <= set(b"ACGT") and replaced != edit.bases
    snvs = found["a", 1, 1]
    assert len({edit.start for edit in snvs}) > 30 and len({edit.bases for edit in snvs}) == 4
    assert {edit.bases for edit in found["b", 2, 0]} == {b""}
    assert random_edits(genome, EDITS[:1], 50, 3)["a", 1, 1] == snvs  # whatever else is asked for
    assert random_edits(genome, EDITS[:1], 50, 4)["a", 1, 1] != snvs


def test_where_there_are_no_letters_any_place_will_do(genome: Genome) -> None:
    edits = random_edits(genome, [Edit("n", 0, 1, b"AC")], 3, 0)["n", 1, 2]
    assert all(set(edit.bases) <= set(b"ACGT") for edit in edits)


def test_scores_among_those_of_random_edits() -> None:
    random = {
        lengths_of(EDITS[0]): np.array([1.0, 2.0, 3.0]),
        lengths_of(EDITS[2]): np.array([5.0, 5.0, 5.0]),
    }
    z, p = compare([EDITS[0], EDITS[1], EDITS[2]], np.array([4.0, 2.0, 4.0]), random)
    np.testing.assert_allclose(z, [2.0, 0.0, np.nan])
    np.testing.assert_allclose(p, [1.0, 0.75, 0.25])
