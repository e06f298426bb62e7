"""Write scores: into the VCF, as INFO fields, or as a Parquet table with one row for each ALT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pysam
from numpy.typing import NDArray
from pyarrow import parquet

from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.variants.calls import SYMBOLIC, Calls, open_vcf, records_of
from megabase.pipeline.inference.variants.columns import SKIPPED, Column

VCF, PARQUET = (".vcf.gz", ".vcf.bgz"), (".parquet",)
_LAST_OF_TBI = 1 << 29


@dataclass(frozen=True)
class Scores:
    """What is written.

    Attributes:
        calls: the variants.
        rows: (ALTs,) the place of each ALT's numbers in `values`; −1: it was not scored.
        columns: what the numbers are.
        values: all numbers by column.
        source: where they come from, a line for the header of a VCF.
    """

    calls: Calls
    rows: Sequence[int]
    columns: Sequence[Column]
    values: Mapping[str, NDArray[Any]]
    source: str

    def value(self, column: Column, alternate: int) -> float | int | None:
        """A number of an ALT; None: it was not scored, or has none."""
        row = self.rows[alternate]
        if row < 0:
            return None
        value = self.values[column.name][row]
        if np.isnan(value):
            return None
        return int(value) if column.whole else float(value)


def check_output(output: Path) -> None:
    """Raise UserError if its name is not that of a file that can be written."""
    if not output.name.endswith(VCF + PARQUET):
        raise UserError(
            f"--output {output}: the name must end in .vcf.gz or .parquet, which tells what is written"
        )


def check_fields(calls: Calls, wanted: Sequence[Column]) -> None:
    """Raise UserError if the VCF has INFO fields of these names already."""
    names = [column.name.upper() for column in wanted]
    if found := [name for name in names if name in calls.header.info]:
        raise UserError(
            f"{calls.path}: has INFO fields {', '.join(found)} already: remove them first, with "
            f"`bcftools annotate -x {','.join(f'INFO/{name}' for name in found)}`, or write Parquet"
        )


def write_parquet(path: Path, scores: Scores) -> None:
    """Write a table with one row for each ALT. Raises OSError."""
    alternates = scores.calls.alternates
    table = {
        "chromosome": pa.array([one.chromosome for one in alternates], pa.string()),
        "position": pa.array([one.position for one in alternates], pa.int64()),
        "id": pa.array([one.name for one in alternates], pa.string()),
        "ref": pa.array([one.reference for one in alternates], pa.string()),
        "alt": pa.array([one.alternate for one in alternates], pa.string()),
        "kind": pa.array([one.edit.kind if one.edit else None for one in alternates], pa.string()),
    }
    for column in scores.columns:
        found = [scores.value(column, number) for number in range(len(alternates))]
        table[column.name] = pa.array(found, pa.int64() if column.whole else pa.float64())
    table[SKIPPED.name] = pa.array([one.skipped for one in alternates], pa.string())
    parquet.write_table(pa.table(table), path)


def write_vcf(path: Path, scores: Scores) -> None:
    """Write the VCF with its INFO fields, compressed with bgzip, sorted. Raises OSError."""
    calls = scores.calls
    places: dict[int, list[int]] = {}
    for place, one in enumerate(calls.alternates):
        places.setdefault(one.record, []).append(place)
    with open_vcf(calls.path) as file:
        _complete(file.header, scores)
        with pysam.VariantFile(str(path), "wz", header=file.header) as target:
            for number, record in _in_order(records_of(file, calls.path), calls.order):
                if number in places:
                    _fill(record, scores, places[number])
                target.write(record)


def index_of(output: Path, calls: Calls) -> Path:
    """The path of a VCF's index. A `.tbi` ends at base 2^29, a `.csi` does not."""
    needs_csi = any(one.position >= _LAST_OF_TBI for one in calls.alternates)
    return output.with_name(f"{output.name}.{'csi' if needs_csi else 'tbi'}")


def write_index(path: Path, scores: Scores) -> None:
    """Write the index of what `write_vcf` writes; the end of its name tells which kind. Raises OSError."""
    whole = path.with_name(f"{path.name}.vcf.gz")
    try:
        write_vcf(whole, scores)
        pysam.tabix_index(str(whole), preset="vcf", force=True, index=str(path), csi=path.suffix == ".csi")
    finally:
        whole.unlink(missing_ok=True)


def _complete(header: pysam.VariantHeader, scores: Scores) -> None:
    """Add what the records and their scores need. (htslib ends the process if a record is translated without it.)"""
    there = {str(line) for line in header.records}
    for line in scores.calls.header.records:
        if str(line) not in there:
            header.add_line(str(line).rstrip("\n"))
    if SYMBOLIC in scores.calls.skipped and "END" not in header.info:
        header.info.add(
            "END", 1, "Integer", "Last base of the variant"
        )  # pysam writes it for symbolic alleles
    header.add_meta("megabase_variants", value=scores.source)
    for column in scores.columns:
        header.info.add(column.name.upper(), "A", "Integer" if column.whole else "Float", column.text)
    header.info.add(SKIPPED.name.upper(), "A", "String", SKIPPED.text)


def _in_order(
    records: Iterator[pysam.VariantRecord], order: Sequence[int]
) -> Iterator[tuple[int, pysam.VariantRecord]]:
    """Records with their numbers, sorted. They are all held in memory if they are not sorted already."""
    if all(number == place for place, number in enumerate(order)):
        yield from enumerate(records)
        return
    held = list(records)
    for number in order:
        yield number, held[number]


def _fill(record: pysam.VariantRecord, scores: Scores, places: Sequence[int]) -> None:
    for column in scores.columns:
        found = tuple(scores.value(column, place) for place in places)
        if any(value is not None for value in found):
            record.info[column.name.upper()] = found
    skipped = tuple(scores.calls.alternates[place].skipped for place in places)
    if any(skipped):
        record.info[SKIPPED.name.upper()] = skipped
