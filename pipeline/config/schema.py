"""Every setting of a run as one typed tree.

The dataclasses are the schema; files are merged over them from left to right, then `key=value` arguments.
`model` is `models.ReformerConfig`, `data` is `datamodules.DataConfig`, `slurm` is `submit.SlurmConfig`: each
package documents its own settings. There is no include language: a small file that is merged does that job.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from megabase.datamodules.config import CAUSAL, MASKED, DataConfig
from megabase.datamodules.files import publish
from megabase.models.config import ReformerConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.slurm.submit import SlurmConfig

PRECISIONS = {"auto", "32", "bf16", "16"}
NONE, CPU, NVME = OFFLOAD = ("none", "cpu", "nvme")
ON_BAD = {"stop", "skip"}


@dataclass
class RunSettings:
    """Where a run is stored, and the seed of everything random in it.

    Attributes:
        name: The run directory is `<root>/<name>/`. Training the same name again resumes the run.
        root: Directory of all runs. The default MLflow database is stored in it, too.
        seed: Weights, order, hashing and dropout are functions of this number.
    """

    name: str = "???"
    root: str = "runs"
    seed: int = 1


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


@dataclass
class TrainerConfig:
    """How long a run trains, on which ranks, and how often it evaluates and writes its journal.

    Attributes:
        max_steps: Optimizer steps of the whole run.
        nodes: Number of machines.
        devices: Ranks on each node. null: one for each GPU of the node, or 1 on a node without GPUs.
        precision: `auto` (bf16 on GPUs, 32 on CPUs), `32`, `bf16` or `16` (GPUs only).
        eval_every_steps: Optimizer steps between evaluations on the validation split. 0: only at the end.
        eval_sequences: Windows of one evaluation, spread evenly over the split. 0: all. The evaluation at the end
            always takes all.
        log_every_steps: Optimizer steps between writes of the journal. Each write reads the losses from the device.
        max_minutes: This many minutes after its ranks began, a start writes a checkpoint and exits with code 75. 0: no
            limit. At least one step is trained. Leave time for a step and a checkpoint before the machine's own limit.
        hang_minutes: If a rank finishes no micro batch, evaluation batch or phase of a checkpoint for this many
            minutes, it writes its stacks to `logs/` and ends the job. 0: never. Until the first micro batch is
            done, the limit is at least 30 minutes.
    """

    max_steps: int = 1000
    nodes: int = 1
    devices: int | None = None
    precision: str = "auto"
    eval_every_steps: int = 500
    eval_sequences: int = 0
    log_every_steps: int = 10
    max_minutes: float = 0.0
    hang_minutes: float = 30.0


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
        deepspeed: Further keys of DeepSpeed's configuration, such as
            `zero.deepspeed.zero_optimization.round_robin_gradients=true`. A key that another setting decides is
            refused.
    """

    stage: int = 2
    offload: str = NONE
    offload_parameters: str = NONE
    nvme_path: str | None = None
    bucket_mb: int = 200
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("offload", "offload_parameters"):
            said = str(getattr(self, key)).lower()
            setattr(self, key, {"true": CPU, "false": NONE}.get(said, said))

    @property
    def on_disk(self) -> bool:
        """Whether anything is offloaded to a disk."""
        return NVME in (self.offload, self.offload_parameters)

    def validate(self) -> None:
        """Raise UserError for settings that do not fit together."""
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"zero.stage={self.stage}: DeepSpeed ZeRO has stages 0, 1, 2 and 3")
        offloads = {"offload": self.offload, "offload_parameters": self.offload_parameters}
        for key, device in offloads.items():
            if device not in OFFLOAD:
                raise UserError(f"zero.{key}={device!r}: choose one of {', '.join(OFFLOAD)}")
        if self.offload != NONE and self.stage == 0:
            raise UserError(f"zero.offload={self.offload} needs sharded states: set zero.stage to 1, 2 or 3")
        if self.offload == NVME and self.stage != 3:
            raise UserError(f"zero.offload=nvme needs zero.stage=3, not {self.stage}")
        if self.offload_parameters != NONE and self.stage != 3:
            raise UserError(
                f"zero.offload_parameters={self.offload_parameters} needs zero.stage=3, not {self.stage}"
            )
        if self.on_disk and not self.nvme_path:
            raise UserError("offload to nvme needs zero.nvme_path: a directory on a disk of each node")


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept. One is always written at the end and on a stop.

    Attributes:
        every_steps: Optimizer steps between checkpoints. 0: none by step.
        every_minutes: Minutes between checkpoints. 0: none by time.
        keep: Number of newest checkpoints to keep.
        keep_every: Checkpoints at multiples of this step number are kept for good. 0: none.
        keep_best: Number of checkpoints with the lowest validation loss to keep besides, of those evaluated at
            their own step. 0: none.
        background: Copy the states to host memory and write them while training continues.
    """

    every_steps: int = 500
    every_minutes: float = 30.0
    keep: int = 3
    keep_every: int = 0
    keep_best: int = 0
    background: bool = False


@dataclass
class GuardConfig:
    """What to do at a bad step: a loss or gradient norm that is not finite, or a loss that explodes.

    Attributes:
        on_bad: `stop`: end the run before a checkpoint of the bad step is written, and name its windows. `skip`:
            leave out the update of that step on all ranks and continue; every step then waits for its loss once.
        spike: A loss has exploded if it is above this many times the median of the last losses and above the loss
            of guessing. 0: never.
        window: Number of training steps that count as the last ones.
        max_skips: The run ends when this many of the last updates were skipped.
    """

    on_bad: str = "stop"
    spike: float = 3.0
    window: int = 100
    max_skips: int = 10


@dataclass
class TrackingConfig:
    """MLflow.

    Attributes:
        enabled: false: write the journal only, nothing to MLflow.
        uri: Tracking server. null: `sqlite:///<run.root>/mlflow.db`.
        experiment: Name of the MLflow experiment.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "megabase"


@dataclass
class RunConfig:
    """The whole tree; see the class of each part for its settings."""

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
        """Raise UserError for what no field alone can know to be wrong."""
        for key, number in flatten(as_dict(self)).items():
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}={number}: must be a finite number")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run.name):
            raise UserError(f"run.name={self.run.name!r}: use letters, digits, '.', '_' and '-' only")
        positive = {
            "trainer.max_steps": self.trainer.max_steps,
            "trainer.nodes": self.trainer.nodes,
            "trainer.log_every_steps": self.trainer.log_every_steps,
            "data.length": self.data.length,
            "data.global_batch": self.data.global_batch,
            "data.micro_batch": self.data.micro_batch,
            "optim.lr": self.optim.lr,
            "checkpoint.keep": self.checkpoint.keep,
            "zero.bucket_mb": self.zero.bucket_mb,
            "guard.window": self.guard.window,
            "guard.max_skips": self.guard.max_skips,
        }
        if self.trainer.devices is not None:
            positive["trainer.devices"] = self.trainer.devices
        for key, value in positive.items():
            if value <= 0:
                raise UserError(f"{key}={value}: must be above zero")
        not_negative = {
            "trainer.eval_every_steps": self.trainer.eval_every_steps,
            "trainer.eval_sequences": self.trainer.eval_sequences,
            "trainer.max_minutes": self.trainer.max_minutes,
            "trainer.hang_minutes": self.trainer.hang_minutes,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "checkpoint.every_minutes": self.checkpoint.every_minutes,
            "checkpoint.keep_every": self.checkpoint.keep_every,
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "optim.warmup_steps": self.optim.warmup_steps,
            "optim.min_lr": self.optim.min_lr,
            "optim.weight_decay": self.optim.weight_decay,
            "optim.clip": self.optim.clip,
        }
        for key, value in not_negative.items():
            if value < 0:
                raise UserError(f"{key}={value}: must not be negative (0 switches it off)")
        for key, beta in (("optim.beta1", self.optim.beta1), ("optim.beta2", self.optim.beta2)):
            if not 0 <= beta < 1:
                raise UserError(f"{key}={beta}: must be at least 0 and below 1")
        if self.optim.min_lr > 1:
            raise UserError(f"optim.min_lr={self.optim.min_lr}: it is a fraction of optim.lr, at most 1")
        self.zero.validate()
        if self.zero.offload == NVME and self.checkpoint.background:
            raise UserError(
                "checkpoint.background=true copies all states to host memory, which zero.offload=nvme is there to save:"
                " set checkpoint.background=false, or zero.offload=cpu"
            )
        if self.trainer.precision not in PRECISIONS:
            raise UserError(
                f"trainer.precision={self.trainer.precision!r}: choose one of {', '.join(sorted(PRECISIONS))}"
            )
        if self.guard.on_bad not in ON_BAD:
            raise UserError(f"guard.on_bad={self.guard.on_bad!r}: choose one of {', '.join(sorted(ON_BAD))}")
        if self.guard.spike and self.guard.spike <= 1:
            raise UserError(
                f"guard.spike={self.guard.spike}: a multiple of the usual loss, above 1 (0 switches it off)"
            )
        if self.guard.max_skips > self.guard.window:
            raise UserError(
                f"guard.max_skips={self.guard.max_skips}: at most guard.window={self.guard.window}, the steps in"
                " which skipped updates are counted"
            )
        _check_retention(self.checkpoint, self.trainer.eval_every_steps)
        self.data.validate()
        if self.data.objective == CAUSAL and not self.model.causal:
            raise UserError(
                "data.objective=causal predicts the next base, which a model with model.causal=false sees: "
                "set model.causal=true, or data.objective=masked"
            )
        if self.data.objective == MASKED and self.model.causal:
            raise UserError(
                "data.objective=masked predicts masked bases from both sides, but model.causal=true sees one: "
                "set model.causal=false, or data.objective=causal"
            )
        # The vocabulary comes from the shards; what does not depend on it is checked here.
        vocab_size = self.model.vocab_size or 1
        dataclasses.replace(self.model, vocab_size=vocab_size).validate(self.data.length)


def _check_retention(settings: CheckpointConfig, evaluated: int) -> None:
    """Raise UserError where `keep_every` or `keep_best` would keep less than they say.

    evaluated: steps between evaluations.
    """
    every, kept, best = settings.every_steps, settings.keep_every, settings.keep_best
    if kept and (not every or (kept % every and every % kept)):
        way = f"take a multiple of checkpoint.every_steps={every}" if every else "set checkpoint.every_steps"
        raise UserError(f"checkpoint.keep_every={kept}: no checkpoint is due at most of these steps: {way}")
    if best and (not every or not evaluated or (evaluated % every and every % evaluated)):
        raise UserError(
            f"checkpoint.keep_best={best} needs evaluations at the steps of checkpoints: make one of"
            f" checkpoint.every_steps={every} and trainer.eval_every_steps={evaluated} a multiple of the other"
        )


def load(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Merge defaults, YAML `files` from left to right, and `overrides` ("key.path=value") into a RunConfig.

    Raises:
        UserError: a file is missing or is not YAML; a key is unknown (the closest known one is named); a value
            has the wrong type; a required key is missing; the values do not fit together.
    """
    merged = OmegaConf.structured(RunConfig)
    for file in files:
        merged = _merge(merged, _read_yaml(Path(file)), str(file))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is neither a config file nor KEY=VALUE")
        try:
            parsed = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"argument {override!r}: {first_line(error)}") from None
        merged = _merge(merged, parsed, f"argument {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        hint = f"{key}=VALUE"
        raise UserError(f"{key} is missing: set it in a config file or add {hint}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"config: {first_line(error)}") from None
    assert isinstance(config, RunConfig)
    config.validate()
    return config


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved tree as YAML that `load` reads back to an equal one."""
    publish(path, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The tree as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to {"a.b.c": value}; an empty one is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_yaml(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"config file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config file {path} cannot be read as YAML: {first_line(error)}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"config file {path} must hold keys and values, not a list")
    return loaded


def _merge(base: Any, change: Any, place: str) -> Any:
    try:
        return OmegaConf.merge(base, change)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = list(flatten(as_dict(RunConfig())))
        known += sorted({".".join(name.split(".")[:-1]) for name in known})
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        sections = ", ".join(field.name for field in dataclasses.fields(RunConfig))
        hint = f"did you mean {close[0]!r}?" if close else f"the sections are {sections}"
        raise UserError(f"{place}: unknown key {key[:60]!r}; {hint}") from None
    except (ValidationError, OmegaConfBaseException) as error:
        said = first_line(error)
        if "ListConfig" in said:
            said = f"a list is wanted: '{error.full_key}=[a,b]'"
        raise UserError(f"{place}: {error.full_key or 'value'}: {said}") from None


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
