"""The section `trainer` of the config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megabase.pipeline.config.callbacks import parse
from megabase.pipeline.config.require import require_choice, require_not_negative, require_positive
from megabase.pipeline.errors import UserError

PRECISIONS = ("16", "32", "auto", "bf16")
NONE, HOST = "none", "host"
OFFLOADS = (NONE, HOST)


@dataclass
class TrainerConfig:
    """How long a run trains, on which ranks, and how often it evaluates and writes its journal.

    Attributes:
        max_steps: Optimizer steps of the whole run.
        nodes: Number of machines.
        devices: Ranks on each node. null: one for each GPU of the node, or 1 on a node without GPUs.
        sequence_ranks: Ranks that share each window, so that longer ones fit (docs/scale.md): each holds an equal part
            of its positions. They are consecutive, so keep them within a node. It divides the ranks, `data.length` and
            `model.heads`. Only the memory and the speed of a run depend on it; a run may resume with another.
        offload_streams: `host` keeps the residual streams and their gradients, 16 bytes for each position and channel,
            in host memory (docs/scale.md): longer windows fit on a GPU, and a step takes longer. Losses are the same.
            `none` keeps them on the GPU.
        precision: `auto` (bf16 on GPUs, 32 on CPUs), `32`, `bf16` or `16` (GPUs only).
        eval_every_steps: Optimizer steps between evaluations on the validation split. 0: only at the end.
        eval_sequences: Windows of one evaluation, spread evenly over the split, the same ones each time. 0: all. At
            the end of a run the whole split is evaluated as well; the journal has it under names that begin with
            `full_`.
        eval_recall: Windows in which each evaluation measures recall: how much better the last bases of a validation
            window are predicted if the same bases came before (docs/evaluate.md). It costs a forward pass of twice as
            many windows. 0: none.
        log_every_steps: Optimizer steps between writes of the journal. Each write reads the losses from the device.
        max_minutes: Time limit of one start, in minutes from when its ranks begin. Then the ranks finish their step
            (each start trains at least one), write a checkpoint and exit with code 75. 0: no limit. Leave time for a
            step and a checkpoint before the machine's own limit.
        hang_minutes: If a rank finishes no micro batch, evaluation batch or phase of a checkpoint for this many
            minutes, it writes its Python stacks to `logs/` and ends the job. 0: never. Until the first micro batch is
            done, the limit is at least 30 minutes.
        callbacks: Lightning callbacks of yours, such as `[my.module.MyCallback]`, or with arguments
            `[{class: my.module.MyCallback, arguments: {every: 10}}]` (docs/lightning.md).
    """

    max_steps: int = 1000
    nodes: int = 1
    devices: int | None = None
    sequence_ranks: int = 1
    offload_streams: str = NONE
    precision: str = "auto"
    eval_every_steps: int = 500
    eval_sequences: int = 0
    eval_recall: int = 8
    log_every_steps: int = 10
    max_minutes: float = 0.0
    hang_minutes: float = 30.0
    callbacks: list[Any] = field(default_factory=list)

    def validate(self) -> None:
        """Raise UserError for a value out of its range."""
        require_positive(
            self, "trainer", "max_steps", "nodes", "log_every_steps", "devices", "sequence_ranks"
        )
        require_not_negative(
            self,
            "trainer",
            "eval_every_steps",
            "eval_sequences",
            "eval_recall",
            "max_minutes",
            "hang_minutes",
        )
        require_choice("trainer.offload_streams", self.offload_streams, OFFLOADS)
        require_choice("trainer.precision", self.precision, PRECISIONS)
        list(parse(self.callbacks))  # raises

    def check_device(self, *, gpu: bool) -> None:
        """Raise UserError for settings that need a GPU where there is none. gpu: whether there is one."""
        if not gpu and self.precision == "16":
            raise UserError("trainer.precision=16 needs a GPU: take 32 or bf16")
        if not gpu and self.offload_streams == HOST:
            raise UserError(
                "trainer.offload_streams=host needs a GPU: without one streams are in host memory anyway"
            )
