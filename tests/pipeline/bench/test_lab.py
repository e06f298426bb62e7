"""What becomes of an error of a contestant, and how memory is limited."""

from __future__ import annotations

import pytest

from megabase.pipeline.bench import attention_task, contest, lab
from megabase.pipeline.bench.contest import LeftOut, Reason

MIB = 2**20


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), contest.out_of_memory()),
        (RuntimeError("[enforce] DefaultCPUAllocator: not enough memory: you"), contest.out_of_memory()),
        (ValueError("so\nmuch"), Reason("failed: ValueError: so", failed=True)),
        (LeftOut("such"), Reason("such")),
    ],
)
def test_every_error_becomes_a_reason(error, reason):
    with pytest.raises(LeftOut) as caught, lab.reasons():
        raise error
    assert caught.value.reason == reason


@pytest.mark.slow
def test_a_process_that_needs_too_much_memory_is_stopped_by_the_allocator(monkeypatch):
    monkeypatch.setattr(lab.CpuLab, "free_bytes", lambda self: 50 * MIB)
    task = attention_task.AttentionTask(heads=4, head_dim=64, chunk=64, rounds=4, dtype="fp32", device="cpu")
    with pytest.raises(LeftOut) as caught:
        lab.CpuLab(task).probe("reformer-pytorch", 4096, 60.0)
    assert caught.value.reason == contest.out_of_memory()
