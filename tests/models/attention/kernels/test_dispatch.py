"""Which kernel `auto` chooses, and what a backend that cannot run raises."""

from types import SimpleNamespace

import pytest
import torch

from megabase.models.attention.kernels import dispatch, native
from megabase.models.config import ConfigError
from tests.models.attention.kernels.cases import random_case


def test_auto_chooses_the_fastest_kernel_that_can_run():
    def choice(dtype: torch.dtype, d: int = 64, backend: str = "auto") -> str:
        x = torch.empty(1, 1, 1, d, dtype=dtype)
        return dispatch.choose_backend(x, x, backend)

    fused = "native" if native.available() else "chunked"
    assert [choice(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [fused] * 3
    assert choice(torch.float64) == "chunked"
    for backend in ("native", "triton", "triton-together"):
        with pytest.raises(
            ConfigError, match=f"'{backend}' cannot run here, with torch.float64 of width 64 on cpu"
        ):
            choice(torch.float64, backend=backend)


def test_the_environment_names_the_backend_of_gpus(monkeypatch):
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 1, 1, 64))
    monkeypatch.setattr(dispatch, "FAST", dict.fromkeys(dispatch.FAST, lambda q, v: True))
    assert dispatch.choose_backend(x, x) == "triton"
    for name in ("triton-together", "triton"):
        monkeypatch.setenv("MEGABASE_GPU_BACKEND", name)
        assert dispatch.choose_backend(x, x) == name
    monkeypatch.setenv("MEGABASE_GPU_BACKEND", "second")
    with pytest.raises(
        ConfigError, match="MEGABASE_GPU_BACKEND=second: choose one of triton, triton-together"
    ):
        dispatch.choose_backend(x, x)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_queries_of_the_last_positions_get_what_they_get_among_all(backend):
    """`auto` is the native kernel where there is a compiler: with long sequences, several strips have no query."""
    for seed in range(40):
        length = 700 if seed % 4 == 0 and backend == "auto" else None
        tensors, order, rule, dropout = random_case(seed, length)
        q, k, v = (x.detach().float()[None] for x in tensors)
        whole = dispatch.sorted_attention(q, k, v, order, rule, dropout, backend=backend)
        for n in {1, q.shape[2] // 3 + 1, q.shape[2]}:
            found = dispatch.sorted_attention(q[:, :, -n:], k, v, order, rule, dropout, backend=backend)
            torch.testing.assert_close(found, whole[:, :, -n:], atol=2e-5, rtol=0)
