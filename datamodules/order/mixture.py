"""A mixture of genomes: the group that each segment belongs to."""

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Segments

_SHOWN = 8


def identity_of(segments: Segments, mixture: Mapping[str, float]) -> str:
    """A checksum of what decides the order of training: `Segments.identity`, and with a mixture its keys in order, its
    weights and the names of the input files."""
    if not mixture:
        return segments.identity
    decisive = json.dumps([segments.identity, list(mixture.items()), segments.source.tolist()])
    return hashlib.sha256(decisive.encode()).hexdigest()[:16]


def groups_of(
    segments: Segments, rows: NDArray[np.int64], mixture: Mapping[str, float]
) -> dict[str, NDArray[np.int64]]:
    """Group rows by the keys of a mixture.

    A segment belongs to the first key that is the name of its input file, or a pattern (`*`, `?`, `[...]`) that
    matches that name or its record's name.

    Args:
        segments: the index.
        rows: the rows to group.
        mixture: key -> weight, 0 or more.

    Returns:
        Key -> its rows in order, for weights above 0. Without a mixture, all rows are one group "".

    Raises:
        DataError: a key has no segment, or a segment no key.
    """
    if not mixture:
        return {"": rows}
    keys = list(mixture)
    member = np.full(len(rows), -1)
    kinds: dict[tuple[str, str], int] = {}
    for place, row in enumerate(rows.tolist()):
        names = segments.source[row], segments.record[row]
        if names not in kinds:
            kinds[names] = _first_match(keys, *names)
        member[place] = kinds[names]
    known = sorted({source for source, _ in kinds})
    for number, key in enumerate(keys):
        if not (member == number).any():
            raise DataError(
                f"data.mixture: {key!r} matches no record that an earlier key has not taken: the input files are "
                f"{_listed(known)}; a pattern like 'chr*' may also name records"
            )
    for source, record in (names for names, number in kinds.items() if number < 0):
        raise DataError(
            f"data.mixture: no key matches record {record!r} of {source!r}: give a weight to {source!r}, or to '*' "
            "for all others; 0 leaves them out"
        )
    return {key: rows[member == number] for number, key in enumerate(keys) if mixture[key] > 0}


def _first_match(keys: list[str], source: str, record: str) -> int:
    for number, key in enumerate(keys):
        if key == source or fnmatchcase(source, key) or fnmatchcase(record, key):
            return number
    return -1


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
