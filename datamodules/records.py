"""A stream of records from files: FASTA for dna and protein, one record per file for bytes; plain or gzip.

Memory holds one record at a time, and the names met. Compression is told by a file's first bytes, not its name.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import dnaio
import numpy as np

from datamodules.alphabet import Alphabet
from datamodules.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_BUFFER_BYTES = 1 << 20

OpenFile = Callable[[Path], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class Record:
    """One named sequence.

    name: the first word of the FASTA header, or the file's name without `.gz`.
    description: the rest of the header.
    source: name of the file it came from.
    sequence: its bases, one byte each, as the file has them (case kept).
    """

    name: str
    description: str
    source: str
    sequence: bytes


def check_inputs(paths: Sequence[Path]) -> None:
    """Raise DataError unless every path is a file that can be opened, and there is one at all."""
    if not paths:
        raise DataError("no input files: name at least one")
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if not path.is_file():
            raise DataError(f"{path}: not a file: name the sequence files themselves")
        _first_bytes(path)


def read_records(
    paths: Sequence[Path],
    alphabet: Alphabet,
    open_file: OpenFile = lambda path: path.open("rb"),
) -> Iterator[Record]:
    """Every record of every file, in order.

    `open_file` opens a path for reading bytes; a caller who counts what is read passes its own.

    Raises DataError for a file that is missing, empty, damaged, cut off or not FASTA, for a sequence with a
    character that the alphabet does not know, and for a name met twice.
    """
    check_inputs(paths)
    first_seen: dict[str, str] = {}
    for path in paths:
        for record in _records_of(path, alphabet, open_file):
            if record.name in first_seen:
                raise DataError(
                    f"{path}: a second record is named {record.name!r} (the first is in "
                    f"{first_seen[record.name]}): names tell records apart, rename one"
                )
            first_seen[record.name] = record.source
            yield record


def _records_of(path: Path, alphabet: Alphabet, open_file: OpenFile) -> Iterator[Record]:
    """The records of one file; what its readers raise becomes a DataError that names the file."""
    try:
        with open_file(path) as raw:
            content = gzip.GzipFile(fileobj=raw) if _first_bytes(path) == _GZIP_MAGIC else raw
            with io.BufferedReader(cast(io.RawIOBase, content), _BUFFER_BYTES) as buffered:
                file = cast(BinaryIO, buffered)
                if alphabet.name == "bytes":
                    yield _text(path, file)
                else:
                    yield from _fasta(path, file, alphabet)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip data is cut off or damaged ({error}): copy the file again"
        ) from error
    except (dnaio.FileFormatError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not FASTA ({error}): give a plain or gzip FASTA file") from error


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_GZIP_MAGIC))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _text(path: Path, file: BinaryIO) -> Record:
    content = file.read()
    if not content:
        raise DataError(f"{path}: the file is empty")
    return Record(path.name.removesuffix(".gz"), "", path.name, content)


def _fasta(path: Path, file: BinaryIO, alphabet: Alphabet) -> Iterator[Record]:
    empty = True
    with dnaio.open(file, fileformat="fasta") as reader:
        for entry in reader:
            empty = False
            if not entry.id:
                raise DataError(f"{path}: a record has no name: every '>' needs one right behind it")
            record = Record(entry.id, entry.comment or "", path.name, entry.sequence.encode("ascii"))
            _check_characters(path, record, alphabet)
            yield record
    if empty:
        raise DataError(f"{path}: the file holds no FASTA record")


def _check_characters(path: Path, record: Record, alphabet: Alphabet) -> None:
    known = alphabet.known[np.frombuffer(record.sequence, np.uint8)]
    if not known.all():
        where = int(known.argmin())
        raise DataError(
            f"{path}: record {record.name!r} has {chr(record.sequence[where])!r} at base {where + 1}, which "
            f"alphabet {alphabet.name} does not know: mend the file or prepare it with another --alphabet"
        )
