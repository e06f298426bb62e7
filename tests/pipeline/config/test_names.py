"""What a user may have meant who wrote a key that does not exist."""

import dataclasses

import pytest

from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.names import OTHER_NAMES, closest, hint, sections
from megabase.pipeline.config.schema import RunConfig


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("lr", ["optim.lr"]),
        ("optim.rl", ["optim.lr"]),
        ("data.lenght", ["data.length"]),
        ("lenght", ["data.length"]),
        ("model.lsh.round", ["model.lsh.rounds"]),
        ("trainer.lr", ["optim.lr"]),
        ("window", ["model.local.window", "guard.window"]),
        ("optim.learning_rate", ["optim.lr"]),
        ("batch_size", ["data.global_batch"]),
        ("max_step", ["trainer.max_steps"]),
        ("data.length", ["data.length"]),
        ("zzzz.q", []),
        ("model.lsh.foo", []),
    ],
)
def test_the_closest_settings(unknown: str, meant: list[str]) -> None:
    assert closest(unknown) == meant


def test_names_of_other_programs_stand_for_settings_that_exist() -> None:
    assert set(OTHER_NAMES.values()) <= set(dotted(RunConfig()))


def test_where_nothing_is_close_the_hint_names_what_there_is() -> None:
    assert hint("zzzz.q") == "the sections are " + ", ".join(
        field.name for field in dataclasses.fields(RunConfig)
    )
    assert hint("zero.zzzz").startswith("zero has stage, offload, ")
    assert hint("model.lsh.foo").startswith("model.lsh has rounds, ")


def test_sections() -> None:
    assert {"run", "model", "model.lsh", "slurm"} <= set(sections())
    assert not set(sections()) & set(dotted(RunConfig()))
