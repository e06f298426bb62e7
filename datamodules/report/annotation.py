"""Reads the classes of bases from an annotation: the types of GFF3 or GTF features, or the fourth column of BED.

GFF is read by pysam, without an index.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pysam

from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.bed import Row, read_rows

GFF = (".gff", ".gff3", ".gtf")
WHOLE = ("region", "chromosome", "contig", "scaffold", "supercontig", "source")
"""Features of these types describe a record as a whole, so they are no class of its bases."""


def read_annotation(path: Path, option: str) -> Iterator[Row]:
    """The features of an annotation, with their class.

    Args:
        path: GFF3 or GTF by the end of its name, as it is or with .gz; else BED.
        option: of the command line that names the file, for messages.

    Raises:
        DataError: the file cannot be read, or a line is not of its format. The message names file and line.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1].lower() not in GFF:
        yield from read_rows(path, "class", option)
        return
    opened: Any = gzip.open if path.suffix == ".gz" else open
    lines = None
    try:
        with opened(path, "rb") as file:
            lines = _Lines(file)
            for feature in pysam.tabix_iterator(lines, pysam.asGFF3()):
                if feature.feature in WHOLE:
                    continue
                if not 0 <= feature.start < feature.end:
                    raise ValueError(f"start and end of {feature.feature} are not numbers, or hold no base")
                yield Row(feature.contig, feature.start, feature.end, feature.feature, lines.number)
    except (ValueError, EOFError) as error:
        place = f": line {lines.number}" if lines else ""
        raise DataError(f"{path}{place}: not a line of GFF ({error})") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}): give {option} GFF or BED"
        ) from None


class _Lines:
    """The lines of a GFF file as pysam wants them, up to the sequences that may follow; `number` of the last one."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file, self.number, self._ended = file, 0, False

    def readline(self) -> bytes:
        line = b"" if self._ended else self._file.readline()
        if line.startswith(b"##FASTA"):
            line, self._ended = b"", True
        self.number += bool(line)
        return line
