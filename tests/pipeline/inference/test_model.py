"""Loading a model from a run directory or an export, with the settings that using it needs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megabase.models.config import ConfigError
from megabase.pipeline import cli
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.export import export
from megabase.pipeline.inference.model import best_step, load_model
from tests.pipeline.inference.test_export import CONFIG, damage, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 3, 5 and 10; the best is that of step 5."""
    for step in (3, 5, 10):
        write_checkpoint(tmp_path / "run", CONFIG, step)
    rows = [{"step": step, "valid_loss": loss} for step, loss in ((3, 1.3), (4, 1.0), (5, 1.1), (10, 1.2))]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def test_a_run_and_its_export_are_the_same_model(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", form="safetensors", step=5, dtype="fp32")
    ours, theirs = load_model(run, 5), load_model(tmp_path / "out")
    assert ours.config == theirs.config and ours.alphabet is theirs.alphabet
    assert ours.alphabet.name == "dna" and ours.config.model == CONFIG
    assert (ours.source.step, ours.source.checkpoint) == (5, theirs.source.checkpoint)
    expected = theirs.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.model.state_dict().items())
    assert not ours.model.training


def test_the_newest_intact_or_the_best_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_model(run).source.step == 10
    assert load_model(run, "best").source.step == 5 == best_step(run)
    damage(run, 10)
    assert load_model(run).source.step == 5
    message = capsys.readouterr().err
    assert "step-10 is broken" in message and "trying the one before" in message
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"--best: no checkpoint of .* has a validation loss"):
        load_model(run, "best")


def test_the_best_checkpoint_is_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, flags in enumerate((["--best"], ["--step", "best"], ["--step", "5"])):
        out = tmp_path / f"out-{number}"
        assert cli.main(["export", str(run), str(out), *flags]) == 0
        assert json.loads((out / "config.json").read_text())["step"] == 5
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--step", "last"]) == 2
    assert "--step last: give the step of a checkpoint, or best" in capsys.readouterr().err


def test_settings_of_the_run_are_kept_and_may_be_replaced(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", form="safetensors", step=None, dtype="bf16")
    about = tmp_path / "out" / "config.json"
    settings = {"run.seed": 9, "data.length": 48, "data.shards": "here", "data.min_real": 0.25}
    about.write_text(json.dumps(json.loads(about.read_text()) | {"settings": settings}))
    loaded = load_model(tmp_path / "out", settings=["data.length=32", "model.lsh.rounds=1"])
    config = loaded.config
    assert (config.run.seed, config.data.length, config.data.min_real) == (9, 32, 0.25)
    assert config.data.shards == "here" and config.data.objective == "causal"
    assert loaded.model.body.config == dataclasses.replace(
        CONFIG, lsh=dataclasses.replace(CONFIG.lsh, rounds=1)
    )
    assert next(loaded.model.parameters()).dtype == torch.float32
    with pytest.raises(ConfigError, match=r"a setting under model changes the weight .*: leave that setting"):
        load_model(tmp_path / "out", settings=["model.dim=24"])
    with pytest.raises(UserError, match="unknown key"):
        load_model(tmp_path / "out", settings=["data.lenth=32"])


def test_an_export_of_an_older_version(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    about = tmp_path / "out" / "config.json"
    content = json.loads(about.read_text())
    del content["settings"]
    about.write_text(json.dumps(content | {"alphabet": None}))
    loaded = load_model(tmp_path / "out")
    assert loaded.alphabet.name == "dna" and loaded.config.data.length == CONFIG.max_length
    assert loaded.config.data.shards == ""


def test_what_is_no_model(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no model: give a run directory"):
            load_model(path)
    export(run, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    with pytest.raises(UserError, match=r"--step 3: .* is an export"):
        load_model(tmp_path / "out", 3)
    with pytest.raises(UserError, match="has no checkpoint of step 4: it has 3, 5, 10"):
        load_model(run, 4)


@pytest.mark.slow
def test_it_imports_neither_lightning_nor_deepspeed() -> None:
    program = (
        "import sys; import megabase.pipeline.inference.model\n"
        "assert not {'pytorch_lightning', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
