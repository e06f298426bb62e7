"""Which kernel `auto` chooses, and what a backend that cannot run raises."""

import pytest
import torch

from megabase.models.attention.kernels import dispatch, native
from megabase.models.config import ConfigError


def test_auto_chooses_the_fastest_kernel_that_can_run():
    def choice(dtype: torch.dtype, d: int = 64, backend: str = "auto") -> str:
        x = torch.empty(1, 1, 1, d, dtype=dtype)
        return dispatch.choose_backend(x, x, backend)

    fused = "native" if native.available() else "chunked"
    assert [choice(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [fused] * 3
    assert choice(torch.float64) == "chunked"
    for backend in ("native", "triton"):
        with pytest.raises(
            ConfigError, match=f"'{backend}' cannot run here, with torch.float64 of width 64 on cpu"
        ):
            choice(torch.float64, backend=backend)
