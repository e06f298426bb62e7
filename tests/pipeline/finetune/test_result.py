"""The result of a fine-tuning belongs to its best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from megabase.pipeline.finetune.result import read_result
from megabase.pipeline.rundir.paths import RunPaths


def test_a_result_of_an_earlier_checkpoint_is_written_anew(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert read_result(tmp_path) is None
    paths.result.write_text(json.dumps({"step": 2}))
    (paths.checkpoints / "step-2").mkdir(parents=True)
    paths.metrics.write_text('{"step": 2, "valid_loss": 0.7}\n')
    assert read_result(tmp_path) == {"step": 2}
    # The same call with a larger trainer.max_steps trains further.
    (paths.checkpoints / "step-4").mkdir()
    paths.metrics.write_text('{"step": 2, "valid_loss": 0.7}\n{"step": 4, "valid_loss": 0.6}\n')
    assert read_result(tmp_path) is None
