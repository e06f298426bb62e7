"""`megabase plan`: what it prints of configs for GPUs and CPUs, and how it refuses bad input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline import cli
from megabase.pipeline.config.load import load
from megabase.pipeline.plan import request

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "human-1m.yaml")


def planned(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """What `megabase plan --json` prints."""
    assert cli.main(["plan", "--json", *words]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line of bad input."""
    assert cli.main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_config_for_gpus_without_its_shards(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CONFIG]) == 0
    printed = capsys.readouterr().out
    rows = {line.strip().split("  ")[0]: " ".join(line.split()) for line in printed.splitlines()}
    assert rows["parameters"] == "parameters 166,777,161"
    assert "fits: h100 has" in rows["memory of a rank"]
    assert rows["global batch"].endswith("128 ranks x 1 of a micro batch x 1 accumulated")
    for kind in (
        "products",
        "attention",
        "streams",
        "reduction",
        "longest window that fits",
        "time of the run",
    ):
        assert kind in rows, printed
    assert "windows of an epoch" not in rows
    assert "data.shards is not set: epochs are not known" in printed
    assert cli.main(["plan", CONFIG, "data.shards=later"]) == 0
    assert "data.shards=later does not exist yet: epochs are not known" in capsys.readouterr().out


def test_shards_are_read_no_further_than_their_index(
    lambda_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "shards"
    copied.mkdir()
    (copied / "index.parquet").write_bytes((lambda_shards / "index.parquet").read_bytes())
    found = planned(capsys, f"data.shards={copied}", "data.length=512", "data.global_batch=170")
    assert (found["batches"]["windows"], found["hardware"]) == (85, "cpu")
    assert "data.global_batch=170 is more than the 85 training windows" in found["warnings"][0]


def test_ranks_and_hardware_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, CONFIG, "--ranks", "16", "--hardware", "h200")
    assert (found["hardware"], found["batches"]["ranks"], found["batches"]["accumulation"]) == ("h200", 16, 8)
    assert found["space"]["fits"]
    assert found["seconds"] > planned(capsys, CONFIG, "--hardware", "h200")["seconds"]


def test_a_run_that_does_not_fit_names_one_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, CONFIG, "data.length=4194304", "model.max_length=4194304", code=1)
    assert not found["space"]["fits"] and found["limit"] == "memory"
    assert "does not fit: a rank needs" in found["warnings"][0]
    assert "it would with trainer.sequence_ranks=" in found["warnings"][0]
    settings = found["warnings"][0].partition("it would with ")[2].split()
    assert planned(capsys, CONFIG, "data.length=4194304", "model.max_length=4194304", *settings)["space"][
        "fits"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "h10"], "no such profile: did you mean h100?"),
        (["--ranks", "0"], "--ranks 0: must be 1 or more"),
        (["--ranks", "12"], "--ranks 12 is not a multiple of the 8 ranks of a node: take 8"),
        (["--ranks", "256"], "data.global_batch 128 is not a multiple of data.micro_batch 1 x 256 ranks"),
        (["model.dim=100"], "model.dim=100 is not a multiple of model.heads=12"),
        (["trainer.sequence_ranks=5"], "trainer.sequence_ranks=5 does not divide"),
        (["data.lenght=5"], "did you mean 'data.length'?"),
        (["slurm.gpus=null", "trainer.precision=16"], "trainer.precision=16 needs a GPU"),
        (["slurm.gpus=null", "trainer.offload_streams=host"], "trainer.offload_streams=host needs a GPU"),
        (["zero.overlap_comm=true", "zero.bucket_mb=1"], "more than a bucket of zero.bucket_mb=1"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, CONFIG, *words)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["slurm.gpus=a100"], "a100-80gb (slurm.gpus=a100)"),
        (["slurm.gpus=null"], "cpu (slurm.gpus=null)"),
        (["slurm.gpus=v9"], "h100 (slurm.gpus=v9 has no profile"),
        (["trainer.nodes=2"], "h100 (more ranks than"),
        ([], "cpu (this machine has no GPU"),
        (["model.dim=2048", "data.length=1048576"], "h100 (made for GPUs"),
    ],
)
def test_the_hardware_that_a_config_is_for(
    settings: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "gpu_here", lambda: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    config = load([], ["run.name=x", "data.shards=s", *settings])
    config.model.vocab_size = 9
    chosen = request.choose(config)
    assert f"{chosen.profile.name} ({chosen.why})".startswith(why)


def test_the_gpu_of_this_machine_is_known_by_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "_DRIVER", tmp_path)
    assert request.gpu_here() is None
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / "information").write_text("Model: \t\t NVIDIA A100-SXM4-80GB\n")
    assert request.gpu_here() == "a100-80gb"


@pytest.mark.slow
def test_a_plan_imports_no_torch() -> None:
    program = (
        "import sys; from megabase.pipeline import cli\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, "plan", CONFIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
