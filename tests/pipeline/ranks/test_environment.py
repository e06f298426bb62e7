"""The variables of a rank, from torchrun or from SLURM."""

import os

import pytest
import torch

from megabase.pipeline.errors import UserError
from megabase.pipeline.ranks.environment import (
    complete_environment,
    is_rank,
    is_rank_zero,
    local_devices,
    rank_name,
    refuse_oversubscription,
)

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of every launcher before a test, and restore them after it."""
    for name in [
        *SLURM,
        "SLURM_NTASKS",
        "MEGABASE_MEETING_FILE",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "GROUP_RANK",
    ]:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_launcher_is_not_a_rank_but_acts_as_rank_0() -> None:
    assert not is_rank() and is_rank_zero() and rank_name() is None


def test_a_task_of_a_slurm_step_gets_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    assert is_rank() and not is_rank_zero() and rank_name() == "3"
    complete_environment(2, 2)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "1"]


def test_a_shell_of_salloc_is_not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    assert not is_rank()


def test_ranks_need_a_master_address_and_the_configured_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2"})
    assert is_rank() and is_rank_zero()
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT not set"):
        complete_environment(1, 2)
    set_all(monkeypatch, {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    complete_environment(1, 2)
    with pytest.raises(UserError, match=r"2 ranks were started, but .* makes 6"):
        complete_environment(2, 3)


def test_devices_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (local_devices(None), local_devices(3)) == (1, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (local_devices(None), local_devices(2)) == (4, 2)
    with pytest.raises(UserError, match=r"trainer\.devices=5: this node has 4 GPUs"):
        local_devices(5)


def test_more_ranks_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGABASE_OVERSUBSCRIBE", raising=False)
    refuse_oversubscription(2, 2, "")
    with pytest.raises(
        UserError, match=r"trainer\.devices=3: this machine .* 1 CPU, one for each .*: take 1"
    ):
        refuse_oversubscription(3, 1, "take 1")
    monkeypatch.setenv("MEGABASE_OVERSUBSCRIBE", "1")
    refuse_oversubscription(3, 1, "")


def test_the_ranks_may_meet_by_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM | {"MEGABASE_MEETING_FILE": "/runs/meeting.json"})
    monkeypatch.delenv("MASTER_PORT")
    complete_environment(2, 2)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR not set"):
        complete_environment(2, 2)


def test_a_task_that_sees_one_gpu_takes_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((0, "1"), (1, "0"), (2, "1")):
        monkeypatch.delenv("RANK", raising=False)
        set_all(monkeypatch, SLURM)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        complete_environment(2, 2)
        assert os.environ["LOCAL_RANK"] == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_devices(2) == 2
