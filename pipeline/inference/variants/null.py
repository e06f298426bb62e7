"""Random variants of the same lengths, to compare a variant's score with: what is usual for such a change.

Longer insertions and deletions have larger scores, whatever they change. So every variant is compared with variants
that replace as many bases by as many others, at random places of the same record. The new bases are drawn from those
around another random place. All variants with the same record and lengths are compared with the same random ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.variants.edits import Edit

Lengths = tuple[str, int, int]
"""Of an edit: its record, how many bases it replaces, and by how many."""
AROUND, TRIES = 1000, 100
_BASES = np.frombuffer(b"ACGT", np.uint8)


def lengths_of(edit: Edit) -> Lengths:
    """What an edit has in common with its random ones."""
    return edit.record, edit.end - edit.start, len(edit.bases)


def random_edits(genome: Genome, edits: Sequence[Edit], number: int, seed: int) -> dict[Lengths, list[Edit]]:
    """`number` random edits for each record and lengths among `edits`. The same seed gives the same."""
    found = {}
    for record, removed, added in sorted({lengths_of(edit) for edit in edits}):
        generator = np.random.default_rng([seed, zlib.crc32(record.encode()), removed, added])
        found[record, removed, added] = [
            _random_edit(genome, record, removed, added, generator) for _ in range(number)
        ]
    return found


def compare(
    edits: Sequence[Edit], scores: NDArray[np.float64], random: Mapping[Lengths, NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How unusual scores are among those of random edits.

    Args:
        edits: what was scored.
        scores: (edits,).
        random: scores of the random edits.

    Returns:
        z and p, (edits,) each. z: standard deviations above the mean of the random ones; NaN if they are all equal. p:
        the share of scores that are no higher, counted among the random ones and this one.
    """
    z, p = np.full(len(edits), np.nan), np.empty(len(edits))
    for number, edit in enumerate(edits):
        others = random[lengths_of(edit)]
        deviation = others.std(ddof=1)
        if deviation > 0.0:
            z[number] = (scores[number] - others.mean()) / deviation
        p[number] = (1 + (others <= scores[number]).sum()) / (1 + len(others))
    return z, p


def _random_edit(
    genome: Genome, record: str, removed: int, added: int, generator: np.random.Generator
) -> Edit:
    """Replaces letters by others where there is such a place."""
    length = genome.lengths[record]
    for _ in range(TRIES):
        start = int(generator.integers(length - removed + 1))
        there = np.frombuffer(genome.fetch(record, start, start + removed).tobytes().upper(), np.uint8)
        bases = _random_bases(genome, record, added, generator)
        if np.isin(there, _BASES).all() and bases != there.tobytes():
            break
    return Edit(record, start, start + removed, bases)


def _random_bases(genome: Genome, record: str, number: int, generator: np.random.Generator) -> bytes:
    """Bases drawn one by one from those around a random place; from A, C, G and T if there are none."""
    middle = int(generator.integers(genome.lengths[record]))
    around = genome.fetch(record, max(0, middle - AROUND), min(genome.lengths[record], middle + AROUND))
    letters = np.frombuffer(around.tobytes().upper(), np.uint8)
    letters = letters[np.isin(letters, _BASES)]
    return generator.choice(letters if letters.size else _BASES, number).tobytes()
