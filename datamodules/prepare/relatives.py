"""Groups records by the 31-mers that they share, and gives whole groups to splits: `--split-by similarity`.

A record joins the group of that larger record which shares most with it, if that is more than a threshold of its own
31-mers. So every strain is in the group of the largest of its species, and contigs are in that of their genome.
Single linkage of all pairs would join all genomes instead: a contig of ribosomal genes or of an insertion sequence is
similar to some contig of every other species. Such a record stays with its own genome, and if it is held out and
similar to training, it alone is moved to training. Sampled 31-mers are compared, see `sketch`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import SCHEMA
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.prepare.sketch import Kmers, count_shared, united
from megabase.datamodules.prepare.splits import SIMILARITY, warn_of_shares
from megabase.datamodules.prepare.writer import Part

log = logging.getLogger(__name__)

_FARTHEST = 64
"""Of a 31-mer that is in many records, each is compared with so many of the next larger ones that have it. A relative
that is missed so is found by `without_relatives`."""

_THRESHOLD = 0.1
"""What two genomes share that are 93 % identical from end to end, or 98 % over a fifth of the smaller."""


def checked_threshold(similarity: float | None, split_by: str, alphabet: str) -> float:
    """The threshold that --similarity gives. Raises DataError if it does not fit the other options."""
    if split_by != SIMILARITY:
        if similarity is not None:
            raise DataError(
                f"--similarity {similarity} is for --split-by {SIMILARITY}: add it, or leave this out"
            )
        return _THRESHOLD
    if alphabet != "dna":
        raise DataError(f"--split-by {SIMILARITY} compares DNA, not {alphabet}: use --split-by record")
    if similarity is not None and not 0 <= similarity < 1:
        raise DataError(f"--similarity {similarity}: must be a fraction, at least 0 and below 1")
    return _THRESHOLD if similarity is None else similarity


def split_by_similarity(
    parts: Sequence[Part], fractions: Mapping[str, float], threshold: float
) -> list[Part]:
    """Put whole groups of relatives into splits.

    Args:
        parts: of the input, with one row for each record and the 31-mers by record.
        fractions: split -> fraction of all bases.
        threshold: see `groups_of`.

    Returns:
        The parts with the splits of their rows, and the 31-mers by split.

    Raises:
        DataError: the groups are too large for the splits.
    """
    names = [name for part in parts for name in part.rows["record"].to_pylist()]
    lengths = np.array([length for part in parts for length in part.rows["length"].to_pylist()], np.int64)
    kmers = {name: found for part in parts for name, found in (part.kmers or {}).items()}
    records = [kmers[name] for name in names]
    group = groups_of(records, threshold)
    splits = without_relatives(split_groups(group, names, lengths, fractions), records, threshold)
    count = len(set(group.tolist()))
    log.info("records: %s; groups of similar ones: %s", f"{len(names):,}", f"{count:,}")
    for split in fractions:
        if split not in splits:
            raise DataError(
                f"--split-by {SIMILARITY}: nothing is left for {split}: with records that share more than "
                f"{threshold:.0%} of their 31-mers in one group, there {'are' if count > 1 else 'is'} only {count:,}: "
                "add genomes that are less related, or raise --similarity"
            )
    sizes = {split: int(lengths[[other == split for other in splits]].sum()) for split in fractions}
    warn_of_shares(fractions, sizes | {"": int(lengths.sum()) - sum(sizes.values())}, "groups are that large")
    return _with_splits(parts, [split or TRAIN for split in splits])


def _with_splits(parts: Sequence[Part], splits: Sequence[str]) -> list[Part]:
    """The parts with the split of each row, and the 31-mers by split instead of by record."""
    found, start = [], 0
    for part in parts:
        own = splits[start : start + len(part.rows)]
        start += len(own)
        at = part.rows.schema.get_field_index("split")
        rows = part.rows.set_column(at, SCHEMA.field("split"), pa.array(own, pa.string()))
        by_split: dict[str, list[Kmers]] = {}
        for name, split in zip(part.rows["record"].to_pylist(), own, strict=True):
            by_split.setdefault(split, []).append((part.kmers or {})[name])
        kmers = {split: united(each) for split, each in by_split.items()}
        found.append(replace(part, rows=rows, kmers=kmers))
    return found


def groups_of(records: Sequence[Kmers], threshold: float) -> NDArray[np.int64]:
    """(records,) number of the group of each record.

    Args:
        records: the 31-mers of each.
        threshold: a record joins a larger one that shares more than this fraction of its 31-mers.
    """
    sizes = np.array([len(kmers) for kmers in records], np.int64)
    by_size = np.argsort(-sizes, kind="stable")
    group = np.arange(len(records))
    for child, parent in zip(*_parents([records[number] for number in by_size], threshold), strict=True):
        group[by_size[child]] = group[by_size[parent]]  # a parent comes first, so its group is final
    return group


def split_groups(
    group: NDArray[np.int64],
    names: Sequence[str],
    lengths: NDArray[np.int64],
    fractions: Mapping[str, float],
) -> list[str | None]:
    """Give groups to splits until each split holds its fraction of the bases, or as much of it as whole groups fill.

    Groups are taken in an order that depends on the names of their records only. If the first that fit are too large,
    the smallest group is taken.

    Args:
        group: (records,) group of each record.
        names: of the records.
        lengths: (records,) bases.
        fractions: split -> fraction of all bases.

    Returns:
        The split of every record; None for those that are left, which are for training.
    """
    _, numbers = np.unique(group, return_inverse=True)
    bases = np.bincount(numbers, lengths)
    order = sorted(range(len(bases)), key=_draws(numbers, names).__getitem__)
    chosen: list[str | None] = [None] * len(bases)
    for split, fraction in fractions.items():
        room = fraction * lengths.sum()
        for number in order:
            if chosen[number] is None and 0 < bases[number] <= room:
                chosen[number], room = split, room - bases[number]
        free = [number for number in order if chosen[number] is None]
        if split not in chosen and len(free) > 1:
            chosen[min(free, key=bases.__getitem__)] = split
    return [chosen[number] for number in numbers]


def without_relatives(
    splits: Sequence[str | None], records: Sequence[Kmers], threshold: float
) -> list[str | None]:
    """Move records to training until none that is held out shares more than the threshold with all of training.

    Args:
        splits: split of every record; None is training.
        records: the 31-mers of each.
        threshold: the largest fraction of its 31-mers that a record may share.
    """
    found = list(splits)
    while True:
        training = united(kmers for kmers, split in zip(records, found, strict=True) if split is None)
        related = [
            number
            for number, split in enumerate(found)
            if split is not None
            and count_shared(records[number], training) > threshold * len(records[number])
        ]
        if not related:
            return found
        for number in related:
            found[number] = None


def _parents(records: Sequence[Kmers], threshold: float) -> tuple[list[int], list[int]]:
    """Of records sorted by falling size: those that join another, ascending, and the one that each joins."""
    total = len(records)
    hashes = np.concatenate([np.zeros(0, np.uint64), *records])
    owners = np.repeat(np.arange(total), [len(kmers) for kmers in records])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for distance in range(1, _FARTHEST + 1):
        same = hashes[distance:] == hashes[:-distance]
        if not same.any():
            break
        pairs = owners[distance:][same] * total + owners[:-distance][same]
        keys, place = np.unique(np.concatenate([keys, pairs]), return_inverse=True)
        new = np.concatenate([counts, np.ones(len(pairs), np.int64)])
        counts = np.bincount(place, new, len(keys)).astype(np.int64)
    best: dict[int, tuple[int, int]] = {}
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        child, parent = divmod(key, total)
        if count > max(threshold * len(records[child]), best.get(child, (0, 0))[0]):
            best[child] = count, parent
    return list(best), [parent for _, parent in best.values()]


def _draws(numbers: NDArray[np.int64], names: Sequence[str]) -> list[bytes]:
    """A digest for each group, of the name that comes first: the order in which groups are taken."""
    first: dict[int, str] = {}
    for number, name in zip(numbers.tolist(), names, strict=True):
        first[number] = min(first.get(number, name), name)
    return [blake2b(first[number].encode(), digest_size=8).digest() for number in range(len(first))]
