"""Bytes to tokens and back: dna, protein and plain bytes.

Every alphabet has the same five special tokens 0 to 4; its letters follow from 5 on. A token takes one byte, or two for
`bytes`, whose 256 letters reach token 260. Encoding looks every byte up in a table with `bytearray.translate`, three
times as fast as `numpy.take`, which first makes 8-byte indices of the bytes.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError

PAD, BOS, SEP, MASK, OTHER = range(5)
FIRST_LETTER = 5

# Nucleotide codes and their complements: Cornish-Bowden, Nucleic Acids Research 13 (1985), table 1.
_IUPAC = b"ACGTURYSWKMBDHVN"
_PAIRED = b"TGCAUYRSWMKVHDBN"
_GAPS_AND_STOPS = b"-.*"

_AT_ONCE, _PIECE = 1 << 20, 1 << 16
"""Up to `_AT_ONCE` bytes are looked up in one call, more in pieces: a large copy needs new memory pages each time,
which cost more than the look-up."""


Codes = NDArray[np.uint8] | NDArray[np.int16]
"""Tokens in one byte, or in two for an alphabet of more than 251 letters."""


@dataclass(frozen=True, eq=False)
class Alphabet:
    """One vocabulary: tokens 0 pad, 1 bos, 2 sep, 3 mask, 4 other, then `letters` from 5 on.

    Attributes:
        name: "dna", "protein" or "bytes".
        letters: the letters in the order of their tokens.
        table: (256,) byte -> token, `OTHER` for bytes that are not letters. uint8, or int16 for `bytes`.
        known: (256,) bool, bytes that a FASTA record may hold: letters, ambiguity codes, gaps, stops.
        complement: (256,) uint8, byte -> complementary byte, case kept; None for an alphabet without complement. A byte
            that is not an IUPAC nucleotide code is its own complement. So is U, which is not a letter here, so that
            both strands have equally many letters.
        unknown: the byte that `decode` writes for `MASK` and `OTHER`.
        soft: (256,) uint8, 1 for letters in lower case; None if upper and lower case are different letters.
    """

    name: str
    letters: bytes
    table: Codes
    known: NDArray[np.bool_]
    complement: NDArray[np.uint8] | None
    unknown: bytes
    soft: NDArray[np.uint8] | None

    @staticmethod
    def named(name: str) -> "Alphabet":
        """The alphabet called "dna" (A C G T), "protein" (the 20 standard amino acids) or "bytes".

        Raises DataError for another name.
        """
        return _alphabet(name)

    @property
    def in_words(self) -> str:
        """What its letters are, for messages after "not"."""
        return {"dna": "A, C, G or T", "protein": "one of the 20 amino acids"}.get(self.name, "a byte")

    @property
    def unit(self) -> str:
        """What one letter is called in messages."""
        return {"dna": "base", "protein": "residue"}.get(self.name, "byte")

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the five special ones and the letters."""
        return FIRST_LETTER + len(self.letters)

    def encode(self, sequence: NDArray[np.uint8]) -> Codes:
        """Bytes of any shape -> tokens of the same shape, in the dtype of `table`; writable."""
        if self.table.dtype == np.uint8:
            return _looked_up(self._tokens, sequence)
        return np.add(sequence, FIRST_LETTER, dtype=np.int16)  # every byte is a letter

    def soft_masked(self, sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bytes of any shape -> 1 where a letter is in lower case, which marks a repeat, else 0; same shape.

        Raises:
            DataError: upper and lower case are different letters of this alphabet.
        """
        if self.soft is None:
            raise DataError(
                f"alphabet {self.name} has no soft-masked letters: its upper and lower case differ"
            )
        return _looked_up(self._soft, sequence)

    def decode(self, tokens: NDArray[np.integer]) -> bytes:
        """Tokens (length,) -> letters.

        `PAD`, `BOS` and `SEP` are left out, `MASK` and `OTHER` become `unknown`.

        Raises:
            IndexError: a token lies outside the vocabulary.
        """
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise IndexError(f"tokens of alphabet {self.name} must lie in [0, {self.vocab_size})")
        written = np.frombuffer(self.unknown * FIRST_LETTER + self.letters, np.uint8)
        return written[tokens[tokens > SEP]].tobytes()

    def reverse_complement(self, sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bytes (length,) -> the opposite strand read in its own direction, case kept.

        Raises:
            DataError: the alphabet has no complement.
        """
        if self.complement is None:
            raise DataError(f"alphabet {self.name} has no reverse complement: only dna has two strands")
        return _looked_up(self._complement, sequence[::-1])

    def gaps(self, sequence: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Bytes (length,) -> (runs, 2) [start, length] of the runs of bytes that are not letters, in order."""
        letter = np.ones(len(sequence) + 2, bool)
        letter[1:-1] = self.encode(sequence) >= FIRST_LETTER
        edges = np.flatnonzero(letter[1:] != letter[:-1]).reshape(-1, 2)
        edges[:, 1] -= edges[:, 0]
        return edges

    @cached_property
    def _tokens(self) -> bytes:
        return self.table.tobytes()

    @cached_property
    def _soft(self) -> bytes:
        assert self.soft is not None
        return self.soft.tobytes()

    @cached_property
    def _complement(self) -> bytes:
        assert self.complement is not None
        return self.complement.tobytes()

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Workers get the alphabet by name and share one copy."""
        return Alphabet.named, (self.name,)


def _looked_up(table: bytes, sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`table` at every byte of a sequence of any shape."""
    given = np.ascontiguousarray(sequence).reshape(-1)
    if given.size <= _AT_ONCE:
        return np.frombuffer(bytearray(given).translate(table), np.uint8).reshape(sequence.shape)
    found = np.empty_like(given)
    for start in range(0, given.size, _PIECE):
        found[start : start + _PIECE] = _looked_up(table, given[start : start + _PIECE])
    return found.reshape(sequence.shape)


def _codes(text: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(text, np.uint8)


def _case_blind(name: str, letters: bytes, allowed: bytes, unknown: bytes) -> Alphabet:
    """An alphabet of upper-case letters whose lower case means the same."""
    table = np.full(256, OTHER, np.uint8)
    known, soft = np.zeros(256, bool), np.zeros(256, np.uint8)
    for text in (letters, letters.lower()):
        table[_codes(text)] = FIRST_LETTER + np.arange(len(letters))
    for text in (allowed, allowed.lower(), _GAPS_AND_STOPS):
        known[_codes(text)] = True
    soft[_codes(letters.lower())] = 1
    return Alphabet(name, letters, table, known, None, unknown, soft)


def _dna() -> Alphabet:
    plain = _case_blind("dna", b"ACGT", _IUPAC + b"X", b"N")
    complement = np.arange(256, dtype=np.uint8)
    complement[_codes(_IUPAC)] = _codes(_PAIRED)
    complement[_codes(_IUPAC.lower())] = _codes(_PAIRED.lower())
    return replace(plain, complement=complement)


def _protein() -> Alphabet:
    return _case_blind("protein", b"ACDEFGHIKLMNPQRSTVWY", bytes(range(ord("A"), ord("Z") + 1)), b"X")


def _bytes() -> Alphabet:
    table = FIRST_LETTER + np.arange(256, dtype=np.int16)
    return Alphabet("bytes", bytes(range(256)), table, np.ones(256, bool), None, b"?", None)


_MAKERS = {"dna": _dna, "protein": _protein, "bytes": _bytes}


@cache
def _alphabet(name: str) -> Alphabet:
    if name not in _MAKERS:
        raise DataError(f"unknown alphabet {name!r}: choose one of {', '.join(_MAKERS)}")
    return _MAKERS[name]()
