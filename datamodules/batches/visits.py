"""Reads windows from the shards, augments them and makes batches of them.

A visit is a window in an epoch. Its key (`hashing.visit_keys`) decides how far the window is moved, which strand is
read and which bases are masked. The number of its labels is known before a byte is read.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import PAD, SEP
from megabase.datamodules.batches.collate import (
    FILLER,
    Batch,
    Raw,
    Special,
    causal_batch,
    masked_batch,
    masked_count,
)
from megabase.datamodules.config import MASKED, SKIP, DataConfig
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Part
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.hashing import Purpose, derived, uniform
from megabase.datamodules.order.planning import plan_training, plan_windows
from megabase.datamodules.order.windows import PACKED, WindowPlan

log = logging.getLogger(__name__)


class Visits(NamedTuple):
    """Visits before a byte is read; every array is (visits,).

    Attributes:
        samples: window ids, -1 for filler.
        keys: see `hashing.visit_keys`.
        rows, starts: where the window lies in this visit, see `WindowPlan.locate`.
        reverse: whether the other strand is read.
        labels: number of labels; 0 for filler.
    """

    samples: NDArray[np.int64]
    keys: NDArray[np.uint64]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    reverse: NDArray[np.bool_]
    labels: NDArray[np.int64]

    def part(self, places: slice) -> "Visits":
        """A slice of the visits."""
        return Visits._make(column[places] for column in self)


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a split, and how batches are made of them.

    Attributes:
        index: the shards.
        plan: which windows exist.
        mask_rate: fraction of the letters to mask and predict; None: predict every next base.
        softmask_weight: weight of lower-case letters in the loss.
        shift: a visit moves a window's start by at most this many bases in either direction, within its segment. Packed
            windows do not move.
        reverse_complement: probability that a visit reads the other strand. In a packed window, each segment is
            reversed in its own place.
        skip: a window that cannot be read becomes padding, counted in the batch, instead of an error.
        cut: the positions [start, end) of each window that batches hold, where several ranks share a window; None: all.
    """

    index: ShardIndex
    plan: WindowPlan
    mask_rate: float | None = None
    softmask_weight: float = 1.0
    shift: int = 0
    reverse_complement: float = 0.0
    skip: bool = False
    cut: tuple[int, int] | None = None
    _warned: list[str] = field(default_factory=list, repr=False)
    _buffer: list[NDArray[np.uint8]] = field(default_factory=list, repr=False)

    @property
    def has_case(self) -> bool:
        """Whether lower case marks repeats in the alphabet."""
        return self.index.alphabet.soft is not None

    def with_case(self) -> "Windows":
        """The same windows, whose batches say which letters are in lower case, for an evaluation of both apart.

        Any weight other than 1 makes the batches say it; an evaluation does not use the weight itself.
        """
        return replace(self, softmask_weight=0.0 if self.has_case else 1.0)

    def visits(self, samples: NDArray[np.int64], keys: NDArray[np.uint64]) -> Visits:
        """Visits of windows, from the index alone.

        Args:
            samples: (visits,) int64 window ids, -1 for filler.
            keys: (visits,) uint64, see `hashing.visit_keys`.
        """
        filler = samples == FILLER
        rows, starts = self.plan.locate(np.where(filler, 0, samples))
        if self.shift:
            drawn = derived(keys, Purpose.SHIFT) % np.uint64(2 * self.shift + 1)
            starts = self.plan.moved(rows, starts, drawn.astype(np.int64) - self.shift)
        reverse = np.zeros(len(keys), bool)
        if self.reverse_complement:
            reverse = uniform(derived(keys, Purpose.STRAND)) < self.reverse_complement
        letters = self.plan.count_letters(rows, starts)
        labels = letters if self.mask_rate is None else masked_count(letters, self.mask_rate)
        return Visits(samples, keys, rows, starts, reverse, np.where(filler, 0, labels))

    def parts(self, samples: NDArray[np.int64]) -> list[Part]:
        """The parts of segments that lie in windows, without augmentation. samples: (windows,) int64 ids, no filler."""
        found: list[Part] = []
        rows, starts = self.plan.locate(samples)
        for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
            if row != PACKED:
                found.append(Part(row, start, self.plan.length))
                continue
            assert self.plan.tape is not None
            found += [Part(piece.row, piece.start, piece.length) for piece in self.plan.tape.pieces(start)]
        return found

    def batch(self, visits: Visits, targets: int) -> Batch:
        """Read some visits and make a batch of them.

        Args:
            visits: the windows.
            targets: see `Batch`.

        Raises:
            DataError: bases cannot be read or differ from their checksum, unless `skip`.
        """
        start, end = self.cut or (0, self.plan.length)
        alphabet = self.index.alphabet
        if self.mask_rate is None and self.plan.tape is None:
            # Only the bases of the cut are read, with the one before it, which is a token of its first position.
            first = max(0, start - 1)
            batch = causal_batch(self._read(visits, first, end), alphabet, targets, self.softmask_weight)
            return batch.cut(1, 1 + end - start) if start else batch
        raw = self._read(visits, 0, self.plan.length)
        if self.mask_rate is None:
            batch = causal_batch(raw, alphabet, targets, self.softmask_weight)
        else:
            batch = masked_batch(
                raw, alphabet, targets, self.softmask_weight, keys=visits.keys, rate=self.mask_rate
            )
        return batch if self.cut is None else batch.cut(start, end)

    def _read(self, visits: Visits, first: int, end: int) -> Raw:
        """The positions [first, end) of some windows; of packed ones, all."""
        length = self.plan.length
        bases = self._buffer_for(len(visits.samples), end - first)
        blank = visits.samples == FILLER
        specials: list[Special] = []
        skipped = 0
        places = zip(
            blank.tolist(), visits.rows.tolist(), visits.starts.tolist(), visits.reverse.tolist(), strict=True
        )
        for slot, (filler, row, start, reverse) in enumerate(places):
            if filler or row == PACKED:
                bases[slot] = 0
            if filler:
                continue
            try:
                if row == PACKED:
                    specials += self._read_packed(slot, start, reverse, bases[slot, 1:])
                else:
                    begin = start + (length - end if reverse else first)
                    self._read_piece(row, begin, reverse, bases[slot, 1:])
            except DataError as error:
                if not self.skip:
                    raise
                self._warn(error)
                blank[slot], bases[slot] = True, 0
                skipped += 1
        return Raw(bases, visits.samples.copy(), blank, specials, skipped)

    def _buffer_for(self, windows: int, length: int) -> NDArray[np.uint8]:
        """(windows, 1 + length), first column 0. The same memory every time: new pages cost as much as reading."""
        if not self._buffer or len(self._buffer[0]) < windows or self._buffer[0].shape[1] != 1 + length:
            self._buffer[:] = [np.zeros((windows, 1 + length), np.uint8)]
        return self._buffer[0][:windows]

    def _read_piece(self, row: int, start: int, reverse: bool, out: NDArray[np.uint8]) -> None:
        self.index.read_into(row, start, out)
        if reverse:
            out[:] = self.index.alphabet.reverse_complement(out)

    def _read_packed(self, slot: int, start: int, reverse: bool, out: NDArray[np.uint8]) -> list[Special]:
        tape = self.plan.tape
        assert tape is not None
        filled = 0
        for row, first, at, length in tape.pieces(start):
            self._read_piece(row, first, reverse, out[at : at + length])
            filled = at + length
        separators = tape.separators(start).tolist()
        filled = max([filled, *(at + 1 for at in separators[-1:])])
        return [
            *(Special(slot, at, at + 1, SEP) for at in separators),
            *([Special(slot, filled, len(out), PAD)] if filled < len(out) else []),
        ]

    def _warn(self, error: DataError) -> None:
        if not self._warned:
            log.warning(
                "data.on_error=skip: a window is left out, as every window that cannot be read: %s", error
            )
            self._warned.append(str(error))


def training_windows(config: DataConfig, index: ShardIndex) -> Windows:
    """The windows to train on.

    Raises:
        DataError: see `plan_training`.
    """
    plan = plan_training(config, index.alphabet, index.segments)
    return Windows(
        index,
        plan,
        _mask_rate(config),
        softmask_weight=config.softmask_weight,
        shift=config.shift,
        reverse_complement=config.reverse_complement,
        skip=config.on_error == SKIP,
    )


def evaluation_windows(config: DataConfig, index: ShardIndex, split: str) -> Windows:
    """The windows of a split for evaluation: not overlapping, not augmented, every label with weight 1.

    Raises:
        DataError: there is none (see `plan_windows`).
    """
    plan = plan_windows(index.segments, split, config.length, config.min_real, pack=config.pack)
    return Windows(index, plan, _mask_rate(config), skip=config.on_error == SKIP)


def _mask_rate(config: DataConfig) -> float | None:
    return config.mask_rate if config.objective == MASKED else None
