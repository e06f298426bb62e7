"""Settings of the data, and the arithmetic of batch sizes and mixtures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megabase.datamodules.errors import DataError

CAUSAL, MASKED = "causal", "masked"
RAISE, SKIP = "raise", "skip"

CYCLE = 1024
"""Positions of the training order in which each group of a mixture has its exact share."""


@dataclass
class DataConfig:
    """Which shards are read, how windows and batches are made of them, and in which order.

    Attributes:
        shards: Directory or URL of the shards that `megabase prepare` wrote; must be given.
        length: Bases of a window: positions of a sequence.
        global_batch: Windows of an optimizer step, over all ranks. The number of ranks never changes it.
        micro_batch: Windows of one forward pass on one rank. global_batch = micro_batch × accumulation × ranks.
        workers: Processes for each rank that read and encode. 0: the training process reads. The batches are the
            same.
        min_real: Fraction of a window's bases that must be letters, 0 to 1. Windows with fewer are left out.
        objective: `causal`: predict every base from those before it. `masked`: predict masked bases from both
            sides.
        mask_rate: With `masked`: fraction of a window's letters to predict, above 0 and at most 1. Of these, 80%
            are masked, 10% become a random letter and 10% stay as they are. Training draws new ones in every epoch;
            evaluation always uses the same.
        stride: Bases from the start of a training window to the start of the next. null: `length`, so that windows
            do not overlap.
        shift: In training, each visit of a window moves its start by at most this many bases in either direction,
            within its segment.
        reverse_complement: In training, probability that a visit reads the other strand, 0 to 1. dna only.
        softmask_weight: In training, weight of a lower-case letter in the loss, 0 to 1. The gradient is still
            divided by the number of scored letters, which the index knows, so a step with many lower-case letters
            weighs less. The loss in the journal is the weighted mean.
        mixture: In training, weight of each genome: input file name, or a pattern of file or record names, to a
            number. The first key that matches a record counts; 0 leaves it out. Each genome gets its exact share of
            every 1,024 windows and has its own epochs. Empty: every window once an epoch.
        pack: Join segments shorter than `length` to full windows, with a separator between them. false: leave them
            out.
        on_error: For bases that cannot be read or differ from their checksum: `raise` ends the run, `skip` leaves
            their window out of the loss and counts it.
        prefetch: Batches that each worker reads ahead.
    """

    shards: str = "???"  # how OmegaConf spells a value that must be given
    length: int = 8192
    global_batch: int = 8
    micro_batch: int = 1
    workers: int = 0
    min_real: float = 0.5
    objective: str = CAUSAL
    mask_rate: float = 0.15
    stride: int | None = None
    shift: int = 0
    reverse_complement: float = 0.0
    softmask_weight: float = 1.0
    mixture: dict[str, float] = field(default_factory=dict)
    pack: bool = False
    on_error: str = RAISE
    prefetch: int = 2

    @property
    def uneven(self) -> bool:
        """Whether labels may weigh differently in training, so that their sum is not known from the index."""
        return self.softmask_weight != 1 or self.on_error == SKIP

    def validate(self) -> None:
        """Raise DataError for a setting that cannot work with any shards."""
        if self.workers < 0:
            raise DataError(f"data.workers {self.workers}: must be 0 or more")
        if self.objective not in (CAUSAL, MASKED):
            raise DataError(f"data.objective {self.objective!r}: choose {CAUSAL} or {MASKED}")
        if not 0 < self.mask_rate <= 1:
            raise DataError(f"data.mask_rate {self.mask_rate}: must be above 0 and at most 1")
        if self.stride is not None and self.stride < 1:
            raise DataError(f"data.stride {self.stride}: must be at least 1 base, or null for data.length")
        if self.shift < 0:
            raise DataError(f"data.shift {self.shift}: must be 0 or more bases")
        for name in ("reverse_complement", "softmask_weight"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise DataError(f"data.{name} {value}: must lie between 0 and 1")
        self._check_mixture()
        if self.on_error not in (RAISE, SKIP):
            raise DataError(f"data.on_error {self.on_error!r}: choose {RAISE} or {SKIP}")
        if self.prefetch < 1:
            raise DataError(f"data.prefetch {self.prefetch}: must be at least 1 batch")

    def _check_mixture(self) -> None:
        for name, weight in self.mixture.items():
            if not isinstance(weight, int | float):
                raise DataError(
                    f"data.mixture {name!r}: {weight!r} is not a number: write names with a dot as "
                    "'data.mixture={genome.fa: 2}'"
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise DataError(f"data.mixture {name!r}: weight {weight} must be 0 or more")
        if not self.mixture:
            return
        if not (weights := [weight for weight in self.mixture.values() if weight]):
            raise DataError("data.mixture: every weight is 0: set at least one above 0")
        mixture_quotas(weights)


def accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro batches per rank and optimizer step: global_batch / (micro_batch * world_size).

    Raises:
        DataError: that is not an integer; the message names values that work.
    """
    for name, value in (("global_batch", global_batch), ("micro_batch", micro_batch)):
        if value < 1:
            raise DataError(f"data.{name} {value}: must be at least 1")
    together = micro_batch * world_size
    if global_batch % together == 0:
        return global_batch // together
    ways = []
    if global_batch % world_size == 0:
        share = global_batch // world_size
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        ways.append(f"data.micro_batch to one of {_shortened(fitting)}")
    below = global_batch // together * together
    ways.append(
        "data.global_batch to " + " or ".join(str(size) for size in (below, below + together) if size)
    )
    raise DataError(
        f"data.global_batch {global_batch} is not a multiple of data.micro_batch {micro_batch} "
        f"x {world_size} ranks: set {', or '.join(ways)}"
    )


def mixture_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of each group in a cycle: its share of `CYCLE`, rounded by largest remainder.

    Args:
        weights: of the groups, each above 0.

    Raises:
        DataError: a group is left without a position.
    """
    shares = np.array(weights) / sum(weights) * CYCLE
    quotas = np.floor(shares).astype(np.int64)
    quotas[np.argsort(quotas - shares, kind="stable")[: CYCLE - int(quotas.sum())]] += 1
    if not quotas.all():
        least = weights[int(quotas.argmin())]
        raise DataError(
            f"data.mixture: weight {least:g} is less than 1/{CYCLE} of all weights: raise it, or set it to 0"
        )
    return tuple(quotas.tolist())


def _shortened(values: list[int], shown: int = 8) -> str:
    """The values as text; of more than `shown`, the first and the last ones."""
    texts = [str(value) for value in values]
    if len(texts) > shown:
        texts = texts[: shown // 2] + ["..."] + texts[-shown // 2 :]
    return ", ".join(texts)
