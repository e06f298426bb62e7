"""Host memory that is mapped from files. Runs with it are in test_resume.py."""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megabase.pipeline.config.schema import ZeroConfig
from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.zero.offload import _copy_in_file, _zeros_in_file, map_from_files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_tensor_equals_the_original(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7).to(dtype)
    held = _copy_in_file(tmp_path, tensor)
    assert torch.equal(held, tensor) and held.dtype == dtype
    held[2, 3] = 9
    assert held[2, 3] == 9 and tensor[2, 3] != 9
    # Its file is unlinked, and is freed with the tensor.
    assert not list(tmp_path.iterdir()) and f"{tmp_path}/megabase-" in Path("/proc/self/maps").read_text()
    del held
    gc.collect()
    assert f"{tmp_path}/megabase-" not in Path("/proc/self/maps").read_text()


def test_an_empty_tensor_needs_no_file(tmp_path: Path) -> None:
    assert _zeros_in_file(tmp_path, torch.empty(0)).shape == (0,)


def test_a_full_disk_is_an_error_on_all_ranks_and_leaves_no_file(tmp_path: Path, ranks: Group) -> None:
    weights = torch.empty(1 << 50, device="meta")  # 4 PiB
    optimizer = SimpleNamespace(fp32_partitioned_groups_flat=[weights])
    with pytest.raises(RunError) as caught:
        map_from_files(
            SimpleNamespace(optimizer=optimizer), ZeroConfig(offload="nvme", nvme_path=str(tmp_path))
        )
    message = str(caught.value)
    assert f"rank 0: zero.nvme_path={tmp_path} cannot hold what is offloaded: " in message
    assert "4,096.0 TiB were requested at once" in message
    assert not list(tmp_path.iterdir())
