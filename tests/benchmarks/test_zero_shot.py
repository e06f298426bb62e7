"""The pairs of the zero-shot benchmark: found by alignment, and alike in what they change."""

import numpy as np
import pytest

pytest.importorskip("mappy")
pytest.importorskip("pyrodigal")

from benchmarks import zero_shot
from benchmarks.zero_shot import FLANK, OUTSIDE, Substitution


def random_sequence(length: int, seed: int) -> str:
    return np.random.default_rng(seed).choice(list("ACGT"), length).astype("S1").tobytes().decode()


def test_isolated_substitutions_are_found() -> None:
    reference = random_sequence(30_000, 1)
    places = [500, 3_000, 12_000, 12_004, 19_000]  # two of them are not alone
    changed = list(reference)
    for place in places:
        changed[place] = "ACGT"[("ACGT".index(reference[place]) + 1) % 4]
    other = "".join(changed[:15_000]) + "ACGTACGTAC" + "".join(changed[15_000:])
    for strand in (other, zero_shot.mappy.revcomp(other)):
        natural, shared = zero_shot.compare(reference, strand)
        assert natural == [Substitution(place, changed[place]) for place in (500, 3_000, 19_000)]
        assert shared[5_000:11_000].all()
        assert not any(shared[place - FLANK : place + FLANK + 1].any() for place in places)


def test_decoys_change_the_same_at_the_same_position_of_a_codon() -> None:
    reference = random_sequence(3_000, 2)
    position = np.tile(np.array([1, 2, 3, 1, 2, 3, OUTSIDE, -1], np.int8), 375)
    reverse = np.arange(3_000) % 300 > 150
    natural = [
        Substitution(place, "ACGT"[("ACGT".index(reference[place]) + 1) % 4]) for place in range(40, 90)
    ]
    shared = np.ones(3_000, bool)
    shared[:100] = False
    pairs = zero_shot.pairs_of(reference, natural, shared, position, reverse, 40)

    def kind(one: Substitution) -> tuple:
        change = reference[one.place] + one.base
        along = change.translate(str.maketrans("ACGT", "TGCA")) if reverse[one.place] else change
        return int(position[one.place]), along

    assert len(pairs) == 40 and len({decoy.place for _, decoy in pairs}) == 40
    for real, decoy in pairs:
        assert kind(real) == kind(decoy) and kind(real)[0] >= 0
        assert real in natural and shared[decoy.place]


def test_a_markov_model_prefers_what_it_has_seen() -> None:
    genome = "ACGT" * 500
    score = zero_shot.markov(genome, 400, 800, 2)
    unusual, usual = score("ACGTACGTACCTACGT", [Substitution(4, "C"), Substitution(10, "G")])
    assert unusual < -2 and usual > 2
