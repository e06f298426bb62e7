"""A peer that is missing is left out."""

from __future__ import annotations

import pytest

from megabase.pipeline.bench import peers
from megabase.pipeline.bench.contest import LeftOut


@pytest.mark.parametrize("module", peers.MODULES)
def test_a_peer_that_is_missing_says_how_to_install_it(module, monkeypatch):
    def missing(package: str) -> str:
        raise peers.PackageNotFoundError(package)

    monkeypatch.setattr(peers, "version", missing)
    with pytest.raises(LeftOut, match=r"not installed \(pip install [a-z-]+\)"):
        peers.load(module)
