"""The plan of a run: what `megabase train --dry-run` prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megabase.datamodules.batches.visits import Windows
from megabase.pipeline.checkpoint.next_start import NextStart
from megabase.pipeline.checkpoint.space import expected_bytes
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.plan.batches import Batches, batches_of
from megabase.pipeline.plan.memory import Memory, memory_of
from megabase.pipeline.plan.parameters import count_parameters


@dataclass(frozen=True)
class Plan:
    """What a run will be.

    Attributes:
        directory: the run directory.
        precision: '32', 'bf16' or '16'.
        stage: ZeRO stage.
        parameters: of the model, by part.
        memory: of a rank.
        batches: of the run.
        start: what the next start would do.
        checkpoint_bytes: of one checkpoint.
        init_from: where a new run's weights come from; None: they are random.
        keep: newest checkpoints that are kept.
    """

    directory: Path
    precision: str
    stage: int
    parameters: dict[str, int]
    memory: Memory
    batches: Batches
    start: NextStart
    checkpoint_bytes: int
    init_from: str | None
    keep: int


def plan(config: RunConfig, ranks: int, windows: Windows, start: NextStart) -> Plan:
    """The plan of a run.

    Args:
        config: of the run, checked: `model.vocab_size` is set.
        ranks: that train it, on all nodes together.
        windows: to train on.
        start: what the next start would do.

    Raises:
        DataError: the ranks cannot form the global batch.
    """
    precision = precision_of(config.trainer.precision)
    parameters = count_parameters(config.model)
    total = sum(parameters.values())
    return Plan(
        directory=config.directory,
        precision=precision,
        stage=config.zero.stage,
        parameters=parameters,
        memory=memory_of(config, total, ranks, precision),
        batches=batches_of(config, ranks, windows),
        start=start,
        checkpoint_bytes=expected_bytes(total, config.zero.stage, precision),
        init_from=config.run.init_from,
        keep=config.checkpoint.keep,
    )
