"""Sampled 31-mers are those of either strand, outside gaps, and their shares are those of all 31-mers."""

import numpy as np
import pytest

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.prepare import sketch
from megabase.datamodules.prepare.sketch import (
    K,
    Kmers,
    Sampler,
    count_shared,
    finest_scale,
    scale_for,
    united,
)

DNA = Alphabet.named("dna")


def bases(length: int, seed: int, letters: bytes = b"ACGT") -> bytes:
    return np.random.default_rng(seed).choice(np.frombuffer(letters, np.uint8), length).tobytes()


def sample(sequence: bytes, scale: int) -> Kmers:
    sampler = Sampler(scale)
    sampler.add("x", sequence, DNA.gaps(np.frombuffer(sequence, np.uint8)).tolist())
    return sampler.finish()["x"]


def other_strand(sequence: bytes) -> bytes:
    return DNA.reverse_complement(np.frombuffer(sequence, np.uint8)).tobytes()


def every(sequence: bytes) -> set[bytes]:
    """All 31-mers, as the lesser of both strands, by slicing."""
    words = [sequence[at : at + K].upper() for at in range(len(sequence) - K + 1)]
    return {min(word, other_strand(word)) for word in words if not word.strip(b"ACGT")}


@pytest.mark.parametrize("scale", [1, 16, 128, 512])
def test_strand_case_and_place_do_not_matter(scale: int) -> None:
    one = bases(200_000, 1)
    found = sample(one, scale)
    assert np.array_equal(sample(other_strand(one), scale), found)
    assert np.array_equal(sample(one.lower(), scale), found)
    shifted = sample(b"GATTACA" + one, scale)
    assert count_shared(found, shifted) == len(found) >= len(shifted) - 7
    assert abs(len(found) * scale / len(one) - 1) < 0.2


def test_a_scale_of_one_is_every_kmer_outside_gaps() -> None:
    sequence = bases(3000, 2, b"ACGTacgt")
    sequence = sequence[:500] + b"N" + sequence[500:530] + b"RY" + sequence[530:561] + b"-" + sequence[561:]
    assert len(sample(sequence, 1)) == len(every(sequence))
    for short in (b"", b"ACGT", b"A" * 30, b"N" * 100):
        assert len(sample(short, 1)) == 0
    assert len(sample(b"A" * 31, 1)) == 1


def test_pieces_have_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = bases(5000, 3)
    whole = sample(sequence, 1)
    monkeypatch.setattr(sketch, "_PIECE", 100)
    assert np.array_equal(sample(sequence, 1), whole)


@pytest.mark.parametrize("scale", [16, 128])
def test_short_segments_are_sampled_apart(scale: int) -> None:
    sequences = {f"r{number}": bases(40 + 37 * number, number) for number in range(200)}
    sampler = Sampler(scale)
    for name, sequence in sequences.items():
        sampler.add(name, sequence[:20] + b"N" + sequence[20:], [[20, 1]])
    sampler.add("r7", sequences["r9"], [])
    found = sampler.finish()
    assert list(found) == list(sequences)
    for name, sequence in sequences.items():
        expected = sample(sequence[20:], scale)
        if name == "r7":
            expected = united([expected, sample(sequences["r9"], scale)])
        assert np.array_equal(found[name], expected)


@pytest.mark.parametrize(("scale", "off"), [(16, 0.03), (128, 0.08)])
def test_shares_are_those_of_all_kmers(scale: int, off: float) -> None:
    one, two = bases(60_000, 5), bytearray(bases(60_000, 6))
    two[20_000:38_000] = other_strand(one[:18_000])
    for at in range(20_000, 38_000, 100):
        two[at] = b"TGCA"["ACGT".index(chr(two[at]))]
    mine, theirs = every(bytes(two)), every(one)
    exact = len(mine & theirs) / len(mine)
    found = sample(bytes(two), scale)
    assert 0.2 < exact < 0.3
    assert abs(count_shared(found, sample(one, scale)) / len(found) - exact) < off
    assert count_shared(found, sample(b"", scale)) == 0


def test_scales_bound_the_memory() -> None:
    assert [scale_for(bases) for bases in (0, 4 << 20, 9 << 20, 1 << 30, 3 << 30)] == [
        16,
        16,
        128,
        1024,
        4096,
    ]
    assert [finest_scale(bases) for bases in (0, 100 << 20, 1 << 30)] == [16, 16, 128]
    assert (1 << 40) / scale_for(1 << 40) <= 1 << 20
