"""Labels of single bases: windows of a genome with the classes of a BED file or the numbers of a bigWig file.

A genome is cut into windows that lie side by side, from the first base of each record on. All are in memory, with 9
bytes for each base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyBigWig
from numpy.typing import NDArray

from megabase.datamodules.alphabet import FIRST_LETTER, Alphabet
from megabase.datamodules.index.segments import TEST, TRAIN, VALID
from megabase.datamodules.prepare.bed import read_rows
from megabase.datamodules.report.classes import REST
from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune.examples import Examples, Problem
from megabase.pipeline.finetune.splits import FRACTION
from megabase.pipeline.inference.genome import Genome, Region

BIGWIG = (".bw", ".bigwig")
LEAST_WINDOWS = 3


@dataclass(frozen=True)
class Labels:
    """The labels of a genome's bases.

    Attributes:
        problem: what they mean.
        of_records: record -> (bases,) fp32 class numbers or numbers, NaN for no label; only labelled records.
    """

    problem: Problem
    of_records: dict[str, NDArray[np.float32]]


def per_base_examples(labels: Path, fasta: Path, alphabet: Alphabet, window: int) -> Examples:
    """The windows of the labelled records of a genome.

    The splits are stretches of the genome, in the order of its file: of the windows, the last FRACTION is for test, and
    as many before it for validation.

    Args:
        labels: BED (the fourth column is the class; bases in no interval are of the class REST) or bigWig (bases
            without a value have no label).
        fasta: the genome.
        alphabet: of the model. A base that is no letter of it has no label.
        window: bases of a window; the last one of a record may be shorter.

    Raises:
        UserError, DataError: a file cannot be read, names other records than the genome, or holds too little.
    """
    genome = Genome(fasta)
    found = _bigwig(labels, genome) if labels.suffix.lower() in BIGWIG else _bed(labels, genome)
    names: list[str] = []
    sequences: list[bytes] = []
    values: list[NDArray[np.float32]] = []
    for record in (name for name in genome.lengths if name in found.of_records):
        of_record = found.of_records[record]
        region = Region(record, 0, genome.lengths[record])
        letters = np.concatenate(list(genome.letters(region, 1 << 20)))
        for start in range(0, len(letters), window):
            part = letters[start : start + window]
            label = of_record[start : start + window].copy()
            label[alphabet.encode(part) < FIRST_LETTER] = np.nan
            if np.isnan(label).all():
                continue
            names.append(f"{record}:{start}-{start + len(part)}")
            sequences.append(part.tobytes())
            values.append(label)
    if len(names) < LEAST_WINDOWS:
        raise UserError(
            f"{labels}: only {len(names)} windows of {window} bases have labels: give more of the genome, or a smaller"
            " --window"
        )
    return Examples(found.problem, names, sequences, values, _splits(len(names)))


def _splits(count: int) -> list[str]:
    held_out = max(round(count * FRACTION), 1)
    return [TRAIN] * (count - 2 * held_out) + [VALID] * held_out + [TEST] * held_out


def _bed(path: Path, genome: Genome) -> Labels:
    rows = list(read_rows(path, "class", "the labels in"))
    if not rows:
        raise UserError(f"{path}: holds no interval: every line must be chr, start, end, class")
    classes = (*sorted({row.fourth for row in rows}), REST)
    number = {name: place for place, name in enumerate(classes)}
    found: dict[str, NDArray[np.float32]] = {}
    for row in rows:
        genome.check_row(path, row, "labels")
        if row.name not in found:
            found[row.name] = np.full(genome.lengths[row.name], number[REST], np.float32)
        bases = found[row.name][row.start : row.end]
        if np.isin(bases, (number[REST], number[row.fourth]), invert=True).any():
            raise UserError(
                f"{path}: line {row.line}: {row.name} [{row.start}, {row.end}) {row.fourth} overlaps an interval of"
                " another class: a base has one label"
            )
        bases[:] = number[row.fourth]
    return Labels(Problem(classes, per_base=True), found)


def _bigwig(path: Path, genome: Genome) -> Labels:
    try:
        opened = pyBigWig.open(str(path))
    except RuntimeError:
        raise UserError(f"{path}: cannot be read as bigWig") from None
    found: dict[str, NDArray[np.float32]] = {}
    for record, length in opened.chroms().items():
        genome.check_record(str(path), record)
        if length != genome.lengths[record]:
            raise UserError(
                f"{path}: record {record!r} has {length} bases, in {genome.path} {genome.lengths[record]}: the labels"
                " must be for this assembly of the genome"
            )
        found[record] = np.asarray(opened.values(record, 0, length), np.float32)
    opened.close()
    return Labels(Problem((), per_base=True), found)


def known(values: Any, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """The labels of the bases of some windows, one behind the other, without those that are missing."""
    joined = np.concatenate([values[each] for each in chosen]).astype(np.float64)
    return joined[~np.isnan(joined)]


def neighbourhoods(
    examples: Examples, alphabet: Alphabet, chosen: NDArray[np.int64], width: int, most: int
) -> tuple[NDArray[np.int16], NDArray[np.float64], NDArray[np.int64]]:
    """The letters around labelled bases, for a baseline that sees nothing else.

    Args:
        examples: per base.
        alphabet: of the letters.
        chosen: numbers of the windows.
        width: letters of a neighbourhood, odd; 0 stands for what lies outside the window.
        most: bases, spread evenly over all; 0: all.

    Returns:
        (bases, width) tokens, (bases,) labels, (bases,) the window of each.
    """
    parts = list(_neighbourhoods(examples, alphabet, chosen, width))
    letters, labels, windows = (np.concatenate(each) for each in zip(*parts, strict=True))
    if most and len(labels) > most:
        spread = np.arange(most) * len(labels) // most
        letters, labels, windows = letters[spread], labels[spread], windows[spread]
    return letters, labels, windows


def _neighbourhoods(
    examples: Examples, alphabet: Alphabet, chosen: NDArray[np.int64], width: int
) -> Iterator[tuple[NDArray[np.int16], NDArray[np.float64], NDArray[np.int64]]]:
    side = width // 2
    for number, each in enumerate(chosen.tolist()):
        tokens = alphabet.encode(np.frombuffer(examples.sequences[each], np.uint8)).astype(np.int16)
        around = np.lib.stride_tricks.sliding_window_view(np.pad(tokens, side), width)
        label = np.asarray(examples.labels[each], np.float64)
        has = ~np.isnan(label)
        yield around[has], label[has], np.full(int(has.sum()), number)
