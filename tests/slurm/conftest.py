"""One test cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest

from megabase.slurm.testcluster.cluster import TestCluster, unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    if reason := unavailable():
        pytest.skip(f"no SLURM: {reason}")
    with TestCluster(tmp_path_factory.mktemp("cluster"), nodes=4) as running:
        yield running
