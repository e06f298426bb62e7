"""The contestants of `megabase bench model`: models of the same size, and one rank of several."""

from __future__ import annotations

import pytest

from megabase.models.reformer import Body
from megabase.pipeline import cli
from megabase.pipeline.bench import model_task
from megabase.pipeline.bench.contest import LeftOut


def test_the_models_of_all_contestants_have_about_as_many_parameters():
    task = model_task.ModelTask(
        dim=256, depth=6, heads=4, chunk=64, rounds=4, length=4096, dtype="fp32", device="cpu"
    )
    counts = model_task.count_parameters(task, list(model_task.CONTESTANTS))
    assert counts["ours"] == pytest.approx(4.6e6, rel=0.03)
    assert max(counts.values()) / min(counts.values()) < 1.1


def test_one_of_several_ranks_trains_on_its_part_of_the_sequence(monkeypatch):
    seen = []
    task = model_task.ModelTask(
        *(16, 2, 4, 8, 2),
        length=256,
        dtype="fp32",
        device="cpu",
        sequence_ranks=4,
    )
    run = Body.run

    def noted(body, tokens, call, **options):
        seen.append((tokens.shape[1], call.part.rank, call.part.size, call.part.length))
        return run(body, tokens, call, **options)

    monkeypatch.setattr(Body, "run", noted)
    for name in ("ours", "ours-ordinary"):
        task.prepare(name, 256, seed=0)()
    assert seen == [(64, 2, 4, 256)] * 2
    with pytest.raises(LeftOut, match="whole sequences only"):
        task.prepare("transformers", 256, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequence-ranks", "0"], "--sequence-ranks 0: must be above zero"),
        (["--sequence-ranks", "8"], "--heads 4 is not a multiple of --sequence-ranks 8"),
        (["--sequence-ranks", "4", "--lengths", "1k,4098"], "--lengths 4098 is not a multiple of"),
    ],
)
def test_ranks_that_cannot_share_a_sequence_are_refused(capsys, options, message):
    assert cli.main(["bench", "model", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
