"""The batches of a run: how a step is divided over ranks, how many windows an epoch has, how many epochs there are."""

from __future__ import annotations

from dataclasses import dataclass

from megabase.datamodules.config import CYCLE, accumulation, mixture_quotas
from megabase.datamodules.order.windows import WindowPlan
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.readable import counted


@dataclass(frozen=True)
class Batches:
    """The batches of a run.

    Attributes:
        ranks: that train.
        sequence_ranks: that share each window.
        micro_batch: windows of one forward pass on one rank, or on the ranks that share them.
        accumulation: micro batches of a rank in a step.
        global_batch: windows of a step: ranks / sequence_ranks x micro_batch x accumulation.
        length: bases of a window.
        steps: of the whole run.
        windows: of an epoch: every training window; None: the shards are not known.
        epochs: of the run. With a mixture of genomes: of the genome that is seen least often, and most often. None: the
            shards are not known.
    """

    ranks: int
    sequence_ranks: int
    micro_batch: int
    accumulation: int
    global_batch: int
    length: int
    steps: int
    windows: int | None
    epochs: tuple[float, float] | None

    @property
    def product(self) -> str:
        """How the global batch is divided, such as "4 ranks x 2 of a micro batch x 8 accumulated"."""
        shared = f" / {self.sequence_ranks} that share a window" if self.sequence_ranks > 1 else ""
        return (
            f"{counted(self.ranks, 'rank')}{shared} x {self.micro_batch} of a micro batch x {self.accumulation}"
            " accumulated"
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.global_batch * self.length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_per_step * self.steps

    @property
    def warning(self) -> str | None:
        """What to say of a step that takes more windows than there are; None if it does not."""
        if self.windows is None or self.global_batch <= self.windows:
            return None
        return (
            f"data.global_batch={self.global_batch} is more than the {self.windows:,} training windows: a step sees"
            f" windows {self.global_batch / self.windows:.1f} times. Take a smaller data.global_batch, a shorter"
            " data.length or more data"
        )


def batches_of(config: RunConfig, ranks: int, windows: WindowPlan | None) -> Batches:
    """The batches of a run.

    Args:
        config: of the run.
        ranks: that train it, on all nodes together.
        windows: to train on; None: the shards are not known.

    Raises:
        DataError, UserError: the ranks cannot form the global batch.
    """
    return Batches(
        ranks=ranks,
        sequence_ranks=config.trainer.sequence_ranks,
        micro_batch=config.data.micro_batch,
        accumulation=accumulation(
            config.data.global_batch, config.data.micro_batch, config.data_ranks(ranks)
        ),
        global_batch=config.data.global_batch,
        length=config.data.length,
        steps=config.trainer.max_steps,
        windows=None if windows is None else len(windows),
        epochs=None if windows is None else _epochs(config, windows),
    )


def _epochs(config: RunConfig, windows: WindowPlan) -> tuple[float, float]:
    """Epochs of the genome that is seen least often, and most often."""
    quotas = mixture_quotas(windows.weights)
    sizes = [after - before for before, after in zip(windows.bounds, windows.bounds[1:], strict=False)]
    consumed = config.data.global_batch * config.trainer.max_steps
    epochs = [consumed * quota / CYCLE / size for quota, size in zip(quotas, sizes, strict=True)]
    return min(epochs), max(epochs)
