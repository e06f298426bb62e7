"""Reads GenBank and EMBL files with Biopython, which is an optional package: most genomes come as FASTA."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megabase.datamodules.errors import DataError

SUFFIXES = (".gb", ".gbk", ".gbff", ".genbank", ".embl")
"""How the names of such files end."""

_NAMES = {"genbank": "GenBank", "embl": "EMBL"}


def read_annotated(path: Path, file: BinaryIO, form: str) -> Iterator[tuple[str, str, bytes]]:
    """Name (accession and version), description and bases of every record.

    Args:
        path: the file, for messages.
        file: its bytes, decompressed.
        form: "genbank" or "embl".

    Raises:
        DataError: Biopython is not installed, the file is damaged, or a record has no sequence.
    """
    try:
        from Bio import BiopythonWarning, SeqIO
    except ImportError:
        raise DataError(
            f"{path}: is {_NAMES[form]}, and reading it needs Biopython: `pip install biopython`, or "
            "download the same record as FASTA"
        ) from None
    empty = True
    with warnings.catch_warnings(), io.TextIOWrapper(file, "utf-8", errors="replace") as text:
        warnings.simplefilter("ignore", BiopythonWarning)
        try:
            for record in SeqIO.parse(text, form):
                empty = False
                yield record.id, record.description, _bases(path, record)
        except DataError:
            raise
        except (ValueError, AssertionError, IndexError) as error:  # what its parsers raise
            raise DataError(f"{path}: not {_NAMES[form]} ({error}): correct it, or give FASTA") from error
    if empty:
        raise DataError(f"{path}: the file holds no {_NAMES[form]} record")


def _bases(path: Path, record: Any) -> bytes:
    from Bio.Seq import UndefinedSequenceError

    try:
        return bytes(record.seq)
    except UndefinedSequenceError:
        raise DataError(
            f"{path}: record {record.id!r} has no sequence, only annotation: download it with its sequence"
        ) from None
