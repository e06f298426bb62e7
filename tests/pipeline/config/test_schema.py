"""Every section checks its own values; the tree checks sections against each other."""

from pathlib import Path

import pytest

from megabase.pipeline.config.schema import (
    CheckpointConfig,
    GuardConfig,
    OptimConfig,
    RunConfig,
    RunSettings,
    TrainerConfig,
    ZeroConfig,
)
from megabase.pipeline.errors import UserError


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (RunSettings(name="-a"), r"run\.name='-a'"),
        (OptimConfig(lr=0), r"optim\.lr=0: must be above zero"),
        (OptimConfig(clip=-1), r"optim\.clip=-1: must not be negative \(0 switches it off\)"),
        (OptimConfig(beta2=1), r"optim\.beta2=1: must be at least 0 and below 1"),
        (TrainerConfig(devices=0), r"trainer\.devices=0: must be above zero"),
        (TrainerConfig(precision="8"), r"trainer\.precision='8': choose one of 16, 32, auto, bf16"),
        (ZeroConfig(bucket_mb=0), r"zero\.bucket_mb=0: must be above zero"),
        (ZeroConfig(offload="disk"), r"zero\.offload='disk': choose one of none, cpu, nvme"),
        (CheckpointConfig(keep=0), r"checkpoint\.keep=0: must be above zero"),
        (GuardConfig(on_bad="panic"), r"guard\.on_bad='panic': choose one of skip, stop"),
    ],
)
def test_a_section_names_its_bad_value(
    section: OptimConfig | TrainerConfig | ZeroConfig | CheckpointConfig | GuardConfig | RunSettings,
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        section.validate()


def test_defaults_of_every_section_are_valid() -> None:
    config = RunConfig(run=RunSettings(name="x"))
    config.data.shards = "somewhere"
    config.validate()
    assert config.directory == Path("runs/x").absolute()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(value: float) -> None:
    config = RunConfig(run=RunSettings(name="x"))
    config.data.shards = "somewhere"
    config.guard.spike = value
    with pytest.raises(UserError, match=rf"guard\.spike={value}: must be a finite number"):
        config.validate()
