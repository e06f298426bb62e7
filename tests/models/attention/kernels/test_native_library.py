"""Compiling the C++ kernel: what happens without a compiler, with a broken one, and without a cache."""

from collections.abc import Iterator

import pytest
import torch

from megabase.models.attention import lsh_attention
from megabase.models.attention.kernels import dispatch, native
from megabase.models.attention.kernels.native_library import load_library
from megabase.models.config import ConfigError
from tests.models.attention.kernels.cases import needs_native


@pytest.fixture
def unbuilt() -> Iterator[None]:
    """As in a process in which attention has not run yet."""
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def test_without_a_compiler_the_chunked_kernel_runs_with_a_warning(monkeypatch, unbuilt):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler.*Install g\+\+, or set CXX"):
        qk = torch.randn(1, 2, 40, 8)
        assert dispatch.choose_backend(qk, qk) == "chunked"
    with pytest.raises(ConfigError, match=r"backend='native' cannot run here.*chunked"):
        lsh_attention(qk, qk, rounds=1, chunk_length=8, causal=True, seed=0, backend="native")


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path, unbuilt):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'cannot find -lstdc++' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MEGABASE_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="cannot find -lstdc"):
        assert not native.available()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
@needs_native
def test_a_cache_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path, unbuilt):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGABASE_CACHE", str(tmp_path / "file" / "cache"))
    assert native.available()
