"""Every setting of a run as one typed tree of dataclasses, with the checks of its values.

`model` is `ReformerConfig` and `data` is `DataConfig`: the packages `models` and `datamodules` document and check their
own settings. `RunConfig.validate` checks every section, and then settings of different sections against each other.
`load.py` fills the tree.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megabase.datamodules.config import CAUSAL, MASKED, DataConfig
from megabase.datamodules.config import SKIP as SKIP_WINDOW
from megabase.models.config import ReformerConfig
from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.require import require_choice, require_not_negative, require_positive
from megabase.pipeline.config.slurm import SlurmConfig
from megabase.pipeline.config.trainer import TrainerConfig
from megabase.pipeline.config.uris import refuse_credentials
from megabase.pipeline.errors import UserError
from megabase.pipeline.readable import counted

NONE, CPU, NVME = OFFLOAD = ("none", "cpu", "nvme")
SKIP, STOP = ON_BAD = ("skip", "stop")


@dataclass
class RunSettings:
    """Where a run is stored, and the seed of everything random in it.

    Attributes:
        name: The run directory is `<root>/<name>/`. Training the same name again resumes the run.
        root: Directory of all runs. The default MLflow database is stored in it, too.
        seed: Weights, order, hashing and dropout are functions of this number.
        init_from: A run directory, one of its checkpoints (RUN/checkpoints/step-N) or an export, whose weights the run
            starts from at step 0. null: random weights. A run that resumes does not read it.
        init_partial: Start weights that `init_from` does not have, or has in another shape, from random values. false:
            refuse to start, and name them.
    """

    name: str = "???"
    root: str = "runs"
    seed: int = 1
    init_from: str | None = None
    init_partial: bool = False

    def validate(self) -> None:
        """Raise UserError for a name that cannot name a directory."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f"run.name={self.name!r}: use letters, digits, '.', '_' and '-' only")


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay.

    Attributes:
        lr: Peak learning rate.
        min_lr: Learning rate of the last step, as a fraction of `lr`.
        warmup_steps: Optimizer steps in which the learning rate rises to `lr`.
        weight_decay: Weight decay of matrices and embeddings. Norms and biases have none.
        beta1: Decay of AdamW's first moment.
        beta2: Decay of AdamW's second moment.
        eps: AdamW's epsilon.
        clip: Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping.
    """

    lr: float = 1e-3
    min_lr: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0

    def validate(self) -> None:
        """Raise UserError for a value out of its range."""
        require_positive(self, "optim", "lr")
        require_not_negative(self, "optim", "warmup_steps", "min_lr", "weight_decay", "clip")
        for name in ("beta1", "beta2"):
            if not 0 <= (beta := getattr(self, name)) < 1:
                raise UserError(f"optim.{name}={beta}: must be at least 0 and below 1")
        if self.min_lr > 1:
            raise UserError(f"optim.min_lr={self.min_lr}: it is a fraction of optim.lr, at most 1")


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO: what is sharded, and what is kept in host memory or on a disk.

    Attributes:
        stage: What is sharded over the ranks. 0: nothing; 1: optimizer states; 2: gradients as well; 3: parameters
            as well.
        offload: Where AdamW's states and the fp32 weights are kept: `none` (on the device), `cpu` (host memory,
            stages 1 to 3) or `nvme` (a disk, stage 3). With `cpu` and `nvme` the host computes the update. `true`
            means `cpu`, `false` means `none`.
        offload_parameters: Where parameters are kept between uses, in stage 3: `none`, `cpu` or `nvme`.
        nvme_path: Directory on a disk of each node; required by `nvme`.
        bucket_mb: Size of a communication bucket in MiB.
        overlap_comm: Sum gradients over the ranks, and in stage 3 gather weights, while the device computes (GPUs,
            stages 1 to 3). A run stays exactly reproducible. Stages 1 and 2 then need memory for a second bucket, and
            buckets that hold the largest parameter.
        deepspeed: Further keys of DeepSpeed's configuration, such as
            `zero.deepspeed.zero_optimization.round_robin_gradients=true`. A key that another setting decides is
            refused.
    """

    stage: int = 2
    offload: str = NONE
    offload_parameters: str = NONE
    nvme_path: str | None = None
    bucket_mb: int = 200
    overlap_comm: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("offload", "offload_parameters"):
            value = str(getattr(self, key)).lower()
            setattr(self, key, {"true": CPU, "false": NONE}.get(value, value))

    @property
    def on_disk(self) -> bool:
        """Whether anything is offloaded to a disk."""
        return NVME in (self.offload, self.offload_parameters)

    def validate(self) -> None:
        """Raise UserError for settings that do not fit together."""
        require_positive(self, "zero", "bucket_mb")
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"zero.stage={self.stage}: DeepSpeed ZeRO has stages 0, 1, 2 and 3")
        require_choice("zero.offload", self.offload, OFFLOAD)
        require_choice("zero.offload_parameters", self.offload_parameters, OFFLOAD)
        if self.offload != NONE and self.stage == 0:
            raise UserError(f"zero.offload={self.offload} needs sharded states: set zero.stage to 1, 2 or 3")
        if self.offload == NVME and self.stage != 3:
            raise UserError(f"zero.offload=nvme needs zero.stage=3, not {self.stage}")
        if self.offload_parameters != NONE and self.stage != 3:
            raise UserError(
                f"zero.offload_parameters={self.offload_parameters} needs zero.stage=3, not {self.stage}"
            )
        if self.overlap_comm and self.stage == 0:
            raise UserError(
                "zero.overlap_comm=true has an effect only with zero.stage=1, 2 or 3: set one of them"
            )
        if self.on_disk and not self.nvme_path:
            raise UserError("offload to nvme needs zero.nvme_path: a directory on a disk of each node")


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept. One is always written at the end and on a stop.

    Attributes:
        every_steps: Optimizer steps between checkpoints. 0: steps do not count.
        every_minutes: Minutes between checkpoints. 0: time does not count.
        keep: Number of newest checkpoints to keep.
        keep_every: Checkpoints at multiples of this step number are kept for good. 0: none.
        keep_best: Number of checkpoints with the lowest validation loss to keep in addition. Only a checkpoint
            whose step was evaluated has a validation loss. 0: none.
        background: Copy the states to host memory and write them while training continues.
    """

    every_steps: int = 500
    every_minutes: float = 30.0
    keep: int = 3
    keep_every: int = 0
    keep_best: int = 0
    background: bool = False

    def validate(self) -> None:
        """Raise UserError for a value out of its range, or a `keep_every` without checkpoints at its multiples."""
        require_positive(self, "checkpoint", "keep")
        require_not_negative(self, "checkpoint", "every_steps", "every_minutes", "keep_every", "keep_best")
        if self.keep_every and not _one_divides_the_other(self.keep_every, self.every_steps):
            way_out = (
                f"take a multiple of checkpoint.every_steps={self.every_steps}"
                if self.every_steps
                else "set checkpoint.every_steps"
            )
            raise UserError(
                f"checkpoint.keep_every={self.keep_every}: few or no checkpoints are due at its multiples: {way_out}"
            )


@dataclass
class GuardConfig:
    """What to do at a bad step: a loss or gradient norm that is not finite, or a loss that explodes.

    Attributes:
        on_bad: `stop`: end the run before a checkpoint of the bad step is written, and name its windows. `skip`:
            leave out the update of that step on all ranks and continue; every step then waits for its loss once.
        spike: A loss has exploded if it is above this many times the median loss of the last `window` steps, and
            above the loss of guessing (the logarithm of the vocabulary's size). 0: never.
        window: Number of training steps over which `spike` takes the median and `max_skips` counts.
        max_skips: The run ends when this many updates of the last `window` steps were skipped.
    """

    on_bad: str = STOP
    spike: float = 3.0
    window: int = 100
    max_skips: int = 10

    def validate(self) -> None:
        """Raise UserError for a value out of its range."""
        require_positive(self, "guard", "window", "max_skips")
        require_choice("guard.on_bad", self.on_bad, ON_BAD)
        if self.spike and self.spike <= 1:
            raise UserError(
                f"guard.spike={self.spike}: must be above 1, as a multiple of the usual loss (0 switches it off)"
            )
        if self.max_skips > self.window:
            raise UserError(
                f"guard.max_skips={self.max_skips}: must be at most guard.window={self.window}, the number of"
                " steps in which skipped updates are counted"
            )


@dataclass
class TrackingConfig:
    """MLflow.

    Attributes:
        enabled: false: write the journal only, nothing to MLflow.
        uri: Tracking server, without user name and password. null: the environment variable MLFLOW_TRACKING_URI, and
            without it `sqlite:///<run.root>/mlflow.db`.
        experiment: Name of the MLflow experiment. null: the environment variable MLFLOW_EXPERIMENT_NAME, and without it
            `megabase`.
        report: Write `report.html`, the run as a page, when the run is finished.
        log_model: When the run is finished, make an MLflow model of its newest checkpoint (`model/` in the run
            directory, 4 bytes for each parameter) and send it to MLflow.
        register: Name of the registered model of which this model becomes a version. It includes `log_model`.
        system_seconds: Every node measures its CPUs, memory, network and GPUs at this interval. 0: never.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None
    report: bool = True
    log_model: bool = False
    register: str | None = None
    system_seconds: float = 30.0

    def validate(self) -> None:
        """Raise UserError for a value out of its range, or a password in the URI, which would be written to logs."""
        require_not_negative(self, "tracking", "system_seconds")
        if self.uri:
            refuse_credentials("tracking.uri", self.uri)
        if self.register is not None and (not self.register.strip() or set(self.register) & set("/:")):
            raise UserError(
                f"tracking.register={self.register!r}: MLflow takes no model name that is empty or contains / or :"
            )

    @property
    def wants_model(self) -> bool:
        """Whether MLflow gets the trained model."""
        return self.log_model or self.register is not None


@dataclass
class RunConfig:
    """The whole tree; the class of each section documents its settings."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ReformerConfig = field(default_factory=ReformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return (Path(self.run.root) / self.run.name).absolute()

    def validate(self) -> None:
        """Check every section, and then settings of different sections against each other.

        Raises:
            UserError: a value is out of its range, or settings do not fit together.
            DataError: a setting under `data` cannot work.
            ConfigError: a setting under `model` cannot work.
        """
        for key, number in dotted(self).items():
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}={number}: must be a finite number")
        for section in (
            self.run,
            self.optim,
            self.trainer,
            self.zero,
            self.checkpoint,
            self.guard,
            self.tracking,
        ):
            section.validate()
        require_positive(self.data, "data", "length", "global_batch", "micro_batch")
        self.data.validate()
        self._check_offload_and_background()
        self._check_keep_best()
        self._check_objective()
        self.check_sequence_ranks()
        # The shards decide the size of the vocabulary. What does not depend on it is checked here.
        vocab_size = self.model.vocab_size or 1
        dataclasses.replace(self.model, vocab_size=vocab_size).validate(self.data.length)

    def _check_offload_and_background(self) -> None:
        if self.zero.offload == NVME and self.checkpoint.background:
            raise UserError(
                "checkpoint.background=true copies all states to host memory, which zero.offload=nvme is there to save:"
                " set checkpoint.background=false, or zero.offload=cpu"
            )

    def _check_keep_best(self) -> None:
        every, evaluated = self.checkpoint.every_steps, self.trainer.eval_every_steps
        if self.checkpoint.keep_best and not _one_divides_the_other(every, evaluated):
            raise UserError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs evaluations at the steps of checkpoints: make"
                f" one of checkpoint.every_steps={every} and trainer.eval_every_steps={evaluated} a multiple of the"
                " other"
            )

    def _check_objective(self) -> None:
        if self.data.objective == CAUSAL and not self.model.causal:
            raise UserError(
                "data.objective=causal predicts the next base, but model.causal=false lets the model see it: "
                "set model.causal=true, or data.objective=masked"
            )
        if self.data.objective == MASKED and self.tracking.wants_model:
            raise UserError(
                "tracking.log_model: an MLflow model scores sequences from left to right, which a model of"
                " data.objective=masked cannot: set tracking.log_model=false, and leave tracking.register out"
            )
        if self.data.objective == MASKED and self.model.causal:
            raise UserError(
                "data.objective=masked predicts masked bases from both sides, but model.causal=true hides one: "
                "set model.causal=false, or data.objective=causal"
            )

    def check_sequence_ranks(self) -> None:
        """Raise UserError if `trainer.sequence_ranks` ranks cannot share a window of this model."""
        parts = self.trainer.sequence_ranks
        for key, number in (("data.length", self.data.length), ("model.heads", self.model.heads)):
            if number % parts:
                raise UserError(
                    f"trainer.sequence_ranks={parts} does not divide {key}={number}: ranks that share a window hold"
                    f" equally many of its positions, and of the heads: take a divisor of {key}"
                )
        if parts > 1 and self.data.on_error == SKIP_WINDOW:
            raise UserError(
                f"trainer.sequence_ranks={parts} with data.on_error=skip: the ranks that share a window would skip"
                " different parts of it: set data.on_error=raise"
            )

    def data_ranks(self, ranks: int) -> int:
        """How many of `ranks` ranks train on windows of their own.

        Raises:
            UserError: `trainer.sequence_ranks` does not divide them.
        """
        parts = self.trainer.sequence_ranks
        if ranks % parts:
            raise UserError(
                f"trainer.sequence_ranks={parts} does not divide the {counted(ranks, 'rank')} (trainer.nodes x"
                f" trainer.devices): {parts} ranks share each window: change one of them"
            )
        return ranks // parts


def _one_divides_the_other(a: int, b: int) -> bool:
    """Whether both are above zero and one is a multiple of the other."""
    return bool(a and b) and (a % b == 0 or b % a == 0)
