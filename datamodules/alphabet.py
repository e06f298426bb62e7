"""Bytes to tokens and back: dna, protein and plain bytes.

Every alphabet has the same first five tokens; its letters follow from 5 on. Encoding is one look-up in a
table of 256 entries, so a window becomes tokens with a single `numpy.take`. Tables hold int64 because that is
what an embedding takes, and because the 256 letters of `bytes` reach token 260, which a byte cannot hold.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError

PAD, BOS, SEP, MASK, OTHER = range(5)
FIRST_LETTER = 5

# Nucleotide codes and what pairs with them: Cornish-Bowden, Nucleic Acids Research 13 (1985), table 1.
_IUPAC = b"ACGTURYSWKMBDHVN"
_PAIRED = b"TGCAAYRSWMKVHDBN"
_GAPS_AND_STOPS = b"-.*"


@dataclass(frozen=True, eq=False)
class Alphabet:
    """One vocabulary: tokens 0 pad, 1 bos, 2 sep, 3 mask, 4 other, then `letters` from 5 on.

    name: "dna", "protein" or "bytes".
    letters: the letters in the order of their tokens.
    table: (256,) int64, byte -> token; `OTHER` for what is no letter.
    known: (256,) bool, bytes that a FASTA record may hold: letters, ambiguity codes, gaps, stops.
    complement: (256,) uint8, byte -> complementary byte, case kept; None where there is none. A byte that is
        no IUPAC nucleotide code is its own complement, U pairs like T.
    unknown: the byte that `decode` writes for `MASK` and `OTHER`.
    """

    name: str
    letters: bytes
    table: NDArray[np.int64]
    known: NDArray[np.bool_]
    complement: NDArray[np.uint8] | None
    unknown: bytes

    @staticmethod
    def named(name: str) -> "Alphabet":
        """The alphabet called "dna" (A C G T), "protein" (the 20 standard amino acids) or "bytes".

        Raises DataError for another name.
        """
        return _alphabet(name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the five special ones and the letters."""
        return FIRST_LETTER + len(self.letters)

    def encode(self, sequence: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Bytes of any shape -> tokens of the same shape."""
        return np.take(self.table, sequence)

    def decode(self, tokens: NDArray[np.integer]) -> bytes:
        """Tokens (length,) -> letters.

        `PAD`, `BOS` and `SEP` are left out, `MASK` and `OTHER` become `unknown`.
        Raises IndexError for a token outside the vocabulary.
        """
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise IndexError(f"tokens of alphabet {self.name} must lie in [0, {self.vocab_size})")
        written = np.frombuffer(self.unknown * FIRST_LETTER + self.letters, np.uint8)
        return written[tokens[tokens > SEP]].tobytes()

    def reverse_complement(self, sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bytes (length,) -> the opposite strand read in its own direction, case kept.

        Raises DataError for an alphabet without complement.
        """
        if self.complement is None:
            raise DataError(f"alphabet {self.name} has no reverse complement: only dna has two strands")
        return self.complement[sequence[::-1]]

    def gaps(self, sequence: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Bytes (length,) -> (runs, 2) [start, length] of the runs that are not letters, in order."""
        letter = np.ones(len(sequence) + 2, bool)
        letter[1:-1] = (self.table >= FIRST_LETTER)[sequence]
        edges = np.flatnonzero(letter[1:] != letter[:-1]).reshape(-1, 2)
        edges[:, 1] -= edges[:, 0]
        return edges

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Workers get the alphabet by name and share one copy."""
        return Alphabet.named, (self.name,)


def _codes(text: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(text, np.uint8)


def _case_blind(name: str, letters: bytes, allowed: bytes, unknown: bytes) -> Alphabet:
    """An alphabet of upper-case letters whose lower case means the same."""
    table = np.full(256, OTHER, np.int64)
    known = np.zeros(256, bool)
    for text in (letters, letters.lower()):
        table[_codes(text)] = FIRST_LETTER + np.arange(len(letters))
    for text in (allowed, allowed.lower(), _GAPS_AND_STOPS):
        known[_codes(text)] = True
    return Alphabet(name, letters, table, known, None, unknown)


def _dna() -> Alphabet:
    plain = _case_blind("dna", b"ACGT", _IUPAC + b"X", b"N")
    complement = np.arange(256, dtype=np.uint8)
    complement[_codes(_IUPAC)] = _codes(_PAIRED)
    complement[_codes(_IUPAC.lower())] = _codes(_PAIRED.lower())
    return Alphabet("dna", plain.letters, plain.table, plain.known, complement, plain.unknown)


def _protein() -> Alphabet:
    return _case_blind("protein", b"ACDEFGHIKLMNPQRSTVWY", bytes(range(ord("A"), ord("Z") + 1)), b"X")


def _bytes() -> Alphabet:
    table = FIRST_LETTER + np.arange(256, dtype=np.int64)
    return Alphabet("bytes", bytes(range(256)), table, np.ones(256, bool), None, b"?")


_MAKERS = {"dna": _dna, "protein": _protein, "bytes": _bytes}


@cache
def _alphabet(name: str) -> Alphabet:
    if name not in _MAKERS:
        raise DataError(f"unknown alphabet {name!r}: choose one of {', '.join(_MAKERS)}")
    return _MAKERS[name]()
