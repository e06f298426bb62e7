"""Evaluation of a plain model in one process, without Lightning: the numbers of a training's own evaluation."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.config import DataConfig
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.models import Reformer, ReformerConfig, Seeds
from megabase.models.config import LocalConfig, LSHConfig
from megabase.models.pretrained import from_pretrained
from megabase.pipeline.config.schema import RunSettings
from megabase.pipeline.inference.export import export
from megabase.pipeline.inference.parts import part_names
from megabase.pipeline.inference.scoring import (
    Score,
    base_nats,
    bits,
    evaluate,
    measure_recall,
    score_batch,
    scorer,
)
from megabase.pipeline.rundir.journal import read
from tests.conftest import STEPS

CPU = torch.device("cpu")
LENGTH = 512


def windows(shards: Path, length: int = LENGTH, **more: object) -> SequenceDataModule:
    return SequenceDataModule(
        DataConfig(shards=str(shards), length=length, global_batch=8, micro_batch=2, **more),  # type: ignore[arg-type]
        seed=0,
    )


def small_model(vocab_size: int) -> Reformer:
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=vocab_size,
        dim=16,
        depth=2,
        heads=2,
        max_length=LENGTH,
        lsh=LSHConfig(rounds=2, chunk_length=16),
        local=LocalConfig(window=32),
    )
    return Reformer(config).eval()


@pytest.mark.slow
def test_it_is_the_mean_over_all_bases_of_the_split(lambda_shards: Path) -> None:
    data = windows(lambda_shards)
    model = small_model(data.index.alphabet.vocab_size)
    loader = data.some_validation(0)
    assert not isinstance(loader, list)
    result = evaluate(scorer(model, seed=3), loader, CPU)
    assert result is not None
    nats = bases = 0.0
    with torch.no_grad():
        for batch in loader:
            wide = batch.widened()
            nats += model.loss(wide.tokens, wide.labels, seeds=Seeds(run=3)).double().item()
            bases += (wide.labels != -100).sum().item()
    assert bases > 4000
    assert result == {
        "valid_loss": nats / bases,
        "valid_bits_per_base": bits(nats / bases),
        "valid_bases": int(bases),
    }


def test_it_stops_when_asked_and_reports_windows_that_could_not_be_read() -> None:
    def score(batch: int) -> Score:
        return Score(torch.tensor(6.0), torch.tensor(4.0), torch.tensor(float(batch)), torch.zeros(0, 2))

    batches: list = [0, 1, 2]
    answers = iter([False, False, True])
    assert evaluate(score, batches, CPU, stop=lambda: next(answers)) is None  # type: ignore[arg-type]
    result = evaluate(score, batches, CPU)  # type: ignore[arg-type]
    assert result is not None and result["valid_loss"] == 1.5 and result["valid_skipped"] == 3
    nothing = evaluate(lambda batch: Score(*torch.zeros(3), torch.zeros(0, 2)), batches, CPU)
    assert nothing is not None and math.isnan(nothing["valid_loss"])


def test_the_parts_of_windows_are_scored_apart(lambda_shards: Path) -> None:
    data = windows(lambda_shards)
    assert data.has_case
    model = small_model(data.index.alphabet.vocab_size)
    batches = []
    for number, batch in enumerate(data.some_validation(4)):
        assert batch.soft is not None
        batches.append(batch._replace(soft=torch.zeros_like(batch.soft)))
        if number == 0:
            batches[0].soft[0, 5:90] = 1
    names = part_names(LENGTH, cases=True)
    result = evaluate(scorer(model, seed=3), batches, CPU, parts=names)
    assert result is not None
    with torch.no_grad():
        nats = torch.cat([base_nats(model, batch.widened(), Seeds(run=3)) for batch in batches]).double()
    expected = {"from_0": nats[:, :16], "from_32": nats[:, 32:64], "lower_case": nats[0, 4:89]}
    for name, part in expected.items():
        assert result[f"valid_{name}_bits_per_base"] == pytest.approx(bits(float(part.mean())))
    # A part that has no base, or every base, is left out.
    upper = [batch._replace(soft=torch.zeros_like(batch.codes, dtype=torch.uint8)) for batch in batches]
    found = evaluate(scorer(model, seed=3), upper, CPU, parts=names)
    assert found is not None and not any("case" in key for key in found)


def test_recall_is_the_difference_that_the_source_makes(lambda_shards: Path) -> None:
    probe = windows(lambda_shards).recall_probe(5)
    assert probe is not None
    with_source, without = (list(batches) for batches in probe)

    def score(batch: Batch) -> Score:
        """Knows a copy when its source is there: one nat a base instead of two."""
        wide = batch.widened()
        labelled = (wide.labels != -100).sum()
        nats = 0
        for tokens, labels in zip(wide.tokens.tolist(), wide.labels.tolist(), strict=True):
            copy = [label for label in labels if label != -100]
            text, part = ",".join(map(str, tokens[: -len(copy)])), ",".join(map(str, copy[:-1]))
            nats += len(copy) * (1 if copy and part in text else 2)
        return Score(torch.tensor(float(nats)), labelled, torch.tensor(0.0), torch.zeros(0, 2))

    result = measure_recall(score, (with_source, without), CPU)
    assert result == pytest.approx({"valid_copy_bits_per_base": bits(1), "valid_recall_bits": bits(1)})
    assert measure_recall(score, (with_source, without), CPU, stop=lambda: True) is None
    assert measure_recall(score, ([], []), CPU) == {}
    assert windows(lambda_shards, length=128).recall_probe(5) is None


def test_soft_masked_letters_weigh_the_same_in_evaluation(lambda_shards: Path) -> None:
    data = windows(lambda_shards, softmask_weight=0.5)
    model = small_model(data.index.alphabet.vocab_size)
    batch = next(iter(data.some_validation(2)))
    assert score_batch(model, batch, 0).bases.item() == (batch.widened().labels != -100).sum().item()


def test_the_nats_of_single_bases_sum_to_the_loss(lambda_shards: Path) -> None:
    data = windows(lambda_shards)
    model = small_model(data.index.alphabet.vocab_size)
    model.head.chunk = 200  # the head sees a window in pieces
    wide = next(iter(data.some_validation(2))).widened()
    wide.labels[0, :100] = -100
    with torch.no_grad():
        nats = base_nats(model, wide, Seeds(run=3))
        expected = model.loss(wide.tokens, wide.labels, seeds=Seeds(run=3))
    assert nats.shape == wide.labels.shape and not nats[0, :100].any()
    assert nats.double().sum().item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        log_probs = model(wide.tokens, seeds=Seeds(run=3)).log_softmax(-1)
    assert nats[1, 300].item() == pytest.approx(-log_probs[1, 300, wide.labels[1, 300]].item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_an_exported_model_gives_the_numbers_of_the_run_it_comes_from(
    undisturbed: Path, lambda_shards: Path, tmp_path: Path
) -> None:
    export(undisturbed, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    model = from_pretrained(tmp_path / "out")
    rows = [row for row in read(undisturbed / "metrics.jsonl") if "valid_loss" in row]
    assert rows[-1]["step"] == STEPS
    loader = windows(lambda_shards).some_validation(0)
    assert not isinstance(loader, list)
    result = evaluate(scorer(model, seed=RunSettings.seed), loader, CPU)
    assert result is not None
    # The run's two ranks batch the windows differently, so sums are formed in another order.
    assert result["valid_loss"] == pytest.approx(rows[-1]["full_valid_loss"], rel=1e-6)
    assert result["valid_bases"] == rows[-1]["full_valid_bases"]


@pytest.mark.slow
def test_it_imports_no_lightning() -> None:
    program = (
        "import sys; import megabase.pipeline.inference.scoring\n"
        "assert not {'pytorch_lightning', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
