"""Profiles of hardware: those in configs/hardware, files of a user, and bad input."""

from pathlib import Path

import pytest

from megabase.pipeline.config.slurm import SlurmConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.plan.profiles import DIRECTORY, memory_of_node, names, profile_of_gpus, read_profile


def test_every_profile_can_be_read() -> None:
    assert names() == ["a100-40gb", "a100-80gb", "cpu", "h100", "h200"]
    for name in names():
        profile = read_profile(name)
        assert profile.name == name
        assert profile.memory_gib and profile.host_memory_gib
        assert set(profile.peak_tflops) == {"16", "32", "bf16"}


@pytest.mark.parametrize(
    ("gpus", "name"),
    [("any", "h100"), ("H100", "h100"), ("a100", "a100-80gb"), ("a100_40gb", "a100-40gb"), ("v100", None)],
)
def test_the_profile_of_what_slurm_calls_a_gpu(gpus: str, name: str | None) -> None:
    assert profile_of_gpus(gpus) == name


def test_a_file_of_a_user_is_a_profile(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text((DIRECTORY / "h100.yaml").read_text().replace("per_node: 8", "per_node: 4"))
    assert (read_profile(str(own)).per_node, read_profile(str(own)).name) == (4, "mine")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("per_nodes: 3", "unknown key 'per_nodes'; did you mean 'per_node'?"),
        ("achieved: {product: 0.1}", "unknown key 'achieved.product'; did you mean 'achieved.products'?"),
        ("per_node: many", "per_node: Value 'many' of type 'str' could not be converted to Integer"),
        ("memory_gb_s: 0", "memory_gb_s=0.0: must be above 0"),
        ("usable: 1.5", "usable=1.5: must be above 0 and at most 1"),
        ("device: tpu", "device='tpu': choose cpu or cuda"),
        ("device: cuda", "memory_gib and host_memory_gib must be given for device: cuda"),
        ("[1]", "must hold keys and values"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_profile_that_cannot_work_is_refused(tmp_path: Path, written: str, message: str) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(written if written.startswith(("[", "a", "device")) else f"device: cpu\n{written}")
    with pytest.raises(UserError) as refused:
        read_profile(str(own))
    assert str(own) in str(refused.value)
    assert message in str(refused.value)


def test_an_unknown_profile_names_the_closest() -> None:
    with pytest.raises(UserError, match="--hardware h1000: no such profile: did you mean h100"):
        read_profile("h1000")


@pytest.mark.parametrize(
    ("mem", "gib"), [("64G", 64.0), ("2048", 2.0), ("1TB", 1024.0), ("0", None), (None, None), ("much", None)]
)
def test_the_memory_that_a_job_requests(mem: str | None, gib: float | None) -> None:
    assert memory_of_node(SlurmConfig(mem=mem)) == gib
