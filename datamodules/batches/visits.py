"""Windows as they are met: read from the shards where a visit finds them, and made into a batch.

A visit is a window in an epoch; its key (`hashing.visit_keys`) says how far the window is moved, which strand is read
and which bases are masked. So does the number of its labels, before a byte is read.
"""

import logging
from dataclasses import dataclass, field
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
from megabase.datamodules.index.segments import TRAIN
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.hashing import Purpose, derived, uniform
from megabase.datamodules.order.planning import plan_windows
from megabase.datamodules.order.windows import PACKED, WindowPlan

log = logging.getLogger(__name__)


class Visits(NamedTuple):
    """What is known of visits before a byte is read; every array is (visits,).

    samples: window ids, -1 for filler. keys: see `hashing.visit_keys`. rows, starts: as of `WindowPlan.locate`, where
    the visit finds its window. turned: whether it reads the other strand. labels: how many it has; filler has none.
    """

    samples: NDArray[np.int64]
    keys: NDArray[np.uint64]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    turned: NDArray[np.bool_]
    labels: NDArray[np.int64]

    def part(self, places: slice) -> "Visits":
        """Some of them."""
        return Visits._make(column[places] for column in self)


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a split, readable: a plan, the shards it was made for, and what is to be made of them.

    mask_rate: share of the letters that are masked bases to predict; None predicts every next base.
    softmask_weight: what a soft-masked letter weighs in the loss.
    shift: bases that a visit moves a window's start by at most, each way, inside its segment; packed windows stay.
    reverse_complement: probability that a visit reads the other strand; the segments of a packed window are
        turned round each at its place.
    skip: what cannot be read becomes padding, counted in the batch, instead of an error.
    """

    index: ShardIndex
    plan: WindowPlan
    mask_rate: float | None = None
    softmask_weight: float = 1.0
    shift: int = 0
    reverse_complement: float = 0.0
    skip: bool = False
    _told: list[str] = field(default_factory=list, repr=False)
    _room: list[NDArray[np.uint8]] = field(default_factory=list, repr=False)

    def visits(self, samples: NDArray[np.int64], keys: NDArray[np.uint64]) -> Visits:
        """The visits of windows (visits,), -1 for filler, that have those keys; from the index alone."""
        filler = samples == FILLER
        rows, starts = self.plan.locate(np.where(filler, 0, samples))
        if self.shift:
            drawn = derived(keys, Purpose.SHIFT) % np.uint64(2 * self.shift + 1)
            starts = self.plan.moved(rows, starts, drawn.astype(np.int64) - self.shift)
        turned = np.zeros(len(keys), bool)
        if self.reverse_complement:
            turned = uniform(derived(keys, Purpose.STRAND)) < self.reverse_complement
        letters = self.plan.count_letters(rows, starts)
        labels = letters if self.mask_rate is None else masked_count(letters, self.mask_rate)
        return Visits(samples, keys, rows, starts, turned, np.where(filler, 0, labels))

    def batch(self, visits: Visits, targets: int) -> Batch:
        """The batch of some visits. targets: see `Batch`."""
        raw = self._read(visits)
        alphabet = self.index.alphabet
        if self.mask_rate is None:
            return causal_batch(raw, alphabet, targets, self.softmask_weight)
        return masked_batch(
            raw, alphabet, targets, self.softmask_weight, keys=visits.keys, rate=self.mask_rate
        )

    def _read(self, visits: Visits) -> Raw:
        bases = self._room_for(len(visits.samples))
        blank = visits.samples == FILLER
        specials: list[Special] = []
        skipped = 0
        places = zip(
            blank.tolist(), visits.rows.tolist(), visits.starts.tolist(), visits.turned.tolist(), strict=True
        )
        for slot, (filler, row, start, turned) in enumerate(places):
            if filler or row == PACKED:
                bases[slot] = 0
            if filler:
                continue
            try:
                if row == PACKED:
                    specials += self._read_packed(slot, start, turned, bases[slot, 1:])
                else:
                    self._read_piece(row, start, turned, bases[slot, 1:])
            except DataError as error:
                if not self.skip:
                    raise
                self._tell(error)
                blank[slot], bases[slot] = True, 0
                skipped += 1
        return Raw(bases, visits.samples.copy(), blank, specials, skipped)

    def _room_for(self, windows: int) -> NDArray[np.uint8]:
        """(windows, 1 + length), the first column 0. The same memory each time: new pages cost as much as reading."""
        if not self._room or len(self._room[0]) < windows:
            self._room[:] = [np.zeros((windows, 1 + self.plan.length), np.uint8)]
        return self._room[0][:windows]

    def _read_piece(self, row: int, start: int, turned: bool, out: NDArray[np.uint8]) -> None:
        self.index.read_into(row, start, out)
        if turned:
            out[:] = self.index.alphabet.reverse_complement(out)

    def _read_packed(self, slot: int, start: int, turned: bool, out: NDArray[np.uint8]) -> list[Special]:
        tape = self.plan.tape
        assert tape is not None
        filled = 0
        for row, first, at, length in tape.pieces(start):
            self._read_piece(row, first, turned, out[at : at + length])
            filled = at + length
        separators = tape.separators(start).tolist()
        filled = max([filled, *(at + 1 for at in separators[-1:])])
        return [
            *(Special(slot, at, at + 1, SEP) for at in separators),
            *([Special(slot, filled, len(out), PAD)] if filled < len(out) else []),
        ]

    def _tell(self, error: DataError) -> None:
        if not self._told:
            log.warning(
                "data.on_error=skip: a window is left out, as all will be that cannot be read: %s", error
            )
            self._told.append(str(error))


def training_windows(config: DataConfig, index: ShardIndex) -> Windows:
    """The windows to train on.

    Raises DataError if there is none (see `plan_windows`), or for settings that this alphabet cannot have.
    """
    alphabet = index.alphabet
    if config.reverse_complement and alphabet.complement is None:
        raise DataError(
            f"data.reverse_complement {config.reverse_complement}: alphabet {alphabet.name} has no reverse "
            "complement: set it to 0"
        )
    if config.softmask_weight != 1 and alphabet.soft is None:
        raise DataError(
            f"data.softmask_weight {config.softmask_weight}: lower case is no mask in alphabet {alphabet.name}: "
            "set it to 1"
        )
    plan = plan_windows(
        index.segments,
        TRAIN,
        config.length,
        config.min_real,
        stride=config.stride,
        pack=config.pack,
        mixture=config.mixture,
    )
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
    """The windows of a split side by side and as they are, every label of the same weight: runs can be compared.

    Raises DataError if there is none (see `plan_windows`).
    """
    plan = plan_windows(index.segments, split, config.length, config.min_real, pack=config.pack)
    return Windows(index, plan, _mask_rate(config), skip=config.on_error == SKIP)


def _mask_rate(config: DataConfig) -> float | None:
    return config.mask_rate if config.objective == MASKED else None
