"""The files that `megabase embed` writes: Parquet, Zarr and AnnData's h5ad, piece by piece.

zarr and anndata are extras: a missing one is an error before anything is read.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from megabase.pipeline.errors import UserError

CHUNK_BYTES = 1 << 22
"""Bytes of a chunk of Zarr and h5ad."""


@dataclass(frozen=True)
class Rows:
    """Some rows of the output, in order.

    Attributes:
        record: (n,) its number among `Table.records`.
        start, end: (n,) the bases of each row: the region, or the bin.
        bases: (n,) how many letters the row was pooled from.
        states: (n, width) fp32.
    """

    record: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    bases: NDArray[np.int64]
    states: NDArray[np.float32]


@dataclass(frozen=True)
class Table:
    """The output.

    Attributes:
        records: names of the records.
        rows: their number.
        width: numbers of each row.
        dtype: of these numbers in the file.
        settings: what the file says about itself.
        pieces: all rows, in pieces.
    """

    records: Sequence[str]
    rows: int
    width: int
    dtype: str
    settings: dict[str, Any]
    pieces: Callable[[], Iterator[Rows]]

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return max(1, min(self.rows, CHUNK_BYTES // (self.width * np.dtype(self.dtype).itemsize)))


def write_parquet(path: Path, table: Table) -> None:
    """Columns record, start, end, bases, embedding (a list of fixed size). Raises OSError."""
    kind = pa.from_numpy_dtype(np.dtype(table.dtype))
    schema = pa.schema(
        [
            ("record", pa.string()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("bases", pa.int64()),
            ("embedding", pa.list_(kind, table.width)),
        ],
        metadata={"megabase": json.dumps(table.settings)},
    )
    names = pa.array(table.records)
    with parquet.ParquetWriter(path, schema, use_dictionary=["record"]) as writer:
        for piece in table.pieces():
            flat = pa.array(piece.states.astype(table.dtype).ravel())
            columns = [
                names.take(pa.array(piece.record)),
                *(pa.array(column) for column in (piece.start, piece.end, piece.bases)),
                pa.FixedSizeListArray.from_arrays(flat, table.width),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def write_zarr(path: Path, table: Table) -> None:
    """A group with the arrays embedding (rows, width), start, end, bases, and record: its place in the attribute
    `records`."""
    import zarr

    group = zarr.open_group(path, mode="w")
    group.attrs.update({"records": list(table.records), "megabase": table.settings})
    columns = ("record", "start", "end", "bases")
    arrays = {
        "embedding": group.create_array(
            "embedding",
            shape=(table.rows, table.width),
            chunks=(table.chunk_rows, table.width),
            dtype=table.dtype,
            dimension_names=("row", "channel"),
        ),
        **{
            name: group.create_array(
                name,
                shape=(table.rows,),
                chunks=(min(table.rows, 1 << 20),),
                dtype="int64",
                dimension_names=("row",),
            )
            for name in columns
        },
    }
    # Whole chunks at a time: a chunk that is written in two parts is read again and compressed twice.
    for first, piece in rechunked(table):
        of = slice(first, first + len(piece.record))
        arrays["embedding"][of] = piece.states.astype(table.dtype)
        for name in columns:
            arrays[name][of] = getattr(piece, name)


def write_h5ad(path: Path, table: Table) -> None:
    """An AnnData with `X` (rows, width), and record, start, end and bases in `obs`, which is in memory as a whole."""
    import anndata
    import h5py
    import pandas as pd

    shape = (table.rows, table.width)
    with h5py.File(path, "w") as file:
        described = anndata.AnnData(shape=shape, uns={"megabase": json.dumps(table.settings)})
        described.var_names = [f"channel_{number}" for number in range(table.width)]
        anndata.io.write_elem(file, "/", described)
        # X as anndata writes it, but piece by piece.
        x = file.create_dataset("X", shape, table.dtype, chunks=(table.chunk_rows, table.width))
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        kept: list[pd.DataFrame] = []
        for first, piece in rechunked(table):
            x[first : first + len(piece.record)] = piece.states.astype(table.dtype)
            record = pd.Categorical.from_codes(piece.record, categories=list(table.records))
            columns = {"record": record, "start": piece.start, "end": piece.end, "bases": piece.bases}
            kept.append(pd.DataFrame(columns))
        obs = pd.concat(kept, ignore_index=True)
        place = obs["start"].astype(str) + "-" + obs["end"].astype(str)
        obs.index = pd.Index(obs["record"].astype(str) + ":" + place)
        anndata.io.write_elem(file, "obs", obs)


def rechunked(table: Table) -> Iterator[tuple[int, Rows]]:
    """The number of the first row, and some rows, which begin at the border of a chunk and end at one."""
    first, held = 0, None
    for piece in table.pieces():
        held = piece if held is None else joined(held, piece)
        whole = len(held.record) // table.chunk_rows * table.chunk_rows
        if first + len(held.record) == table.rows:
            whole = len(held.record)
        if whole:
            yield first, cut(held, 0, whole)
            first, held = first + whole, cut(held, whole, len(held.record))


def joined(one: Rows, other: Rows) -> Rows:
    """Rows one after the other."""
    return Rows(*(np.concatenate([getattr(each, name) for each in (one, other)]) for name in vars(one)))


def cut(rows: Rows, start: int, end: int) -> Rows:
    """Rows [start, end) of some."""
    return Rows(*(column[start:end] for column in vars(rows).values()))


WRITERS = {".parquet": write_parquet, ".zarr": write_zarr, ".h5ad": write_h5ad}
EXTRAS = {".zarr": ("zarr",), ".h5ad": ("anndata", "h5py")}


def check_suffix(path: Path) -> None:
    """Raise UserError if the suffix of a path is no format, or its library is not installed."""
    if path.suffix not in WRITERS:
        raise UserError(f"--output {path}: its suffix must be one of {', '.join(WRITERS)}")
    for module in EXTRAS.get(path.suffix, ()):
        try:
            importlib.import_module(module)
        except ImportError:
            install = f"pip install 'megabase[{EXTRAS[path.suffix][0]}]'"
            raise UserError(f"--output {path}: the package {module} is not installed: {install}") from None
