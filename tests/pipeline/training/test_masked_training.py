"""Real trainings on masked bases, with the layers that attend to both sides."""

from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.scoring import bits
from megabase.pipeline.rundir.journal import read
from megabase.pipeline.training.check import check
from tests.conftest import train_settings, training_rows

MASKED = [
    "data.objective=masked",
    "data.mask_rate=0.2",
    "model.causal=false",
    "model.layers=[performer,linformer]",
    "model.performer.features=16",
    "model.performer.redraw_every=3",
    "model.linformer.size=16",
    "model.max_length=512",
    "trainer.max_steps=6",
    "trainer.eval_every_steps=6",
    "tracking.enabled=false",
]


def test_objective_and_model_must_agree(lambda_shards: Path, tmp_path: Path) -> None:
    settings = load([], train_settings(lambda_shards, tmp_path, "x", *MASKED))
    check(settings, 2)
    settings.model.causal = True
    settings.model.layers = ["performer"]
    with pytest.raises(UserError, match=r"set model\.causal=false, or data\.objective=causal"):
        check(settings, 2)
    settings.data.objective = "causal"
    check(settings, 2)


@pytest.mark.distributed
@pytest.mark.slow
def test_one_rank_and_two_under_zero_3_train_the_same(lambda_shards: Path, tmp_path: Path, start_job) -> None:
    evaluations, losses = [], []
    for ranks, micro_batch, stage in ((2, 2, 3), (1, 8, 2)):
        more = [*MASKED, f"trainer.devices={ranks}", f"data.micro_batch={micro_batch}", f"zero.stage={stage}"]
        code, output = start_job(
            "train", *train_settings(lambda_shards, tmp_path, f"of-{ranks}", *more)
        ).wait()
        assert code == 0, output
        losses.append([row["loss"] for row in training_rows(tmp_path / f"of-{ranks}")])
        rows = [row for row in read(tmp_path / f"of-{ranks}" / "metrics.jsonl") if "valid_loss" in row]
        assert len(rows) == 1
        evaluations.append(rows[0])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    one, other = evaluations
    assert one["full_valid_bases"] == other["full_valid_bases"] == 4850 // 512 * round(0.2 * 512)
    assert one["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-4)
    assert one["valid_bits_per_base"] == bits(one["valid_loss"])
    # Recall of masked bases.
    assert one["valid_copy_bits_per_base"] == pytest.approx(other["valid_copy_bits_per_base"], rel=1e-4)
    assert one["valid_recall_bits"] == pytest.approx(other["valid_recall_bits"], abs=1e-3)
