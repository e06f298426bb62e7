"""The contestants of `megabase bench model` have models of the same size."""

from __future__ import annotations

import pytest

from megabase.pipeline.bench import model_task


def test_the_models_of_all_contestants_have_about_as_many_parameters():
    task = model_task.ModelTask(
        dim=256, depth=6, heads=4, chunk=64, rounds=4, length=4096, dtype="fp32", device="cpu"
    )
    counts = model_task.count_parameters(task, list(model_task.CONTESTANTS))
    assert counts["ours"] == pytest.approx(4.6e6, rel=0.03)
    assert max(counts.values()) / min(counts.values()) < 1.1
