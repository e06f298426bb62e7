"""The variants of a VCF or BCF file, checked against the genome. No index, `##contig` line or order is needed."""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pysam

from megabase.datamodules.prepare.closest import closest, hint
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.variants.edits import Edit, edit_of

BASES = re.compile("[ACGTUNRYSWKMBDHV]+", re.IGNORECASE)
SYMBOLIC, BREAKEND, OVERLAPPING, OTHER = "symbolic", "breakend", "overlapping_deletion", "not_bases"
SAME, DIFFERS, UNKNOWN, BEYOND = "same_as_ref", "ref_differs", "unknown_chromosome", "beyond_the_end"
_SHOWN = 20


@dataclass(frozen=True)
class Alternate:
    """One ALT of a record of the VCF.

    Attributes:
        record: number of the record in the file.
        chromosome, position, name, reference, alternate: CHROM, POS (from 1), ID, REF and ALT.
        edit: what it changes; None if it is not scored.
        skipped: why not.
    """

    record: int
    chromosome: str
    position: int
    name: str | None
    reference: str
    alternate: str
    edit: Edit | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Calls:
    """What a VCF holds.

    Attributes:
        path: the file.
        header: its header, complete: with all that its records use.
        order: numbers of its records in the order of the genome and of their positions.
        alternates: all ALTs in that order.
    """

    path: Path
    header: pysam.VariantHeader
    order: Sequence[int]
    alternates: Sequence[Alternate]

    @property
    def skipped(self) -> dict[str, int]:
        """Numbers of the ALTs that are not scored, by the reason."""
        return dict(Counter(one.skipped for one in self.alternates if one.skipped))


def read_calls(path: Path, genome: Genome, renames: Mapping[str, str], *, keep_going: bool = False) -> Calls:
    """Read a VCF or BCF file, of any compression.

    Args:
        path: the file.
        genome: of the same assembly.
        renames: CHROM -> the record of the genome, where the names differ.
        keep_going: skip variants that do not fit the genome.

    Raises:
        UserError: the file cannot be read, or holds no variant; a variant does not fit the genome.
    """
    records = []
    inverse = {to: name for name, to in renames.items()}
    with open_vcf(path) as file:
        if not len(file.header.contigs):
            for name, length in genome.lengths.items():
                file.header.contigs.add(inverse.get(name, name), length=length)
        for number, record in enumerate(records_of(file, path)):
            found = list(_alternates(number, record, path, genome, renames, keep_going))
            records.append((record.chrom, record.pos, found))
        header = file.header.copy()
    if not any(found for _, _, found in records):
        raise UserError(f"{path}: holds no variant: every record must have an ALT")
    names = [*(inverse.get(name, name) for name in genome.lengths), *(name for name, _, _ in records)]
    rank: dict[str, int] = {}
    for name in names:
        rank.setdefault(name, len(rank))
    order = sorted(range(len(records)), key=lambda n: (rank[records[n][0]], records[n][1]))
    return Calls(path, header, order, [one for number in order for one in records[number][2]])


@contextmanager
def open_vcf(path: Path) -> Iterator[pysam.VariantFile]:
    """Open a VCF or BCF file. htslib cannot read plain gzip, as gzip itself writes it: it is unpacked first.

    Raises:
        UserError: it is none, or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: give a VCF or BCF file")
    pysam.set_verbosity(0)  # htslib would print lines of its own
    with tempfile.TemporaryFile() as unpacked:
        try:
            plain = _is_plain_gzip(path)
            if plain:
                _unpack(path, unpacked)
            file = pysam.VariantFile(unpacked if plain else str(path))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read as VCF or BCF") from error
        with file:
            yield file


def records_of(file: pysam.VariantFile, path: Path) -> Iterator[pysam.VariantRecord]:
    """The records of an open file. Raises UserError if one is damaged."""
    number = 1
    try:
        for record in file:
            yield record
            number += 1
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: record {number:,} cannot be read: {error}") from error


def parse_renames(texts: Sequence[str]) -> dict[str, str]:
    """Names of chromosomes in the VCF -> in the genome, from FROM=TO, or from files with both names on each line.

    Raises:
        UserError: a text is neither, or a line has another form.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, to = text.partition("=")
        if equals and name and to:
            found[name] = to
        elif not Path(text).is_file():
            raise UserError(f"--rename {text}: give FROM=TO, or a file with both names on each line")
        else:
            for number, line in enumerate(Path(text).read_text().splitlines(), start=1):
                if len(names := line.split()) != 2:
                    raise UserError(
                        f"--rename {text}: line {number}: {line!r} is not the name of a chromosome in the VCF, and in "
                        "the genome"
                    )
                found[names[0]] = names[1]
    return found


def _alternates(
    number: int,
    record: pysam.VariantRecord,
    path: Path,
    genome: Genome,
    renames: Mapping[str, str],
    keep_going: bool,
) -> Iterator[Alternate]:
    """The ALTs of a record of the VCF."""
    alts = record.alts or ()
    place = (number, record.chrom, record.pos, record.id, record.ref)
    misfit, message = _misfit(record, genome, renames) if alts else (None, "")
    if misfit and not keep_going:
        raise UserError(f"{path}: {record.chrom}:{record.pos}: {message}")
    for alt in alts:
        reason = misfit or _unscored(record.ref, alt)
        if reason:
            yield Alternate(*place, alt, skipped=reason)
        else:
            name = renames.get(record.chrom, record.chrom)
            edit = edit_of(name, record.start, record.ref.encode(), alt.encode())
            yield Alternate(*place, alt, edit)


def _unscored(reference: str, alternate: str) -> str | None:
    """Why an ALT cannot be scored."""
    if alternate == "*":
        return OVERLAPPING
    if alternate.startswith("<"):
        return SYMBOLIC
    if "[" in alternate or "]" in alternate or alternate.startswith(".") or alternate.endswith("."):
        return BREAKEND
    if not BASES.fullmatch(alternate):
        return OTHER
    return SAME if alternate.upper() == reference.upper() else None


def _misfit(
    record: pysam.VariantRecord, genome: Genome, renames: Mapping[str, str]
) -> tuple[str | None, str]:
    """Why a record of the VCF does not fit the genome, and what to say."""
    name = renames.get(record.chrom, record.chrom)
    if name not in genome.lengths:
        names = list(genome.lengths)
        meant = closest(name, names)
        way = f"; if it is {meant!r}, add --rename '{record.chrom}={meant}'" if meant else hint(name, names)
        return UNKNOWN, f"{genome.path} has no record {name!r}{way}"
    length, end = genome.lengths[name], record.start + len(record.ref)
    if record.start < 0 or end > length:
        return BEYOND, (
            f"REF {_short(record.ref)} ends at base {end:,}, but record {name!r} of {genome.path} has bases 1 to "
            f"{length:,}: the genome must be that of the VCF"
        )
    there = genome.fetch(name, record.start, end)
    differ = _differ(record.ref, there)
    if differ is None:
        return None, ""
    return DIFFERS, (
        f"REF is {_short(record.ref[differ:])} and the genome has {_short(there[differ:].tobytes().decode())} at "
        f"{name}:{record.start + differ + 1}: give the genome that the VCF was made with, or skip such variants "
        "with --keep-going"
    )


def _differ(reference: str, there: np.ndarray) -> int | None:
    """The first place where REF and the genome have different bases. VCF must write A, C, G, T or N for all others."""
    given = np.frombuffer(reference.upper().encode(), np.uint8)
    found = np.frombuffer(there.tobytes().upper(), np.uint8)
    known = np.isin(found, np.frombuffer(b"ACGT", np.uint8)) & (given != ord("N"))
    places = np.flatnonzero((given != found) & known)
    return int(places[0]) if places.size else None


def _short(bases: str) -> str:
    return bases if len(bases) <= _SHOWN else f"{bases[:_SHOWN]}... ({len(bases):,} bases)"


def _is_plain_gzip(path: Path) -> bool:
    """Whether a file is compressed with gzip, and not with bgzip, which adds an extra field to the header."""
    with path.open("rb") as file:
        head = file.read(4)
    return head[:3] == b"\x1f\x8b\x08" and not head[3] & 4


def _unpack(path: Path, target: IO[bytes]) -> None:
    with gzip.open(path) as packed:
        shutil.copyfileobj(packed, target)
    target.flush()
    target.seek(0)
