"""Checks what letters the sequences of a file consist of: bytes of no sequence, RNA or protein for DNA, mostly N.

The alphabet's own letters are deleted from every sequence, and what is left is counted, so that a file of plain bases
costs one pass. IUPAC codes and runs of N are normal. A file of little else trains nothing, and U for T, or DNA read as
protein, gives a model that is wrong without a message.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.rewrite import with_t_for_u

OTHER_SHARE = 0.6
"""A file with a larger share of bytes that are not letters is refused. The Y chromosome of hg19 is 57 % N, a human
genome with its repeats masked by N 53 %."""

RNA_SHARE = 0.01
"""A dna file with a larger share of U is RNA. A few may be typing errors; RNA has about a quarter."""

DNA_SHARE = 0.9
"""A protein file with a larger share of A, C, G, T, U and N is DNA: of proteins these are about a quarter."""

_FEWEST = 50  # letters of a protein file: fewer may be a peptide of glycine and alanine
_NUCLEOTIDES = b"ACGTUNacgtun"
_ONLY_PROTEIN = b"EFIJLOPQZefijlopqz"  # letters of proteins that are no nucleotide code
_PIECE = 1 << 20
_SHOWN = 4


class Composition:
    """Counts the bytes of the sequences of one input file that are not letters of the alphabet."""

    def __init__(self, place: str | Path, alphabet: Alphabet) -> None:
        """
        Args:
            place: the input file, for messages.
            alphabet: what it is prepared for.
        """
        self._place = place
        self._alphabet = alphabet
        self._letters = _bytes_of(alphabet.table > 4)
        self._known = _bytes_of(alphabet.known)
        self._total = 0
        self._nucleotides = 0
        self._others: NDArray[np.int64] = np.zeros(256, np.int64)

    def add(self, name: str, sequence: bytes | memoryview, place: str = "") -> None:
        """Count a record.

        Args:
            name: of the record, for the message.
            sequence: its bytes.
            place: where it is, for the message; the file if empty.

        Raises:
            DataError: it holds a byte that no sequence of this alphabet holds.
        """
        if len(self._letters) == 256:
            return
        self._total += len(sequence)
        for start in range(0, len(sequence), _PIECE):
            part = bytes(sequence[start : start + _PIECE])
            if others := part.translate(None, self._letters):
                if strange := others.translate(None, self._known):
                    raise self._strange(place or self._place, name, start + part.index(strange[:1]), strange)
                self._others += np.bincount(np.frombuffer(others, np.uint8), minlength=256)
            if self._alphabet.name == "protein":
                self._nucleotides += len(part) - len(part.translate(None, _NUCLEOTIDES))

    def check(self) -> None:
        """After the last record: raise DataError if the file is not of the alphabet's kind, or mostly N."""
        if not self._total:
            return
        uracil = int(self._others[ord("U")] + self._others[ord("u")])
        if self._alphabet.name == "dna" and uracil > RNA_SHARE * self._total:
            raise DataError(
                f"{self._place}: is RNA: {uracil:,} of its {self._total:,} letters are U. Write U as T: "
                f"{with_t_for_u(Path(self._place))}, or keep U as an unknown letter with --allow-other"
            )
        if self._nucleotides > DNA_SHARE * self._total and self._total >= _FEWEST:
            what, letters, way = "DNA", "A, C, G, T or N", "leave out --alphabet protein"
            if uracil > RNA_SHARE * self._total:
                way = f"{way}, and write U as T: {with_t_for_u(Path(self._place))}"
                what, letters = "RNA", "A, C, G, U or N"
            raise DataError(
                f"{self._place}: is {what}: {self._nucleotides / self._total:.0%} of its letters are {letters}: "
                f"{way}, or add --allow-other if these are proteins"
            )
        others = int(self._others.sum())
        if others > OTHER_SHARE * self._total:
            raise DataError(
                f"{self._place}: {others:,} of its {self._total:,} letters are not {self._alphabet.in_words} "
                f"({self._commonest()}), more than {OTHER_SHARE:.0%}: give sequences that are not masked, or prepare "
                "them all the same with --allow-other"
            )

    def _strange(self, place: str | Path, name: str, at: int, strange: bytes) -> DataError:
        """The error for bytes that no sequence holds, of which the first is number `at` of record `name`."""
        what = f"{place}: record {name!r} has {chr(strange[0])!r} at {self._alphabet.unit} {at + 1}"
        if self._alphabet.name == "dna" and not strange.translate(None, _ONLY_PROTEIN):
            return DataError(f"{what}, which is an amino acid and not a base: use --alphabet protein")
        return DataError(
            f"{what}, which is not in the alphabet {self._alphabet.name}: correct the file, or choose another "
            "--alphabet (dna, protein, or bytes for text)"
        )

    def _commonest(self) -> str:
        """The commonest bytes that are not letters, with their numbers."""
        most = np.argsort(-self._others, kind="stable")[:_SHOWN]
        return ", ".join(f"{chr(byte)} {self._others[byte]:,}" for byte in most if self._others[byte])


def _bytes_of(wanted: NDArray[np.bool_]) -> bytes:
    return np.flatnonzero(wanted).astype(np.uint8).tobytes()
