"""Settings of the data, and the arithmetic of batch sizes."""

from dataclasses import dataclass

from datamodules.errors import DataError

CAUSAL, MASKED = "causal", "masked"


@dataclass
class DataConfig:
    """`data.*` of a run's configuration.

    shards: directory that `megabase prepare` wrote; must be given.
    length: bases per window, that is positions per sequence.
    global_batch: windows per optimizer step, over all ranks; never changed by the number of ranks.
    micro_batch: windows per rank and forward pass; global_batch = micro_batch * accumulation * ranks.
    workers: processes per rank that read and encode; 0 reads in the training process. Batches are the same.
    min_real: fraction of a window's bases that must be letters, 0 to 1; windows with fewer are left out.
    objective: `causal` predicts every base from those before it, `masked` masked bases from both sides.
    mask_rate: with `masked`, the fraction of a window's letters to predict, above 0 up to 1: of these, 80% are masked,
        10% show a random letter and 10% themselves. New ones in every epoch, in evaluation always the same.
    """

    shards: str = "???"  # how OmegaConf spells a value that must be given
    length: int = 8192
    global_batch: int = 8
    micro_batch: int = 1
    workers: int = 0
    min_real: float = 0.5
    objective: str = CAUSAL
    mask_rate: float = 0.15

    def validate(self) -> None:
        """Raise DataError for a setting that cannot work whatever the shards hold."""
        if self.workers < 0:
            raise DataError(f"data.workers {self.workers}: must be 0 or more")
        if self.objective not in (CAUSAL, MASKED):
            raise DataError(f"data.objective {self.objective!r}: choose {CAUSAL} or {MASKED}")
        if not 0 < self.mask_rate <= 1:
            raise DataError(f"data.mask_rate {self.mask_rate}: must be above 0 and at most 1")


def accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro batches per rank and optimizer step: global_batch / (micro_batch * world_size).

    Raises DataError if that is not a whole number, naming values that would work.
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
        f"data.global_batch {global_batch} is no multiple of data.micro_batch {micro_batch} "
        f"x {world_size} ranks: set {', or '.join(ways)}"
    )


def _shortened(values: list[int], shown: int = 8) -> str:
    """At most `shown` values, the ends of the list."""
    texts = [str(value) for value in values]
    if len(texts) > shown:
        texts = texts[: shown // 2] + ["..."] + texts[-shown // 2 :]
    return ", ".join(texts)
