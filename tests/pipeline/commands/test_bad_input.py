"""Bad input gives one line on stderr and exit code 2, before any process is started."""

import gzip
from pathlib import Path

import pytest

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.pipeline import cli
from megabase.pipeline.checkpoint.identity import manifest_of
from megabase.pipeline.checkpoint.manifest import MANIFEST
from megabase.pipeline.config.load import load
from tests.conftest import DATA


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad call prints."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("megabase: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


def train_arguments(shards: Path, root: Path, *more: str) -> list[str]:
    return ["train", f"data.shards={shards}", f"run.root={root}", "run.name=t", "data.length=512", *more]


def test_prepare_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.fa" in error_of(capsys, "prepare", str(tmp_path / "none.fa"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no FASTA record"),
        (b"this is not a genome\n", "FASTA"),
        (b"@read\nACGT\n+\n", "FASTQ"),
    ],
)
def test_prepare_empty_or_not_fasta(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    bad = tmp_path / "bad.fa"
    bad.write_bytes(content)
    message = error_of(capsys, "prepare", str(bad), str(tmp_path / "out"))
    assert says in message and "bad.fa" in message
    assert not (tmp_path / "out").exists()


def test_prepare_truncated_gzip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "torn.fa.gz"
    bad.write_bytes((DATA / "lambda_phage.fna.gz").read_bytes()[:9000])
    message = error_of(capsys, "prepare", str(bad), str(tmp_path / "out"))
    assert "torn.fa.gz" in message and "truncated" in message
    assert list(tmp_path.iterdir()) == [bad]


def test_prepare_into_something_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.fa"
    good.write_bytes(gzip.decompress((DATA / "lambda_phage.fna.gz").read_bytes()))
    (tmp_path / "out").mkdir()
    assert "out" in error_of(capsys, "prepare", str(good), str(tmp_path / "out"))


def test_prepare_into_a_file_or_nowhere_or_without_training_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genome = str(DATA / "lambda_phage.fna.gz")
    taken = tmp_path / "second.fa"
    taken.write_text(">a\nACGT\n")
    assert "second.fa is a file: the last argument is the output" in error_of(
        capsys, "prepare", genome, str(taken)
    )
    assert "choose another output" in error_of(capsys, "prepare", genome, "/proc/none/shards")
    everything = error_of(capsys, "prepare", str(taken), str(tmp_path / "out"), "--valid", "a")
    assert "name every record" in everything


def test_prepare_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta = tmp_path / "two.fa"
    fasta.write_text(">a\nACGTNNACGT\n>b\nacgt\n")
    assert cli.main(["prepare", str(fasta), str(tmp_path / "out"), "--valid", "b"]) == 0
    printed = capsys.readouterr().out
    assert "2 records in 1 shard\n" in printed
    assert [line.split()[:2] for line in printed.splitlines()[1:]] == [["train", "10"], ["valid", "4"]]
    assert "10 bases, 2 of them not A, C, G or T (N, IUPAC codes, U, gaps)\n" in printed
    assert printed.endswith("4 bases\n")


def test_no_record_is_long_enough(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, *train_arguments(lambda_shards, tmp_path, "data.length=65536"))
    assert "65536" in message or "65,536" in message


def test_directory_without_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "index.parquet" in error_of(capsys, *train_arguments(tmp_path, tmp_path))


def test_global_batch_that_ranks_cannot_make(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(
        capsys,
        *train_arguments(
            lambda_shards, tmp_path, "data.global_batch=6", "data.micro_batch=4", "trainer.devices=2"
        ),
    )
    assert "data.global_batch" in message and "data.micro_batch to one of 1, 3" in message


def test_unknown_key_and_wrong_type(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean 'optim.lr'" in error_of(
        capsys, *train_arguments(lambda_shards, tmp_path, "optim.rl=1")
    )
    assert "optim.lr" in error_of(capsys, *train_arguments(lambda_shards, tmp_path, "optim.lr=fast"))


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["--data.length", "512"], "--data.length: settings are written without dashes: data.length=512"),
        (["--data.length=512"], "data.length=512"),
        (["--lr", "1e-3"], "--lr: settings are written without dashes: optim.lr=1e-3"),
        (["--batch-size=4"], "data.global_batch=4"),
        (["--lr"], "optim.lr=VALUE"),
    ],
)
def test_a_setting_written_as_an_option(
    words: list[str], written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (1, 2, 3):  # before, between and after other words
        arguments = ["train", "run.name=x", "data.shards=s"]
        arguments[place:place] = words
        assert written in error_of(capsys, *arguments)


def test_an_option_may_stand_before_between_and_after_settings(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run.name=x", "data.shards=s", "trainer.devices=0"]
    for place in range(4):
        arguments = [*words[:place], "--dry-run", *words[place:]]
        assert "trainer.devices=0: must be above zero" in error_of(capsys, "submit", *arguments)


def test_several_nodes_by_hand(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "megabase submit" in error_of(capsys, *train_arguments(lambda_shards, tmp_path, "trainer.nodes=2"))


def test_resume_with_another_model(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = train_arguments(lambda_shards, tmp_path)
    then = load([], settings[1:])
    then.model.vocab_size = 9
    step = tmp_path / "t" / "checkpoints" / "step-5"
    step.mkdir(parents=True)
    data = ShardIndex.open(lambda_shards).segments.identity
    manifest = manifest_of(then, 5, ranks=1, data=data, alphabet="dna")
    (step / MANIFEST).write_text(manifest.sealed())
    message = error_of(capsys, *settings, "model.depth=2", "model.lsh.rounds=8")
    assert "model.depth: checkpoint 6, config 2; model.lsh.rounds: checkpoint 4, config 8" in message
    assert "trainer.precision: checkpoint 32, now bf16" in error_of(
        capsys, *settings, "trainer.precision=bf16"
    )


def test_ranks_that_a_launcher_started_must_be_those_of_the_config(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = train_arguments(lambda_shards, tmp_path, "data.global_batch=12")
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "h"}.items():
        monkeypatch.setenv(name, value)
    assert "MASTER_PORT not set" in error_of(capsys, *settings)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "3 ranks were started" in error_of(capsys, *settings)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    # `srun megabase train`, without what slurm/train.sbatch sets.
    for name in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert "the ranks do not know where to meet" in error_of(capsys, *settings)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name)
