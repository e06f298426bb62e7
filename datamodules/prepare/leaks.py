"""Measures how much of what is held out also occurs in training: the shares of sampled 31-mers, see `sketch`."""

import logging
from collections.abc import Mapping, Sequence

from megabase.datamodules.index.leakage import WARN_SHARE, Leakage
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.prepare.sketch import Kmers, count_shared, united

log = logging.getLogger(__name__)


def leaks_of(parts: Sequence[Mapping[str, Kmers]]) -> list[Leakage]:
    """How much of each split that is held out, and has a 31-mer, occurs in training; sorted by split.

    Args:
        parts: split -> the 31-mers of a part of the input.
    """
    training = united(part[TRAIN] for part in parts if TRAIN in part)
    found = []
    for split in sorted({split for part in parts for split in part} - {TRAIN}):
        kmers = united(part[split] for part in parts if split in part)
        if len(kmers):
            found.append(Leakage(split, len(kmers), count_shared(kmers, training)))
    return found


def warn(leaks: Sequence[Leakage]) -> None:
    """Log a warning for every split of which a large share occurs in training."""
    for leak in leaks:
        if leak.share > WARN_SHARE:
            log.warning(
                "%s: %s of its 31-mers occur in train: the same or related genomes, or repeats, are in both, so "
                "its loss is not that of a new genome: hold out less related ones by name, or let --split-by "
                "similarity find them (docs/data.md, Leakage)",
                leak.split,
                f"{leak.share:.0%}",
            )
