"""Every section checks its own values; the tree checks sections against each other."""

import re
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.sequence_ranks=3"], "trainer.sequence_ranks=3 does not divide data.length=8192"),
        (["trainer.sequence_ranks=16"], "trainer.sequence_ranks=16 does not divide model.heads=8"),
        (
            ["trainer.sequence_ranks=2", "data.on_error=skip"],
            "trainer.sequence_ranks=2 with data.on_error=skip: the ranks that share a window",
        ),
        (["trainer.offload_streams=disk"], "trainer.offload_streams='disk': choose one of none, host"),
        (["trainer.sequence_ranks=0"], "trainer.sequence_ranks=0: must be above zero"),
    ],
)
def test_ranks_that_cannot_share_a_window(settings: list[str], message: str) -> None:
    settings = ["run.name=x", "data.shards=s", "data.length=8192", "model.heads=8", *settings]
    with pytest.raises(UserError, match=re.escape(message)):
        load([], settings).validate()


def test_windows_at_a_time() -> None:
    config = load([], ["run.name=x", "data.shards=s", "trainer.sequence_ranks=4"])
    assert config.data_ranks(8) == 2
    with pytest.raises(UserError, match=r"trainer\.sequence_ranks=4 does not divide the 6 ranks"):
        config.data_ranks(6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(value: float) -> None:
    config = RunConfig(run=RunSettings(name="x"))
    config.data.shards = "somewhere"
    config.guard.spike = value
    with pytest.raises(UserError, match=rf"guard\.spike={value}: must be a finite number"):
        config.validate()
