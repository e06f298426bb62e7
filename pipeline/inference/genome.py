"""Parts of a genome: a FASTA file read through its index, and the regions that a BED file names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dnaio
import numpy as np
import pysam
from numpy.typing import NDArray

from megabase.datamodules.prepare.bed import Row, read_rows
from megabase.datamodules.prepare.closest import hint
from megabase.pipeline.errors import UserError


@dataclass(frozen=True)
class Region:
    """Bases [start, end) of a record."""

    record: str
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def identity(path: Path) -> list[str | int]:
    """Path, bytes and time of a file: another file has another identity."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def refuse_repeated_names(path: Path) -> None:
    """Raise UserError if two records of a FASTA file have the same name. Of these, its index would hold the first only.

    A file that is not FASTA passes: making its index says what is wrong.
    """
    seen: set[str] = set()
    try:
        with dnaio.open(path, fileformat="fasta") as records:
            for record in records:
                if record.id in seen:
                    raise UserError(
                        f"{path}: two records are named {record.id!r}: give each record a name of its own, the first "
                        "word after >"
                    )
                seen.add(record.id)
    except (dnaio.FileFormatError, OSError, EOFError, UnicodeDecodeError):
        return


class Genome:
    """A FASTA file with its index (`.fai`), which is made beside it if there is none.

    Args:
        path: FASTA, as it is or compressed with bgzip.

    Raises:
        UserError: the file cannot be read or indexed, holds no sequence, has two records of one name, or has changed
            since it was indexed.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file: give a FASTA file")
        index = path.with_name(f"{path.name}.fai")
        if index.exists() and index.stat().st_mtime_ns < path.stat().st_mtime_ns:
            raise UserError(f"{index} is older than {path.name}: remove it, and it is made anew")
        if not index.exists():
            refuse_repeated_names(path)
        pysam.set_verbosity(0)  # htslib would print lines of its own
        try:
            self._file = pysam.FastaFile(str(path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be indexed as FASTA: it must have sequences below lines of >NAME; if it is "
                f"compressed, by bgzip; and its folder must be writable, unless {index.name} is there"
            ) from error
        self.path = path
        self.lengths = dict(zip(self._file.references, self._file.lengths, strict=True))

    def identity(self) -> list[str | int]:
        """See the function."""
        return identity(self.path)

    def records(self) -> list[Region]:
        """All records that are not empty, whole, in the order of the file."""
        return [Region(name, 0, length) for name, length in self.lengths.items() if length]

    def regions(self, bed: Path) -> list[Region]:
        """The regions of a BED file (chr, start, end), in its order.

        Raises:
            DataError: the file cannot be read, or a line has another form.
            UserError: it names a record that the genome has not, or bases beyond a record's end, or nothing.
        """
        regions = []
        for row in read_rows(bed, None, "--regions"):
            self.check_row(bed, row, "regions")
            regions.append(Region(row.name, row.start, row.end))
        if not regions:
            raise UserError(f"{bed}: holds no region: every line must be chr, start, end")
        return regions

    def check_row(self, bed: Path, row: Row, what: str) -> None:
        """Raise UserError if a row of a BED file is not in this genome.

        Args:
            bed: the file.
            row: of it.
            what: the rows are, for the message.
        """
        place = f"{bed}: line {row.line}"
        self.check_record(place, row.name)
        if row.end > self.lengths[row.name]:
            raise UserError(
                f"{place}: [{row.start}, {row.end}) reaches beyond record {row.name!r} of "
                f"{self.lengths[row.name]} bases: the {what} must be for this assembly of the genome"
            )

    def check_record(self, place: str, name: str) -> None:
        """Raise UserError, with the closest name, if there is no record `name`. place: where the name was read."""
        if name not in self.lengths:
            raise UserError(f"{place}: {self.path} has no record {name!r}{hint(name, list(self.lengths))}")

    def letters(self, region: Region, block: int, *, backwards: bool = False) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a region, `block` at a time; backwards: the last ones first, each piece in forward order."""
        starts = range(region.start, region.end, block)
        if backwards:
            starts = range(max(region.start, region.end - block), region.start - block, -block)
        for start in starts:
            yield self.fetch(region.record, max(start, region.start), min(start + block, region.end))

    def fetch(self, record: str, start: int, end: int) -> NDArray[np.uint8]:
        """The bytes [start, end) of a record, which has them."""
        return np.frombuffer(self._file.fetch(record, start, end).encode(), dtype=np.uint8)
