"""GPUs, kernels and limits: as they are here, and broken one by one."""

from pathlib import Path

import pytest
import torch

from megabase.models.attention.kernels import native
from megabase.pipeline.doctor import device
from megabase.pipeline.doctor.device import check_device, check_kernel, check_limits
from megabase.pipeline.doctor.finding import NOTE, OK, WRONG
from megabase.pipeline.hardware import Machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "state", "text"),
    [
        (Machine(4, 0), NOTE, "none: a training here runs on 4 CPUs"),
        (Machine(4, 0, has_driver=True), WRONG, "there is an NVIDIA driver, but torch"),
        (Machine(4, 0, has_driver=True, hidden=True), NOTE, "CUDA_VISIBLE_DEVICES is empty"),
    ],
)
def test_machines_without_gpus(machine: Machine, state: str, text: str) -> None:
    [found] = check_device(machine)
    assert found.state == state and found.text.startswith(text)
    assert bool(found.way_out) == (state == WRONG or machine.hidden)


def test_the_kernel_of_this_machine() -> None:
    found = check_kernel(CPU)
    assert found.state == (OK if native.available() else WRONG), found


def test_a_kernel_that_cannot_be_built_or_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = device.lsh_attention

    def off(*tensors: torch.Tensor, backend: str, **settings: object) -> torch.Tensor:
        return original(*tensors, backend=backend, **settings) + 0.1 * (backend != "reference")  # type: ignore[arg-type]

    if native.available():
        monkeypatch.setattr(device, "lsh_attention", off)
        found = check_kernel(CPU)
        assert found.state == WRONG and found.text.startswith("native differs from the reference by 0.1")

    def fails(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(device, "lsh_attention", fails)
    monkeypatch.setattr(device, "choose_backend", lambda *_: "native")
    assert check_kernel(CPU).text == "it fails: RuntimeError: no kernel image"
    monkeypatch.setattr(device, "choose_backend", lambda *_: "chunked")
    found = check_kernel(CPU)
    assert (found.state, found.way_out) == (WRONG, "install g++")


def test_limits(tmp_path: Path) -> None:
    assert [each.state for each in check_limits(1 << 20, tmp_path, 0)] == [OK]
    few, small = check_limits(1024, tmp_path, 1 << 60)
    assert (
        few.state == NOTE
        and few.text == "at most 1,024 for each process"
        and few.way_out.startswith("ulimit -n")
    )
    assert small.state == WRONG and "--shm-size" in small.way_out
    assert [each.state for each in check_limits(-1, tmp_path / "none")] == [
        OK
    ]  # no limit, no such file system
