"""Reads sequences and labels as text: tables (CSV, TSV, Parquet), and folders of a file or folder per class and split.

Tables are read by pyarrow, FASTA by dnaio.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dnaio
import pyarrow as pa
from pyarrow import csv, parquet

from megabase.datamodules.prepare.closest import hint
from megabase.pipeline.errors import UserError, first_line

FASTA = (".fa", ".fasta", ".fna", ".ffn", ".faa")
TEXT = (".txt",)
PACKED = (".gz",)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table. `label` is None if the labels are not needed."""

    sequence: str = "sequence"
    label: str | None = "label"
    split: str = "split"


@dataclass(frozen=True)
class Table:
    """Rows as text.

    Attributes:
        names: of the rows, unique.
        sequences: letters without white space.
        labels: empty texts where a cell is empty; an empty list if they were not asked for.
        splits: as they are written; None: the source has none.
    """

    names: list[str]
    sequences: list[bytes]
    labels: list[str]
    splits: list[str] | None


def read_table(path: Path, columns: Columns) -> Table:
    """Read a table by its name: .parquet, .csv, .tsv or .txt (tabs), the text ones as they are or with .gz.

    Raises:
        UserError: the file cannot be read, lacks a column, has no row, or a sequence is empty.
    """
    content = _content(path)
    needed = [name for name in (columns.sequence, columns.label) if name is not None]
    for name in needed:
        if name not in content.column_names:
            option = "--sequence" if name == columns.sequence else "--label"
            raise UserError(
                f"{path} has no column {name!r}{hint(name, content.column_names)}: it has"
                f" {', '.join(content.column_names)}: name one with {option}"
            )
    if not content.num_rows:
        raise UserError(f"{path} has no rows")
    texts = {name: _texts(content.column(name)) for name in needed}
    names = [f"row {number}" for number in range(1, content.num_rows + 1)]
    sequences = [text.encode("utf-8", "replace") for text in texts[columns.sequence]]
    _check_sequences(path, names, sequences)
    splits = _texts(content.column(columns.split)) if columns.split in content.column_names else None
    labels = [] if columns.label is None else texts[columns.label]
    return Table(names, sequences, labels, splits)


def _content(path: Path) -> pa.Table:
    if not path.exists():
        raise UserError(f"{path}: there is no such file: give a table (.csv, .tsv, .parquet) or a folder")
    suffixes = [each for each in path.suffixes if each not in PACKED]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".parquet":
            return parquet.read_table(path)
        if kind in (".csv", ".tsv", ".txt"):
            # Labels such as 01 or NA stay as they are written.
            read = {
                "column_types": _all_texts(path, "," if kind == ".csv" else "\t"),
                "strings_can_be_null": False,
            }
            delimiter = csv.ParseOptions(delimiter="," if kind == ".csv" else "\t")
            return csv.read_csv(path, parse_options=delimiter, convert_options=csv.ConvertOptions(**read))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a table: {first_line(error)}") from None
    raise UserError(f"{path}: a table ends in .csv, .tsv or .parquet; per-base labels need --genome")


def _all_texts(path: Path, delimiter: str) -> dict[str, Any]:
    """Column -> the type of texts, for every column of a text table."""
    with csv.open_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter)) as opened:
        return {name: pa.string() for name in opened.schema.names}


def _texts(column: pa.ChunkedArray) -> list[str]:
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]


def _check_sequences(path: Path, names: Sequence[str], sequences: Sequence[bytes]) -> None:
    for name, sequence in zip(names, sequences, strict=True):
        if not sequence:
            raise UserError(f"{path}: {name}: the sequence is empty")


def read_folder(path: Path) -> Table:
    """Read DIR/SPLIT/CLASS.fa, DIR/SPLIT/CLASS.txt, or DIR/SPLIT/CLASS/ with such files: as GenomicBenchmarks has them.

    A FASTA file holds any number of sequences, a text file one sequence on each line. The name of the file or folder is
    the label.

    Raises:
        UserError: there is no file in that place, or a file cannot be read.
    """
    names: list[str] = []
    sequences: list[bytes] = []
    labels: list[str] = []
    splits: list[str] = []
    for split in sorted(each for each in path.iterdir() if each.is_dir()):
        for of_class in sorted(split.iterdir()):
            label = of_class.name if of_class.is_dir() else _stem(of_class)
            files = sorted(of_class.rglob("*")) if of_class.is_dir() else [of_class]
            for file in files:
                for name, sequence in _sequences(file):
                    names.append(f"{file.relative_to(path)}: {name}")
                    sequences.append(sequence)
                    labels.append(label)
                    splits.append(split.name)
    if not names:
        raise UserError(
            f"{path} holds no sequences: it needs {path}/train/CLASS.fa, or folders {path}/train/CLASS/ of .txt or .fa"
        )
    _check_sequences(path, names, sequences)
    return Table(names, sequences, labels, splits)


def read_fasta(path: Path) -> Table:
    """Read sequences without labels. Raises UserError if the file cannot be read, or holds none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    found = list(_sequences(path))
    if not found:
        raise UserError(f"{path} holds no sequences")
    names, sequences = [name for name, _ in found], [sequence for _, sequence in found]
    _check_sequences(path, names, sequences)
    return Table(names, sequences, [], None)


def _stem(path: Path) -> str:
    """The name of a file without its format and compression."""
    name = path.name
    for suffix in reversed(path.suffixes):
        if suffix in (*FASTA, *TEXT, *PACKED):
            name = name.removesuffix(suffix)
    return name


def _sequences(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, letters) of the sequences of a file; nothing for a file of another kind."""
    suffixes = [each for each in path.suffixes if each not in PACKED]
    kind = suffixes[-1] if suffixes else ""
    if not path.is_file() or kind not in (*FASTA, *TEXT):
        return
    try:
        if kind in FASTA:
            with dnaio.open(path) as records:
                for number, record in enumerate(records, 1):
                    yield f"{record.id or number}", record.sequence.encode()
            return
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                yield f"line {number}", line.strip()
    except (OSError, dnaio.FileFormatError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
