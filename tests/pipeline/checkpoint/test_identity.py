"""Whether a checkpoint belongs to a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from megabase.pipeline.checkpoint.identity import changed_settings, check_same_run, manifest_of, saved_layout
from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.config.load import load
from megabase.pipeline.errors import UserError
from megabase.pipeline.zero.settings import SavedLayout


def settings(*changes: str) -> Manifest:
    """The manifest that a checkpoint of a small run would have."""
    run = load([], ["run.name=x", "data.shards=s", *changes])
    return manifest_of(run, 5, ranks=2, data="these bases", alphabet="dna")


def test_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    then = settings()
    free = [
        "optim.lr=1",
        "data.micro_batch=4",
        "model.loss_chunk=8",
        "data.shards=moved",
        "trainer.max_steps=9",
        "zero.stage=3",
    ]
    check_same_run(then, settings(*free), tmp_path)
    refused = {
        "model.dim=128": r"model\.dim: checkpoint 256, config 128",
        "data.length=64": r"data\.length: checkpoint 8192, config 64",
        "trainer.precision=bf16": r"trainer\.precision: checkpoint 32, now bf16",
        "run.seed=2": r"run\.seed: checkpoint 1, config 2",
        "run.init_from=other": r"run\.init_from: checkpoint null, config other",
    }
    for change, message in refused.items():
        with pytest.raises(UserError, match=message):
            check_same_run(then, settings(change), tmp_path)
    with pytest.raises(UserError, match=r"data\.length: .*; model\.dim: "):
        check_same_run(then, settings("model.dim=128", "data.length=64"), tmp_path)
    with pytest.raises(UserError, match="holds other records or splits"):
        check_same_run(then, replace(settings(), data="others"), tmp_path)
    check_same_run(then, replace(settings(), ranks=4), tmp_path)


def test_changed_settings_are_named_allowed_ones_too() -> None:
    then = settings()
    assert changed_settings(then, settings()) == []
    now = replace(
        settings("optim.lr=0.0005", "trainer.max_minutes=5", "slurm.time=60", "checkpoint.background=true"),
        ranks=4,
    )
    assert changed_settings(then, now) == [
        "checkpoint.background false -> true",
        "optim.lr 0.001 -> 0.0005",
        "slurm.time null -> 60",
        "trainer.max_minutes 0.0 -> 5.0",
        "ranks 2 -> 4",
    ]
    assert (
        changed_settings(then, settings("trainer.devices=2", "run.root=elsewhere")) == []
    )  # two ranks as before


def test_a_setting_newer_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    then = settings()
    del then.config["model.conv"]
    check_same_run(then, settings(), tmp_path)
    with pytest.raises(UserError, match=r"model\.conv: checkpoint 12, config 0"):
        check_same_run(then, settings("model.conv=0"), tmp_path)


def test_a_mixture_of_genomes_belongs_to_the_run(tmp_path: Path) -> None:
    then = settings("data.mixture={ecoli.fna.gz: 3, 'human*': 1}")
    check_same_run(then, settings("data.mixture={ecoli.fna.gz: 3, 'human*': 1}"), tmp_path)
    with pytest.raises(UserError, match=r"data\.mixture\.ecoli\.fna\.gz: checkpoint 3\.0, config 2"):
        check_same_run(then, settings("data.mixture={ecoli.fna.gz: 2, 'human*': 1}"), tmp_path)
    with pytest.raises(UserError, match=r"data\.mixture"):
        check_same_run(then, settings(), tmp_path)
    with pytest.raises(UserError, match=r"data\.mixture"):
        check_same_run(settings(), then, tmp_path)


def test_the_layout_of_a_checkpoint_follows_from_its_manifest() -> None:
    round_robin = "zero.deepspeed.zero_optimization.round_robin_gradients=true"
    assert saved_layout(settings("zero.stage=1", round_robin)) == SavedLayout(2, 1, "32", (True, None))
    assert saved_layout(settings()) == SavedLayout(2, 2, "32", (None, None))
