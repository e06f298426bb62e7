"""`megabase index DIR`: writes index.parquet beside WebDataset tars that other programs wrote.

Members KEY.seq and KEY.txt hold one sequence as plain bytes, KEY.npy one as an array, KEY.fasta (.fa, .fna) any
number in lines of one width. An optional KEY.json names the record and its source. The tars are not changed: bases are
read out of them by byte range, so neither a tar nor its members may be compressed.
"""

import io
import json
import mmap
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy_format

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.files import sync
from megabase.datamodules.index.index_file import INDEX_NAME, RowBatches, segment_row, write_index
from megabase.datamodules.index.leakage import write_leakage
from megabase.datamodules.index.lines import byte_of, without_line_ends
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.composition import Composition
from megabase.datamodules.prepare.leaks import leaks_of, warn
from megabase.datamodules.prepare.records import Names, compression
from megabase.datamodules.prepare.sketch import Sampler, scale_for
from megabase.datamodules.prepare.splits import END, SIMILARITY, Splits, draw
from megabase.datamodules.prepare.tars import headers
from megabase.datamodules.progress import bar

_COMPRESSED = (".gz", ".bgz", ".zst", ".bz2", ".xz")
_COMPRESSED_TARS = (*(f".tar{suffix}" for suffix in _COMPRESSED), ".tgz", ".tbz2", ".txz")
_LINE_ENDS = b"\r\n"
_NPY_HEAD_BYTES = 64 << 10


class _Span(NamedTuple):
    """Bytes [start, stop) of a tar."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Member:
    """A member that holds sequences.

    Attributes:
        path: name in the tar.
        content: where its bytes lie.
        about: where the bytes of its .json lie; None if it has none.
    """

    path: PurePosixPath
    content: _Span
    about: _Span | None


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a member.

    Attributes:
        name: from a FASTA header, else empty.
        bases: without line ends.
        offset: byte in the tar of the first base.
        line_bases, line_bytes: as in the index.
    """

    name: str
    bases: memoryview
    offset: int
    line_bases: int = 0
    line_bytes: int = 0

    def byte_of(self, base: int) -> int:
        """The byte of the tar where a base lies."""
        return self.offset + int(byte_of(base, self.line_bases, self.line_bytes))


def index_tars(
    directory: str | Path,
    alphabet: str = "dna",
    valid: str | float | None = None,
    test: str | float | None = None,
    intervals: str | Path | None = None,
    split_by: str = END,
    allow_other: bool = False,
    progress: bool = True,
) -> ShardIndex:
    """Write index.parquet beside the tars in a directory, and open them.

    A record is named by "record" in its .json, else by its member's path without extension; in FASTA by the first word
    of its header. Its source is "source" in its .json, else the tar's name. Line ends at the end of a .seq or .txt do
    not belong to the sequence, unless the alphabet is bytes.

    Args:
        directory: where the tars lie.
        alphabet: "dna", "protein" or "bytes".
        valid, test, intervals: which bases are for validation and test, see `Splits.parse`.
        split_by: what a fraction takes, see `Splits.parse`.
        allow_other: accept tars that hold RNA, DNA for protein, or mostly N: see `Composition.check`.
        progress: show a bar over the tars' bytes on stderr.

    Raises:
        DataError: the directory has no tars, or has an index; a tar or member is compressed, cut off or damaged; lines
            of FASTA differ in width; an array is not one row of bytes; a byte is not in the alphabet, or a tar is of
            another kind than the alphabet; a name occurs twice; the splits are impossible or leave nothing to train on.
            The directory is then unchanged.
    """
    directory, letters = Path(directory), Alphabet.named(alphabet)
    splits = Splits.parse(valid, test, intervals, split_by)
    if split_by == SIMILARITY:
        raise DataError(f"index --split-by {SIMILARITY}: only `megabase prepare` can: use --split-by record")
    tars = _tars(directory)
    index = directory / INDEX_NAME
    if index.exists():
        raise DataError(f"{index}: exists already: remove it to index the tars again")
    sizes = {path.name: path.stat().st_size for path in tars}
    sampled = letters.name == "dna" and splits.hold_out
    rows = _Rows(letters, splits, allow_other, Sampler(scale_for(sum(sizes.values()))) if sampled else None)
    with bar("Indexing", sum(sizes.values()), progress) as report:
        for path in tars:
            rows.add(path)
            report(sizes[path.name])
    rows.check(directory)
    leaks = leaks_of([rows.sampler.finish()]) if rows.sampler else []
    partial = index.with_name(f"{INDEX_NAME}.partial")
    try:
        write_index(partial, rows.batches(), letters, sizes, list(rows.sources))
        sync(partial)
        write_leakage(directory, leaks)
        partial.rename(index)
    except OSError as error:
        raise DataError(
            f"{index}: cannot be written ({error.strerror}): the directory needs room and the right to write"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    warn(leaks)
    return ShardIndex.open(directory)


class _Rows:
    """Collects the rows of the index tar by tar, and checks what concerns all of them."""

    def __init__(
        self, alphabet: Alphabet, splits: Splits, allow_other: bool, sampler: Sampler | None
    ) -> None:
        self.sampler = sampler
        self.sources: dict[str, None] = {}
        self._allow_other = allow_other
        self._alphabet = alphabet
        self._splits = splits
        self._names = Names(lambda first, second: "names tell records apart, rename one")
        self._members = 0
        self._in_split: set[str] = set()
        self._trained = False
        self._rows = RowBatches()

    def add(self, path: Path) -> None:
        """Add the rows of one tar."""
        members = _members(path)
        with path.open("rb") as file:  # the map closes when its last view is gone
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = Composition(path, self._alphabet)
        for member in members:
            self._add_member(path, content, member, found)
        if not self._allow_other:
            found.check()
        self._members += len(members)

    def check(self, directory: Path) -> None:
        """Raise DataError if there is no record, a split names a missing one, or none is for training."""
        if not self._members:
            raise DataError(f"{directory}: no member of its tars ends in {' '.join(_READERS)}")
        self._splits.check_names(self._in_split, self._every_name)
        if not self._trained:
            raise DataError(f"{directory}: no base is left to train on: see --valid, --test and --intervals")

    def batches(self) -> list[pa.RecordBatch]:
        """All rows."""
        return self._rows.all()

    def _every_name(self) -> list[str]:
        return list(dict.fromkeys(name for batch in self.batches() for name in batch["record"].to_pylist()))

    def _add_member(self, path: Path, content: mmap.mmap, member: _Member, found: Composition) -> None:
        place = f"{path}: member {member.path}"
        about = _about(place, content, member.about)
        source = about.get("source", path.name)
        self.sources[source] = None
        for sequence in _READERS[member.path.suffix.lower()](place, content, member.content, self._alphabet):
            name = sequence.name or about.get("record", str(member.path.with_suffix("")))
            self._names.add(name, source, place)
            found.add(name, sequence.bases, place)
            self._add_record(name, source, path.name, sequence)

    def _add_record(self, name: str, source: str, shard: str, sequence: _Sequence) -> None:
        if name in self._splits.named:
            self._in_split.add(name)
        for segment in self._splits.of(
            name, len(sequence.bases), partial(draw, sequence.bases, self._alphabet)
        ):
            row = segment_row(
                name,
                source,
                segment,
                shard,
                sequence.byte_of(segment.start),
                sequence.bases[segment.start : segment.start + segment.length],
                self._alphabet,
                sequence.line_bases,
                sequence.line_bytes,
            )
            self._trained = self._trained or segment.split == TRAIN
            self._rows.add(row)
            if self.sampler is not None:
                bases = sequence.bases[segment.start : segment.start + segment.length]
                self.sampler.add(segment.split, bases, row["gaps"])


def _tars(directory: Path) -> list[Path]:
    """The tars of a directory, sorted; DataError if there is none or one is compressed."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory: name the one with the tars")
    tars = sorted(directory.glob("*.tar"))
    for path in sorted(directory.iterdir()):
        if path.name.endswith(_COMPRESSED_TARS) or (path in tars and compression(path)):
            raise DataError(
                f"{path}: a compressed tar cannot be read by byte range: decompress it and index again"
            )
    if not tars:
        raise DataError(f"{directory}: no *.tar in it: name the directory with the tars")
    return tars


def _members(path: Path) -> list[_Member]:
    """The members of a tar that hold sequences, in order, each with its .json."""
    found: list[tuple[PurePosixPath, _Span]] = []
    abouts: dict[PurePosixPath, _Span] = {}
    for header in _headers(path):
        inside = PurePosixPath(header.name)
        kind = inside.suffix.lower()
        if header.isdir() or inside.name.startswith("."):  # webdataset skips hidden files, too
            continue
        if kind in _READERS and not _is_utf8(header.name):
            raise DataError(f"{path}: member {header.name!r}: its name is not UTF-8: rename the file")
        if kind in _COMPRESSED and PurePosixPath(inside.stem).suffix.lower() in _READERS:
            raise DataError(
                f"{path}: member {inside}: a compressed member cannot be read by byte range: decompress it"
            )
        if kind in _READERS and (not header.isreg() or header.issparse()):
            raise DataError(f"{path}: member {inside}: a link or a sparse file: make the tar of plain files")
        span = _Span(header.offset_data, header.offset_data + header.size)
        if kind in _READERS:
            found.append((inside, span))
        elif kind == ".json":
            abouts[inside.with_suffix("")] = span
    return [_Member(inside, span, abouts.get(inside.with_suffix(""))) for inside, span in found]


def _is_utf8(name: str) -> bool:
    """Whether a name was UTF-8: tarfile decodes other bytes as lone surrogates."""
    return name == name.encode(errors="ignore").decode()


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar in order; DataError if it is cut off, damaged or not a tar."""
    try:
        with path.open("rb") as file:
            yield from headers(file)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a tar, cut off or damaged ({error}): copy the file again") from error


def _about(place: str, content: mmap.mmap, span: _Span | None) -> dict[str, str]:
    """ "record" and "source" of a member's .json, where they are non-empty texts."""
    if span is None:
        return {}
    try:
        about = json.loads(content[span.start : span.stop])
        texts = about if isinstance(about, dict) else {}
        texts = {
            key: texts[key] for key in ("record", "source") if isinstance(texts.get(key), str) and texts[key]
        }
        "".join(texts.values()).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: its .json is damaged ({error}): repair or remove it") from error
    return texts


def _plain(place: str, content: mmap.mmap, span: _Span, alphabet: Alphabet) -> Iterator[_Sequence]:
    """A member that is one sequence."""
    stop = span.stop if alphabet.name == "bytes" else _stop_of_bases(content, span)
    yield _Sequence("", memoryview(content)[span.start : stop], span.start)


def _array(place: str, content: mmap.mmap, span: _Span, alphabet: Alphabet) -> Iterator[_Sequence]:
    """The one sequence of an .npy file."""
    head = io.BytesIO(content[span.start : min(span.stop, span.start + _NPY_HEAD_BYTES)])
    try:
        version = npy_format.read_magic(head)
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, kind = read(head)
    except ValueError as error:
        raise DataError(f"{place}: not a numpy array ({error}): write it again with numpy.save") from error
    if len(shape) != 1 or kind not in (np.dtype(np.uint8), np.dtype("S1")):
        raise DataError(f"{place}: {kind} of shape {shape}: it must be uint8 or S1 with one dimension")
    start = span.start + head.tell()
    if start + shape[0] != span.stop:
        raise DataError(f"{place}: {span.stop - start} bytes for {shape[0]} elements: write it again")
    yield _Sequence("", memoryview(content)[start : span.stop], start)


def _fasta(place: str, content: mmap.mmap, span: _Span, alphabet: Alphabet) -> Iterator[_Sequence]:
    """The records of a FASTA file."""
    start, stop = span
    if content[start : start + 1][: stop - start] != b">":
        raise DataError(f"{place}: not FASTA: it must begin with '>'")
    while start < stop:
        following = content.find(b"\n>", start, stop) + 1 or stop
        header_end = content.find(b"\n", start, following) + 1 or following
        words = content[start + 1 : header_end].decode(errors="replace").split(maxsplit=1)
        if not words or content[start + 1 : start + 2].isspace():
            raise DataError(f"{place}: a record has no name: every '>' must be followed by one")
        lines = _Span(header_end, _stop_of_bases(content, _Span(header_end, following)))
        yield _lines(place, words[0], content, lines)
        start = following


def _lines(place: str, name: str, content: mmap.mmap, span: _Span) -> _Sequence:
    """A sequence in lines of one width. The last line may be shorter; `span` does not include its end."""
    first_end = content.find(b"\n", *span)
    if first_end < 0:
        return _Sequence(name, memoryview(content)[span.start : span.stop], span.start)
    line_bytes = first_end + 1 - span.start
    line_bases = _stop_of_bases(content, _Span(span.start, first_end + 1)) - span.start
    raw = np.frombuffer(content, np.uint8, span.stop - span.start, span.start)
    count = len(raw) // line_bytes
    lines, last = raw[: count * line_bytes].reshape(count, line_bytes), raw[count * line_bytes :]
    is_even = (lines[:, line_bases:] == lines[0, line_bases:]).all() and len(last) <= line_bases
    bases = without_line_ends(raw, 0, line_bases, line_bytes) if is_even and line_bases else bytearray()
    if not bases or any(end in bases for end in _LINE_ENDS):
        raise DataError(
            f"{place}: record {name!r} has lines of different width, so its bases cannot be found by "
            "counting: take the file out of the tar and `megabase prepare` it"
        )
    return _Sequence(name, memoryview(bases), span.start, line_bases, line_bytes)


def _stop_of_bases(content: mmap.mmap, span: _Span) -> int:
    """Where the span stops once the line ends at its end are left out."""
    stop = span.stop
    while stop > span.start and content[stop - 1] in _LINE_ENDS:
        stop -= 1
    return stop


_Reader = Callable[[str, mmap.mmap, _Span, Alphabet], Iterator[_Sequence]]
_READERS: dict[str, _Reader] = {
    ".seq": _plain,
    ".txt": _plain,
    ".fasta": _fasta,
    ".fa": _fasta,
    ".fna": _fasta,
    ".npy": _array,
}
