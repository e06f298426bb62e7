"""The scripts in examples/ run and print what their docstrings say."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from megabase.models import Reformer, ReformerConfig
from megabase.models.pretrained import CONFIG, WEIGHTS
from megabase.pipeline import cli
from megabase.pipeline.rundir.journal import read

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script: str, *arguments: str) -> list[str]:
    """The lines that an example prints."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An export of an untrained model."""
    config = ReformerConfig(vocab_size=9, dim=32, depth=2, heads=2)
    torch.manual_seed(1)
    save_file(Reformer(config).state_dict(), tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"model": asdict(config)}))
    return tmp_path


@pytest.mark.slow
def test_score_and_generate(exported: Path) -> None:
    lines = run("score_and_generate.py", str(exported))
    scores = [float(re.findall(r"\d\.\d{3}", line)[0]) for line in lines[1:5]]
    assert all(1.5 < score < 4 for score in scores)  # log2 of 9 tokens is 3.17
    sequences = [line.split()[1] for line in lines if line.startswith("generated")]
    assert len(set(sequences)) == 2
    assert all(re.fullmatch("[ACGT]{60}", sequence) for sequence in sequences)


@pytest.mark.slow
def test_the_commands_that_use_a_model(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(script: str, *arguments: object) -> list[str]:
        """What an example prints, in this process."""
        monkeypatch.setattr(sys, "argv", [script, str(exported), *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    genome = tmp_path / "genome.fa"
    genome.write_text(f">one\n{'ACGGTTCATTGGCATC' * 100}NNNN{'GATTACA' * 60}\n")
    found = lines("generate.py", tmp_path / "new.fa")
    assert [line.split()[0] for line in found[1:]] == ["sequence"] + sorted(
        (f"generated_{k}" for k in range(1, 9)), key=[line.split()[0] for line in found].index
    )
    assert all(0.45 <= float(line.split()[2]) <= 0.55 for line in found[2:])
    found = lines("embed.py", genome, tmp_path / "embedding.png")
    assert found[1] == "11 bins, 64 numbers in each" and found[2].startswith("component 1: ")
    found = lines("tracks.py", genome, "one:1590-1640", tmp_path / "tracks.png")
    assert re.fullmatch(r"one:1590-1640 reverse: \d\.\d{3} bits per base", found[3])
    for name in ("embedding.png", "tracks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    summary, _, *rows = lines("variants.py")
    assert "ALTs: 11, scored: 11" in summary
    assert {row.split()[1] for row in rows} == {"snv", "deletion", "insertion"} and len(rows) == 11
    scores = [[float(value) for value in row.split()[3:]] for row in rows]
    assert all(llr == pytest.approx((forward + reverse) / 2, abs=2e-3) for llr, forward, reverse, _ in scores)
    assert [z for *_, z in scores] == sorted(z for *_, z in scores)


@pytest.mark.slow
def test_compare_attention() -> None:
    header, *rows = run("compare_attention.py", "2")
    assert "2 steps" in header
    bits = {row[:12].strip(): float(row.split()[-2]) for row in rows}
    assert list(bits) == ["local", "lsh", "local, lsh", "performer", "full"]
    assert (
        len(set(bits.values())) >= len(bits) - 1
    )  # the kinds differ; after two steps two may agree to four digits
    assert all(1.5 < value < 4 for value in bits.values())


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    lines = run("lightning.py", "2", str(tmp_path))
    train, valid = (next(line for line in lines if line.startswith(name)) for name in ("train/", "valid/"))
    assert 1.2 < float(train.split()[1]) < 1.6 and "after 2 steps" in train
    assert 1.8 < float(valid.split()[1]) < 2.3 and Path(valid.split()[-1]).exists()
    [metrics] = tmp_path.rglob("metrics.csv")
    assert {"train/loss", "valid/loss", "lr-AdamW/pg1"} <= set(metrics.read_text().splitlines()[0].split(","))


@pytest.mark.slow
def test_scoring_without_an_export_says_how_to_call_it() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "score_and_generate.py")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "usage: python examples/score_and_generate.py EXPORT (what `megabase export` wrote)"
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_finetune(exported: Path, tmp_path: Path) -> None:
    """The whole of `megabase finetune`: it trains, measures, and predicts what it measured."""
    out = tmp_path / "runs" / "genes"
    call = [str(exported), str(out), "--bases", "60000", "--pool", "last", "tracking.enabled=false"]
    short = ["trainer.max_steps=4", "trainer.eval_every_steps=2", "data.global_batch=8", "optim.lr=0.05"]
    lines = run("finetune.py", *call, *short)
    assert re.fullmatch(r"\d+ genes in 60,000 bases", lines[0])
    rows = list(read(out / "metrics.jsonl"))
    assert [row["step"] for row in rows if "valid_accuracy" in row] == [2, 4]
    result = json.loads((out / "result.json").read_text())
    assert sum(result["splits"].values()) == int(lines[1].split()[0])
    assert lines[-3].split()[:2] == ["accuracy", f"{result['metrics']['accuracy']['value']:.4f}"]
    assert list(result["baseline"]["metrics"]) == ["accuracy", "auroc", "mcc"]
    # The body, 70 kB, is in no checkpoint.
    checkpoint = out / "checkpoints" / "step-4"
    assert sum(path.stat().st_size for path in checkpoint.rglob("*")) < 50_000
    predicted = tmp_path / "predicted.parquet"
    command = [
        "finetune",
        str(out),
        str(out.with_suffix(".csv")),
        "-o",
        str(predicted),
        "--predict",
        "--json",
    ]
    assert cli.main(command) == 0
    every = parquet.read_table(predicted).to_pylist()
    of_test = parquet.read_table(out / "predictions.parquet").to_pylist()
    by_name = {row["example"]: row for row in every}
    for row in of_test:
        assert row["prediction"] == by_name[row["example"]]["prediction"]
        assert row["p_gene"] == pytest.approx(by_name[row["example"]]["p_gene"], abs=1e-6)
    right = sum(row["label"] == row["prediction"] for row in of_test) / len(of_test)
    assert right == result["metrics"]["accuracy"]["value"]
