"""What a plan warns of."""

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.config.slurm import seconds_of_limit
from megabase.pipeline.plan.profiles import read_profile
from megabase.pipeline.plan.run import plan
from megabase.pipeline.plan.warnings import warnings_of

SETTINGS = [
    *("run.name=x", "data.shards=s", "trainer.devices=8", "trainer.precision=bf16", "model.vocab_size=9"),
    *("data.length=65536", "data.global_batch=64", "model.dim=1024", "model.heads=16"),
]


def warnings(*settings: str) -> list[str]:
    return warnings_of(plan(load([], [*SETTINGS, *settings]), None, "bf16", read_profile("h100")))


def test_a_good_run_has_no_warning() -> None:
    assert warnings() == []


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["data.length=512"], "a rank starves: it waits for the host to launch kernels for"),
        (
            ["model.dim=4096", "data.length=1024", "trainer.nodes=8", "model.depth=2"],
            "of a step: raise data.global_batch, or take fewer ranks",
        ),
        (
            ["trainer.sequence_ranks=16", "trainer.nodes=2", "model.layers=[lsh]", "data.length=1048576"],
            "windows are exchanged over the network",
        ),
        (["data.length=1048576", "slurm.time=00:02:30"], "has time for less than two steps of"),
        (
            ["data.length=1048576", "slurm.signal_seconds=10"],
            "slurm.signal_seconds=10 is less than twice a step of",
        ),
        (["data.length=16777216", "model.max_length=16777216"], "does not fit: a rank needs"),
    ],
)
def test_what_is_warned_of(settings: list[str], text: str) -> None:
    assert any(text in warning for warning in warnings(*settings)), warnings(*settings)


def test_a_run_that_nothing_makes_fit_says_so() -> None:
    found = warnings("model.dim=65536", "data.length=1024", "model.depth=512")
    assert "no change of micro batch, ZeRO, sharing of windows or length makes it fit" in found[0]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("24:00:00", 86400), ("1-00:00:10", 86410), ("90", 90), (None, None), ("soon", None)],
)
def test_time_limits(time: str | None, seconds: int | None) -> None:
    assert seconds_of_limit(time) == seconds
