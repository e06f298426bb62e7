"""The plan of a run, from its settings alone: what `megabase plan` and `megabase train --dry-run` print."""

from __future__ import annotations

from dataclasses import dataclass

from megabase.datamodules.order.windows import WindowPlan
from megabase.models.flops import training_flops_per_token
from megabase.pipeline.checkpoint.space import expected_bytes
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.plan.batches import Batches, batches_of
from megabase.pipeline.plan.limits import Fitting, Space, ranks_of
from megabase.pipeline.plan.memory import Memory
from megabase.pipeline.plan.parameters import count_parameters
from megabase.pipeline.plan.profiles import CPU, Profile, cores_of_a_rank
from megabase.pipeline.plan.step import StepTime, step_time


@dataclass(frozen=True)
class Speed:
    """How fast a run is.

    Attributes:
        step: seconds of an optimizer step by kind.
        tokens_per_second: of all ranks.
        mfu: share of the devices' peak that the model's arithmetic reaches.
        seconds: of the whole run, without evaluations and checkpoints.
        device_hours: of the whole run, all devices together.
    """

    step: StepTime
    tokens_per_second: float
    mfu: float
    seconds: float
    device_hours: float


@dataclass(frozen=True)
class Plan:
    """What a run will be.

    Attributes:
        config: of the run.
        profile: of the hardware.
        precision: '32', 'bf16' or '16'.
        parameters: of the model, by part.
        memory: of a rank.
        space: what it needs and what there is.
        batches: of the run.
        speed: of the run.
        checkpoint_bytes: of one checkpoint.
    """

    config: RunConfig
    profile: Profile
    precision: str
    parameters: dict[str, int]
    memory: Memory
    space: Space
    batches: Batches
    speed: Speed
    checkpoint_bytes: int

    @property
    def fitting(self) -> Fitting:
        """Which other runs of this model fit."""
        return Fitting(sum(self.parameters.values()), self.precision, self.profile)


def plan(config: RunConfig, windows: WindowPlan | None, precision: str, profile: Profile) -> Plan:
    """The plan of a run.

    Args:
        config: of the run, checked: `model.vocab_size` and `trainer.devices` are set.
        windows: to train on; None: the shards are not known.
        precision: '32', 'bf16' or '16'.
        profile: of the hardware.

    Raises:
        DataError, UserError: the ranks cannot form the global batch, or the profile does not have the precision.
    """
    parameters = count_parameters(config.model)
    total = sum(parameters.values())
    batches = batches_of(config, ranks_of(config), windows)
    fitting = Fitting(total, precision, profile)
    return Plan(
        config=config,
        profile=profile,
        precision=precision,
        parameters=parameters,
        memory=fitting.memory(config),
        space=fitting.space(config),
        batches=batches,
        speed=_speed(
            config, batches, step_time(config, total, batches, precision, profile), precision, profile
        ),
        checkpoint_bytes=expected_bytes(total, config.zero.stage, precision),
    )


def _speed(config: RunConfig, batches: Batches, step: StepTime, precision: str, profile: Profile) -> Speed:
    rate = batches.tokens_per_step / step.total
    flops, _ = training_flops_per_token(config.model, batches.length)
    cores = cores_of_a_rank(config, config.trainer.devices or 1) if profile.device == CPU else 1.0
    peak = batches.ranks * cores * profile.peak_flops(precision)
    seconds = step.total * batches.steps
    return Speed(
        step=step,
        tokens_per_second=rate,
        mfu=rate * flops / peak,
        seconds=seconds,
        device_hours=seconds * batches.ranks / 3600,
    )
