"""Reads records from FASTA, FASTQ, JSONL, GenBank and EMBL files, or one record per file for bytes; compressed or not.

Memory holds one record at a time. Compression (gzip, bgzip, zstd) and formats are recognised by a file's first bytes.
For bytes JSONL is recognised by its name alone, because any text may begin with a brace.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

import dnaio
import pyarrow as pa
from isal import igzip, isal_zlib

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.annotated import read_annotated
from megabase.datamodules.prepare.composition import Composition
from megabase.datamodules.prepare.rewrite import with_numbers

_COMPRESSED_NAMES = (".gz", ".bgz", ".zst", ".zstd")
_JSONL_NAMES = (".jsonl", ".ndjson")
_UNREAD = {
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\0": "xz",
    b"PK\3\4": "zip",
}
"""Compressions that cannot be read, by a file's first bytes."""

_ANNOTATED = {b"LOCUS": "genbank", b"ID   ": "embl"}
"""Formats with annotation, by a file's first bytes."""

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPED = (
    b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f: a skippable frame, with which pzstd begins (RFC 8878, 3.1.2)
)
_BGZIP_FIELD = (
    b"BC"  # in the header of every bgzip block; an empty block ends the file (SAM specification, 4.1)
)
_BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_HEAD_BYTES = 16
_BUFFER_BYTES = 1 << 20
_DIGEST_BYTES = 15  # 120 bits: among 10^12 names, two collide by chance with probability 10^-12
_ISAL_ERROR = cast(type[Exception], isal_zlib.error)  # its stub calls the class an instance

OpenFile = Callable[[Path], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class Record:
    """One named sequence.

    Attributes:
        name: the first word of the FASTA or FASTQ header; "id" or "name" of the JSON object, else `FILE:LINE`; for
            bytes the file's name. FILE is without the suffix of its compression.
        description: the rest of the header.
        source: name of the file it came from.
        sequence: its bases, one byte each, as in the file (case kept).
    """

    name: str
    description: str
    source: str
    sequence: bytes


def told_apart(first: str, second: str) -> str:
    """How to tell two records of one name apart, in the input files `first` and `second`."""
    if first == second:
        return f"number all of its records: {with_numbers(Path(second))}"
    return "add --prefix-names, which puts the name of its file before each record's"


def second_record(name: str, first: str, second: str, way: str) -> DataError:
    """The error for two records with one name at `first` and `second`; `way` is the way out."""
    return DataError(f"{second}: a second record is named {name!r} (the first is in {first}): {way}")


class Names:
    """Finds a record name that occurs twice. Memory: about a hundred bytes per name, whatever its length."""

    def __init__(self, way: Callable[[str, str], str] = told_apart) -> None:
        """
        Args:
            way: the way out, from where the first and the second record of one name are.
        """
        self._way = way
        self._sources: dict[bytes, str] = {}

    def add(self, name: str, source: str, place: str) -> None:
        """Add a record's name.

        Args:
            name: the name.
            source: the input file that the record is in.
            place: where the record is, for the message.

        Raises:
            DataError: the name was added before.
        """
        digest = blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest()
        if digest in self._sources:
            first = self._sources[digest]
            raise second_record(name, first, place, self._way(first, place))
        self._sources[digest] = source


def check_compression(path: Path) -> None:
    """Raise DataError if a file is compressed in a way that cannot be read."""
    if unread := [name for magic, name in _UNREAD.items() if _head(path).startswith(magic)]:
        raise DataError(f"{path}: {unread[0]} is not supported: decompress it, or use gzip, bgzip or zstd")


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def read_file(
    path: Path,
    alphabet: Alphabet,
    open_file: OpenFile = _open,
    field: str = "text",
    allow_other: bool = False,
) -> Iterator[Record]:
    """The records of one file, in order.

    Args:
        path: the file.
        alphabet: decides which characters a sequence may hold, and whether a text file is one record (bytes).
        open_file: opens the path for reading bytes; a caller that counts the bytes passes its own.
        field: key of the sequence in a line of JSONL.
        allow_other: whether the file may be of another kind than the alphabet, or mostly N: see `Composition.check`.

    Raises:
        DataError: the file is missing, empty, damaged, cut off or not of its format; a sequence holds a byte that is
            not in the alphabet; or, after the last record, the file is RNA for dna, DNA for protein, or mostly N.
    """
    packed = compression(path)
    try:
        with open_file(path) as raw:
            content = _decompressed(path, raw, packed)
            with io.BufferedReader(content, _BUFFER_BYTES) as buffered:
                found = Composition(path, alphabet)
                for record in _records(path, buffered, alphabet, field):
                    found.add(record.name, record.sequence)
                    yield record
                if not allow_other:
                    found.check()
    except (EOFError, OSError, _ISAL_ERROR) as error:
        if not packed:
            raise DataError(f"{path}: cannot be read ({error})") from error
        raise DataError(
            f"{path}: the {packed} data is cut off or damaged ({error}): copy the file again"
        ) from error


def compression(path: Path) -> str:
    """How a file is compressed, by its first bytes: "gzip", "bgzip", "zstd", or "" if it is not."""
    head = _head(path)
    if head.startswith(_GZIP_MAGIC):
        return "bgzip" if head[12:14] == _BGZIP_FIELD else "gzip"
    skipped = head[1:4] == _ZSTD_SKIPPED and head[0] >> 4 == 5
    return "zstd" if skipped or head.startswith(_ZSTD_MAGIC) else ""


def plain_name(path: Path) -> str:
    """The file's name without the suffix of its compression."""
    return path.stem if path.suffix in _COMPRESSED_NAMES else path.name


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _decompressed(path: Path, raw: BinaryIO, packed: str) -> Any:
    """The decompressed stream; reading damaged data raises EOFError, OSError or isal's error."""
    if packed == "bgzip" and not _ends_with(
        path, _BGZIP_END
    ):  # a file cut between two blocks looks complete otherwise
        raise EOFError("bgzip's last block is missing")
    if packed in ("gzip", "bgzip"):
        return igzip.IGzipFile(fileobj=raw)
    if packed == "zstd":
        return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return raw


def _ends_with(path: Path, end: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(-min(len(end), path.stat().st_size), io.SEEK_END)
        return file.read() == end


def _records(path: Path, file: io.BufferedReader, alphabet: Alphabet, field: str) -> Iterator[Record]:
    if plain_name(path).lower().endswith(_JSONL_NAMES):
        return _jsonl(path, file, field)
    if alphabet.name == "bytes":
        return _text(path, file)
    head = file.peek(1)
    if head[:1] == b"{":
        return _jsonl(path, file, field)
    for start, form in _ANNOTATED.items():
        if head.startswith(start):
            return (
                Record(name, about, path.name, bases)
                for name, about, bases in read_annotated(path, file, form)
            )
    return _sequences(path, file, "fastq" if head[:1] == b"@" else "fasta")


def _text(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    content = file.read()
    if not content:
        raise DataError(f"{path}: the file is empty")
    yield Record(plain_name(path), "", path.name, content)


def _sequences(path: Path, file: io.BufferedReader, form: str) -> Iterator[Record]:
    """The records of a FASTA or FASTQ file."""
    source, empty = path.name, True
    try:
        with dnaio.open(cast(BinaryIO, file), fileformat=form) as reader:
            for entry in reader:
                empty = False
                if not entry.id:
                    sign = ">" if form == "fasta" else "@"
                    raise DataError(f"{path}: a record has no name: every {sign!r} must be followed by one")
                record = Record(entry.id, entry.comment or "", source, entry.sequence.encode("ascii"))
                del entry  # so that memory does not hold a chromosome twice
                yield record
    except (dnaio.FileFormatError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise DataError(
            f"{path}: not {form.upper()} ({problem}): correct it, or give FASTA, FASTQ, JSONL, GenBank or "
            "EMBL, plain or in gzip, bgzip or zstd; for text use --alphabet bytes"
        ) from error
    if empty:
        raise DataError(f"{path}: the file holds no FASTA record")


def _jsonl(path: Path, file: io.BufferedReader, field: str) -> Iterator[Record]:
    source, plain, empty = path.name, plain_name(path), True
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        empty = False
        place = f"{path}: line {number}"
        item = _json_object(place, line)
        yield Record(_name(place, item) or f"{plain}:{number}", "", source, _field(place, item, field))
    if empty:
        raise DataError(f"{path}: the file holds no line of JSON")


def _json_object(place: str, line: bytes) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = (
            f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        )
        raise DataError(f"{place}: not JSON ({problem}): every line must be one object") from error
    if not isinstance(item, dict):
        raise DataError(f"{place}: {type(item).__name__}, not an object: every line must be {{...}}")
    return item


def _name(place: str, item: dict[str, Any]) -> str:
    """ "id" or "name" of the object, if it is a text or an integer; else empty."""
    for key in ("id", "name"):
        if isinstance(item.get(key), str) or type(item.get(key)) is int:
            return _utf8(place, key, str(item[key])).decode()
    return ""


def _field(place: str, item: dict[str, Any], field: str) -> bytes:
    if field not in item:
        fields = ", ".join(map(repr, item)) or "none"
        raise DataError(f"{place}: no field {field!r} (there are {fields}): choose with --field")
    if not isinstance(item[field], str):
        raise DataError(f"{place}: field {field!r} is {type(item[field]).__name__}, it must be a string")
    return _utf8(place, field, item[field])


def _utf8(place: str, field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: field {field!r} is not valid text ({error}): correct the file") from error
