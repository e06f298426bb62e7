"""The work of `megabase bench data`: what a call reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabase.pipeline.bench import data_task, readers
from megabase.pipeline.bench.contest import LeftOut
from megabase.pipeline.bench.data_task import DataTask

MIB = 1 << 20


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> readers.Records:
    return DataTask(tmp_path_factory.mktemp("records"), MIB).records(8192)


def test_the_middle_is_between_two_batches():
    for length in (1, 1000, 8192, 65536, 100_000):
        records = DataTask(Path(), 4 * MIB).records(length)
        assert records.count % (2 * records.micro_batch) == 0
        assert records.count > 0
        assert data_task.BATCH_TOKENS <= records.micro_batch * length < data_task.BATCH_TOKENS + length
        assert records.bases <= 4 * MIB


def test_reading_another_number_of_bases_is_a_failure():
    assert list(data_task.read(iter([4, 4, 4]), 8)) == [4]
    for handed_over in ([4], [4, 5], []):
        with pytest.raises(LeftOut) as caught:
            data_task.read(iter(handed_over), 8)
        assert caught.value.reason.failed
