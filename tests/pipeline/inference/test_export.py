"""An export is the trained model, with its weights and losses; it is complete, or does not exist."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megabase.datamodules.datamodule import SequenceDataModule
from megabase.models import LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds, safetensors
from megabase.models.pretrained import from_pretrained
from megabase.pipeline import cli
from megabase.pipeline.checkpoint import choose as choose_module
from megabase.pipeline.checkpoint.choose import choose_to_read
from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.config.keys import flatten
from megabase.pipeline.config.load import load
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.inference import export as export_module
from megabase.pipeline.inference.export import export
from megabase.pipeline.rundir.journal import read
from tests.pipeline.checkpoints import sealed
from tests.pipeline.zero.test_states import groups_of, write_sharded

CONFIG = ReformerConfig(
    vocab_size=9, dim=12, depth=3, heads=2, max_length=64, lsh=LSHConfig(chunk_length=8), head_bias=True
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True, head_bias=False)
# The one kind of model that transformers has as well. Without hashing, because both libraries draw their own rotations.
MAPS = dataclasses.replace(
    CONFIG,
    layers=["local"],
    local=LocalConfig(window=8, attend="chunk"),
    positions="axial",
    conv=0,
    head_bias=False,
)


def write_checkpoint(
    run: Path,
    settings: ReformerConfig,
    step: int,
    *,
    stage: int = 2,
    ranks: int = 2,
    alphabet: str | None = "dna",
) -> Reformer:
    """Write a checkpoint of random weights as DeepSpeed's ranks would; returns the model with these weights."""
    torch.manual_seed(step)
    model = Reformer(settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    weights = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    trained = torch.nn.Module()
    trained.model = model
    path = run / "checkpoints" / f"step-{step}"
    write_sharded(path, stage, ranks, [{n: weights[n] for n in names} for names in groups_of(trained)])
    if settings.tie_embeddings:
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        file = path / "checkpoint" / f"{prefix}mp_rank_00_model_states.pt"
        shared = {"model.head.weight": "model.body.embedding.tokens.weight"}
        torch.save(torch.load(file) | {"shared_params": shared}, file)
    files = {
        found.relative_to(path).as_posix(): {
            "size": found.stat().st_size,
            "sha256": hashlib.sha256(found.read_bytes()).hexdigest(),
        }
        for found in path.rglob("*.pt")
    }
    manifest = Manifest(
        step=step,
        samples=step * 4,
        ranks=ranks,
        stage=stage,
        precision="32",
        config=flatten({"model": asdict(settings)}),
        data="",
        versions={"torch": "then"},
        files=files,
        alphabet=alphabet,
    )
    (path / "megabase.json").write_text(manifest.sealed())
    return model.eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 3, 5 and 10."""
    for step in (3, 5, 10):
        write_checkpoint(tmp_path / "run", CONFIG, step)
    return tmp_path / "run"


def damage(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step}" / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def logits(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens, **more)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("settings", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 3), (3, 2)])
def test_the_export_is_the_model(tmp_path: Path, settings: ReformerConfig, stage: int, ranks: int) -> None:
    model = write_checkpoint(tmp_path / "run", settings, 7, stage=stage, ranks=ranks)
    checkpoint = export(tmp_path / "run", tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    assert checkpoint.name == "step-7"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    loaded = from_pretrained(tmp_path / "out")
    assert loaded.body.config == settings
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert (loaded.head.weight is loaded.body.embedding.tokens.weight) == settings.tie_embeddings
    tokens = torch.randint(5, 9, (2, 40))
    assert torch.equal(logits(loaded, tokens, seeds=Seeds(3)), logits(model, tokens, seeds=Seeds(3)))
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (about["alphabet"], about["step"], about["samples"]) == ("dna", 7, 28)
    manifest = (checkpoint / "megabase.json").read_bytes()
    assert about["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()


def test_an_alphabet_that_was_not_recorded_is_null(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", CONFIG, 7, alphabet=None)
    export(tmp_path / "run", tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["alphabet"] is None


def test_the_formats_own_library_reads_it(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors.torch")
    model = write_checkpoint(tmp_path / "run", TIED, 7)
    export(tmp_path / "run", tmp_path / "out", form="safetensors", step=None, dtype="bf16")
    found = theirs.load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: weight.bfloat16() for name, weight in model.named_parameters()}
    assert found.keys() == expected.keys()  # tied weights once
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    theirs.save_file(found, tmp_path / "again.safetensors")
    assert all(
        torch.equal(weight, expected[name])
        for name, weight in safetensors.read(tmp_path / "again.safetensors").items()
    )


def test_the_newest_intact_checkpoint_is_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_to_read(run, None).name == "step-10"
    assert choose_to_read(run, 5).name == "step-5"
    damage(run, 10)
    assert choose_to_read(run, None).name == "step-5"
    messages = capsys.readouterr().err
    assert "step-10 is broken (checkpoint/zero_pp_rank_1" in messages
    with pytest.raises(UserError, match=r"step-10 is broken .*: use --step 5, which is intact"):
        choose_to_read(run, 10)
    damage(run, 5)
    with pytest.raises(UserError, match=r"step-10 is broken .*: use --step 3, which is intact"):
        choose_to_read(run, 10)
    damage(run, 3)
    with pytest.raises(UserError, match="no older one is intact"):
        choose_to_read(run, None)
    # Export renames nothing: only a run that resumes sets checkpoints aside.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-3", "step-5"]


def test_bad_arguments_of_export_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "aside" / "checkpoints" / "step-3.broken").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "running.partial").mkdir()
    new = str(tmp_path / "new")
    for arguments, message in (
        ([str(tmp_path / "nowhere"), new], "is not a run directory"),
        ([str(tmp_path), new], "is not a run directory"),
        ([str(tmp_path / "empty"), new], "has no checkpoint yet: train it first"),
        ([str(tmp_path / "aside"), new], "has no intact checkpoint, only step-3.broken"),
        ([str(run), new, "--step", "4"], "has no checkpoint of step 4: it has 3, 5, 10"),
        ([str(run), str(tmp_path / "there")], "there exists already: choose another OUT"),
        ([str(run), "."], "exists already: choose another OUT"),
        ([str(run), str(run / "checkpoints" / "model")], "is among the checkpoints of"),
        ([str(run), "/"], "/ exists already: choose another OUT"),
        ([str(run), str(tmp_path / "running")], "running.partial exists already: an export is writing it"),
        (
            [str(run), new, "--format", "huggingface"],
            "transformers' Reformer has no counterpart of model.positions=rotary",
        ),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["export", *arguments]) == 2
        messages = capsys.readouterr().err.splitlines()
        assert len(messages) == 1 and message in messages[0], messages
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("when", ["find_damage", "read_manifest", "source_of"])
def test_a_checkpoint_that_the_run_deletes_while_it_is_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the newest is deleted, the next one is used. If the requested one is deleted, it is an error of one line."""
    module = choose_module if when == "find_damage" else export_module
    before = getattr(module, when)

    def gone(path: Path, *more: Any) -> Any:
        if path.name == "step-10":
            shutil.rmtree(path, ignore_errors=True)
        return before(path, *more)

    monkeypatch.setattr(module, when, gone)
    shutil.copytree(run / "checkpoints", tmp_path / "kept")
    assert export(run, tmp_path / "out", form="safetensors", step=None, dtype="fp32").name == "step-5"
    shutil.copytree(tmp_path / "kept" / "step-10", run / "checkpoints" / "step-10", dirs_exist_ok=True)
    with pytest.raises(
        (RunError, UserError), match=r"step-10 was deleted by its run|has no checkpoint of step 10"
    ):
        export(run, tmp_path / "asked", form="safetensors", step=10, dtype="fp32")
    assert capsys.readouterr().err == "" and not list(tmp_path.glob("asked*"))


def test_a_checkpoint_of_another_model(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step-10" / "megabase.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["model.dim"] = 24
    path.write_text(sealed(manifest))
    with pytest.raises(RunError, match="not of the model that its manifest describes"):
        export(run, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megabase.models.safetensors.os.fsync", full)
    with pytest.raises(RunError, match="out cannot be written: No space left on device"):
        export(run, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    assert not list(tmp_path.glob("out*"))


def test_an_export_to_transformers_computes_the_same_logits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    model = write_checkpoint(tmp_path / "run", MAPS, 7, stage=3)
    export(tmp_path / "run", tmp_path / "out", form="huggingface", step=None, dtype="fp32")
    assert capfd.readouterr() == ("", "")  # no progress bars
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ACgtN")["input_ids"] == [1, 5, 6, 7, 8, 4] and tokenizer.model_max_length == 64
    theirs = transformers.ReformerModelWithLMHead.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(5, 9, (2, 64))
    assert torch.allclose(logits(theirs, tokens), logits(model, tokens), atol=1e-4)
    assert json.loads((tmp_path / "out" / "source.json").read_text())["step"] == 7


MEASURE = """
import sys
from pathlib import Path
from megabase.pipeline.inference.export import export
from megabase.pipeline.zero.states import Shards
from megabase.models.pretrained import from_pretrained

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

most = 0
read = Shards.read
def measured(*arguments):
    global most
    piece = read(*arguments)
    most = max(most, anonymous())
    return piece

Shards.read = measured
root = Path(sys.argv[1])
export(root / "small", root / "warm", form="safetensors", step=None, dtype="fp32")
before, most = anonymous(), 0
export(root / "large", root / "out", form="safetensors", step=None, dtype="fp32")
during = most - before
before = anonymous()
model = from_pretrained(root / "out")
print(during, anonymous() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Counts memory that is not mapped from files: the kernel can drop pages of the checkpoint at any time."""
    write_checkpoint(tmp_path / "small", CONFIG, 1)
    large = dataclasses.replace(CONFIG, dim=256, depth=24)
    model = write_checkpoint(tmp_path / "large", large, 1, stage=3)
    size = sum(4 * weight.numel() for weight in model.parameters())
    assert size > 60e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    during, loaded = map(int, done.stdout.split())
    assert loaded > 0.8 * size  # the measure counts a model in memory
    assert during < size / 6


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loss_of_an_export_is_that_of_the_journal(undisturbed: Path, tmp_path: Path) -> None:
    export(undisturbed, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    model = from_pretrained(tmp_path / "out")
    trained = load([undisturbed / "config.yaml"])
    nats = bases = 0.0
    for batch in SequenceDataModule(trained.data, trained.run.seed).some_validation(0):
        wide = batch.widened()
        with torch.no_grad():
            nats += float(model.loss(wide.tokens, wide.labels, seeds=Seeds(run=trained.run.seed)))
        bases += int((wide.labels != -100).sum())
    row = [row for row in read(undisturbed / "metrics.jsonl") if "valid_loss" in row][-1]
    assert row["step"] == json.loads((tmp_path / "out" / "config.json").read_text())["step"]
    assert bases == row["full_valid_bases"]
    assert nats / bases == pytest.approx(row["full_valid_loss"], rel=1e-6)
