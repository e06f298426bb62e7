"""A fine-tuned model is loaded from the files of its ranks, and predicts what it predicted when it was saved."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pyarrow import parquet

from megabase.datamodules.batches.numbered import Place
from megabase.models import Seeds
from megabase.models.reformer import Body
from megabase.pipeline import cli
from megabase.pipeline.checkpoint.damage import checksum
from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.config.keys import flatten
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.finetune import base, baseline, metrics
from megabase.pipeline.finetune.batches import EvalExamples
from megabase.pipeline.finetune.examples import Examples, Problem
from megabase.pipeline.finetune.metrics import metrics_of
from megabase.pipeline.finetune.model import FULL, LORA, MODES, PROBE, FineTuned, Method, prepared
from megabase.pipeline.finetune.predict import load_finetuned, unlabelled
from megabase.pipeline.finetune.result import as_tables, write_result
from megabase.pipeline.finetune.settings import Pretrained, settings_of
from megabase.pipeline.finetune.task import Finetuning, Work
from megabase.pipeline.inference.model import load_model
from megabase.pipeline.training.task import Trial
from tests.pipeline.finetune.conftest import CONFIG, random_rows
from tests.pipeline.zero.test_states import groups_of, write_sharded

SPLITS = ["train"] * 40 + ["valid"] * 6 + ["test"] * 14


def examples_of(problem: Problem) -> Examples:
    rows = random_rows(60)
    labels: Any = np.array([float(label == "gc") for _, label in rows])
    if problem.per_base:
        labels = [np.array([float(letter in "GC") for letter in letters]) for letters, _ in rows]
    sequences = [letters.encode() for letters, _ in rows]
    return Examples(problem, [f"row {number}" for number in range(60)], sequences, labels, SPLITS)


def finished(
    run: Path, exported: Path, mode: str, problem: Problem, stage: int = 2
) -> tuple[Finetuning, FineTuned]:
    """A run directory with one checkpoint of two ranks, as a training leaves it; and the model in it."""
    model, method, examples = (
        Pretrained(exported, CONFIG, "dna", 128),
        Method(mode, rank=4),
        examples_of(problem),
    )
    config = settings_of(model, run / "t.csv", run, mode, examples, ["tracking.enabled=false"], 1)
    task = Finetuning(config, Work(model, None, examples, method))
    run.mkdir(parents=True)
    base.copy(exported, None, run)
    task.describe_data()
    torch.manual_seed(5)
    pretrained = base.load_body(run, CONFIG)
    body = cast(Body, prepared(pretrained, method, 1)) if mode != FULL else pretrained
    tuned = FineTuned(body, problem, method).eval()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    trained = torch.nn.Module()
    trained.model = tuned
    weights = {f"model.{name}": weight.detach() for name, weight in tuned.named_parameters()}
    path = run / "checkpoints" / "step-3"
    write_sharded(path, stage, 2, [{name: weights[name] for name in names} for names in groups_of(trained)])
    manifest = Manifest(
        step=3,
        samples=12,
        ranks=2,
        stage=stage,
        precision="32",
        config=flatten({"model": asdict(CONFIG), "run": {"seed": 1}}),
        data="",
        versions={},
        files={
            found.relative_to(path).as_posix(): {"size": found.stat().st_size, "sha256": checksum(found)}
            for found in path.rglob("*.pt")
        },
        alphabet="dna",
    )
    (path / "megabase.json").write_text(manifest.sealed())
    return task, tuned


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if mode == LORA else ()) for mode in MODES]
)
def test_the_loaded_model_is_the_trained_one(tmp_path: Path, exported: Path, mode: str, stage: int) -> None:
    task, tuned = finished(tmp_path / "run", exported, mode, Problem(("at", "gc")), stage)
    loaded = load_finetuned(tmp_path / "run")
    assert (loaded.step, loaded.alphabet.name, loaded.problem) == (3, "dna", Problem(("at", "gc")))
    for name, weight in tuned.named_parameters():
        assert torch.equal(dict(loaded.model.named_parameters())[name], weight), name
    chosen = task.work.examples.of("test")
    found = loaded.predict(task.work.examples, chosen)
    (batch,) = EvalExamples(task.data.encoder, Place(0, 1, 14), chosen)
    wanted = tuned.predict(batch.codes, batch.lengths, Seeds(run=1))
    np.testing.assert_allclose(np.stack(found), wanted.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "problem", [Problem(("at", "gc")), Problem((), mean=0.5, scale=0.5), Problem(("w", "s"), True)]
)
def test_the_result_of_every_problem(
    tmp_path: Path, exported: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 50)
    monkeypatch.setattr(baseline, "STRENGTHS", (1.0,))
    monkeypatch.setattr(baseline, "WIDTHS", (7,))
    monkeypatch.setitem(baseline.SIZES, "dna", (2,))
    run = tmp_path / "run"
    task, _ = finished(run, exported, PROBE, problem)
    result = write_result(task.config, task.work)
    assert json.loads((run / "result.json").read_text()) == result
    assert (result["step"], result["splits"]) == (3, {"train": 40, "valid": 6, "test": 14})
    assert list(result["metrics"]) == list(result["baseline"]["metrics"]) == list(metrics_of(problem))
    first = next(iter(result["metrics"].values()))
    assert first["low"] <= first["value"] <= first["high"]
    rows = parquet.read_table(run / "predictions.parquet").to_pylist()
    assert [row["example"] for row in rows] == [f"row {number}" for number in range(46, 60)]
    if problem.per_base:
        labels = [label for row in rows for label in row["label"]]
        found = [each for row in rows for each in row["prediction"]]
        assert len(found) == sum(map(len, task.work.examples.sequences[46:]))
    else:
        labels, found = [row["label"] for row in rows], [row["prediction"] for row in rows]
    if problem.classes:
        right = np.mean([a == b for a, b in zip(labels, found, strict=True)])
        assert right == pytest.approx(result["metrics"]["accuracy"]["value"])
    else:
        assert np.corrcoef(labels, found)[0, 1] == pytest.approx(result["metrics"]["pearson"]["value"])
    assert f"{problem.name}, probe of {exported}" in str(as_tables(result)[0])


def test_predictions_of_a_table_and_of_fasta(
    tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.parquet"
    finished(run, exported, PROBE, Problem(("at", "gc")))
    rows = random_rows(5)
    (tmp_path / "new.tsv").write_text("dna\n" + "".join(f"{letters}\n" for letters, _ in rows))
    (tmp_path / "new.fa").write_text("".join(f">s{n} x\n{letters}\n" for n, (letters, _) in enumerate(rows)))
    tables = []
    for name in ("new.tsv", "new.fa"):
        words = ["finetune", str(run), str(tmp_path / name), "-o", str(out), "--predict", "--sequence", "dna"]
        assert cli.main(words) == 0
        assert f"5 predictions of {run} (step 3)" in capsys.readouterr().out
        tables.append(parquet.read_table(out).to_pylist())
    assert [row["example"] for row in tables[0]] == [f"row {n}" for n in range(1, 6)]
    assert [row["example"] for row in tables[1]] == [f"s{n}" for n in range(5)]
    assert [row["p_at"] for row in tables[0]] == [row["p_at"] for row in tables[1]]


def test_validation_is_the_mean_over_its_examples(tmp_path: Path, exported: Path) -> None:
    task, tuned = finished(tmp_path / "run", exported, PROBE, Problem(("at", "gc")))
    task.config.data.micro_batch = 4  # the last batch has filler

    def score(batch: Any) -> dict[str, torch.Tensor]:
        sums = tuned.loss(tuned(batch.codes, batch.lengths, Seeds(run=1)), batch.labels)
        return dict(zip(("loss", "count", "correct"), sums, strict=True))

    found = task.measure(Trial(score, lambda: False, torch.device("cpu"), None), 1)
    assert found is not None and found[1] is None
    loaded = load_finetuned(tmp_path / "run")
    chosen = task.work.examples.of("valid")
    labels = np.asarray(task.work.examples.labels)[chosen].astype(int)
    probabilities = np.stack(loaded.predict(task.work.examples, chosen))
    assert found[0]["valid_examples"] == 6
    assert found[0]["valid_loss"] == pytest.approx(-np.log(probabilities[range(6), labels]).mean(), rel=1e-4)
    assert found[0]["valid_accuracy"] == np.mean(probabilities.argmax(axis=1) == labels)
    assert task.measure(Trial(score, lambda: True, torch.device("cpu"), None), 1) is None


def test_what_cannot_be_used_is_refused(tmp_path: Path, exported: Path) -> None:
    run = tmp_path / "run"
    finished(run, exported, PROBE, Problem(("at", "gc")))
    with pytest.raises(UserError, match=r"which predicts labels: use `megabase finetune .* --predict`"):
        load_model(run)
    loaded = load_finetuned(run)
    loaded.model.body.config = dataclasses.replace(CONFIG, positions="learned", max_length=9)
    with pytest.raises(UserError, match=r"row 1: 10 letters, but .* reads 8 at most"):
        loaded.predict(unlabelled(["row 1"], [b"ACGTACGTAC"], loaded.problem), np.array([0]))
    record = json.loads((run / "finetune.json").read_text())
    record["method"]["mode"] = FULL
    (run / "finetune.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"is not of the model that finetune.json describes: body\."):
        load_finetuned(run)
    (run / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="the pretrained weights of this run, is gone: put it back"):
        base.load_body(run, CONFIG)
