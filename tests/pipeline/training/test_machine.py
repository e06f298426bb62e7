"""A run that this machine cannot train is refused before anything starts, with what fits."""

from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import Machine
from megabase.pipeline.ranks.environment import OVERSUBSCRIBE
from megabase.pipeline.training.machine import (
    HOPELESS_S,
    SLOW_S,
    check_machine,
    fitting_settings,
    seconds_per_step,
    warnings_about,
)

CONFIGS = Path(__file__).parents[3] / "configs"
TWO_CPUS = Machine(cpus=2, gpus=0)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell of a workstation."""
    monkeypatch.delenv(OVERSUBSCRIBE, raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def config(name: str, *settings: str) -> RunConfig:
    return load([CONFIGS / f"{name}.yaml"], ["run.name=x", "data.shards=s", *settings])


def test_the_demo_runs_on_two_cpus_without_a_warning() -> None:
    demo = config("demo")
    check_machine(demo, 2, TWO_CPUS, ["configs/demo.yaml"])
    assert warnings_about(demo, TWO_CPUS) == []


def test_more_ranks_than_cpus_are_refused_with_the_command_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["configs/demo.yaml", "trainer.devices=8", "run.name=two words"]
    with pytest.raises(UserError) as caught:
        check_machine(config("demo", "data.global_batch=8"), 8, TWO_CPUS, arguments)
    assert str(caught.value) == (
        "trainer.devices=8: this machine has no GPU that torch can use, and 2 CPUs, one for each rank at most:"
        " megabase train configs/demo.yaml 'run.name=two words' trainer.devices=2"
    )
    check_machine(config("demo"), 8, Machine(cpus=2, gpus=8), arguments)
    monkeypatch.setenv(OVERSUBSCRIBE, "1")
    check_machine(config("demo"), 8, TWO_CPUS, arguments)


@pytest.mark.parametrize(
    ("batch", "micro", "cpus", "settings"),
    [
        (8, 2, 4, ["trainer.devices=4"]),
        (12, 2, 4, ["trainer.devices=3"]),
        (6, 3, 64, ["trainer.devices=2"]),
        (6, 4, 4, ["trainer.devices=3", "data.micro_batch=2"]),
        (7, 2, 2, ["trainer.devices=1", "data.micro_batch=1"]),
    ],
)
def test_the_settings_that_fit_make_whole_batches(
    batch: int, micro: int, cpus: int, settings: list[str]
) -> None:
    run = config("demo", f"data.global_batch={batch}", f"data.micro_batch={micro}")
    assert fitting_settings(run, cpus) == settings


def test_a_model_for_gpus_is_refused_on_a_workstation() -> None:
    run = config("genome-8k")
    assert seconds_per_step(run, 2) > HOPELESS_S
    with pytest.raises(
        UserError, match=r"no GPU .* made for GPUs: on 2 CPUs a step takes 77 minutes or more"
    ):
        check_machine(run, 8, TWO_CPUS, ["configs/genome-8k.yaml"])
    with pytest.raises(UserError, match=r"its 20,000 steps .* years .* take configs/demo\.yaml"):
        check_machine(run, 1, TWO_CPUS, ["configs/genome-8k.yaml"])
    check_machine(run, 8, Machine(cpus=2, gpus=8), ["configs/genome-8k.yaml"])


def test_a_slow_start_on_cpus_is_warned_of() -> None:
    run = config("genome-8k", "data.global_batch=16", "trainer.devices=2")
    assert SLOW_S < seconds_per_step(run, 2) < HOPELESS_S
    check_machine(run, 2, TWO_CPUS, [])
    [warning] = warnings_about(run, TWO_CPUS)
    assert "trains on 2 CPUs, without a GPU: a step takes" in warning


def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = config("demo")
    [warning] = warnings_about(demo, Machine(2, 0, has_driver=True))
    assert "has an NVIDIA driver, but torch sees no GPU" in warning
    assert warnings_about(demo, Machine(2, 0, has_driver=True, hidden=True)) == []
    assert warnings_about(demo, Machine(2, 1, has_driver=True)) == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    [warning] = warnings_about(demo, TWO_CPUS)
    assert "slurm.gpus=any, but torch sees no GPU on this node" in warning
    assert warnings_about(config("demo", "slurm.gpus=null"), TWO_CPUS) == []
