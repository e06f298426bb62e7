"""`megabase evaluate` from its command line to its tables, JSON and picture."""

import dataclasses
import json
from pathlib import Path

import pytest

from megabase.datamodules.prepare.run import prepare
from megabase.pipeline import cli
from megabase.pipeline.inference.evaluation import compressors
from megabase.pipeline.inference.export import export
from megabase.pipeline.rundir.journal import read
from tests.conftest import STEPS
from tests.pipeline.inference.test_export import CONFIG, damage, write_checkpoint


@pytest.fixture(autouse=True)
def no_compressors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own."""
    monkeypatch.setattr(compressors, "PROGRAMS", ())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with random weights."""
    for step in (5, 10):
        write_checkpoint(tmp_path / "run", CONFIG, step)
    return tmp_path / "run"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """The JSON that the command prints."""
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a bad call prints."""
    assert cli.main(["evaluate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.slow
def test_everything_at_once(
    run: Path, lambda_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gene = "gi|9626243|ref|NC_001416.1|\tx\tgene\t44001\t46000\t.\t-\t.\tID=a\n"
    (tmp_path / "genes.gff").write_text(f"##gff-version 3\n{gene}")
    arguments = [run, "--split", "valid", "--shards", lambda_shards, "--length", "64,256", "--recall", 4]
    arguments += ["--annotation", tmp_path / "genes.gff", "--output", tmp_path / "out"]
    found = evaluate(capsys, *arguments)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert found["model"]["step"] == 10 and found["length"] == 256 and found["windows"] == 4850 // 256
    total = found["bits_per_base"]
    assert total["bases"] == 4850 // 256 * 256 and total["low"] < total["value"] < total["high"]
    assert list(found["markov"]) == list("012345") and 1.9 < found["markov"]["0"] < 2.1
    assert [each["length"] for each in found["contexts"]] == [64, 256]
    assert sum(each["bits"]["bases"] for each in found["positions"]) == total["bases"]
    assert [each["name"] for each in found["classes"]] == ["gene", "(none)"] and found["cases"] == []
    assert sum(each["bits"]["bases"] for each in found["classes"]) == total["bases"]
    recall = found["recall"]
    assert [(copy["kind"], copy["distance"]) for copy in recall["copies"]] == [
        (kind, distance) for kind in ("exact", "mutated", "inverted") for distance in (64, 128)
    ]
    for copy in recall["copies"]:
        assert copy["bits"]["value"] + copy["gain"]["value"] == pytest.approx(recall["without"]["value"])

    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert [
        "model",
        *(f"{total[name]:.4f}" for name in ("value", "low", "high")),
        f"{total['bases']:,}",
    ] in rows
    for heading in ("contexts of different length", "By position", "By class", "Recall: copies of 48 bases"):
        assert heading in text
    assert "By letter case" not in text  # the genome of phage lambda has none


@pytest.mark.slow
def test_an_export_gives_the_numbers_of_its_run(
    run: Path, lambda_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    more = ["--split", "valid", "--shards", lambda_shards, "--windows", 7, "--recall", 0]
    ours, theirs = evaluate(capsys, run, *more), evaluate(capsys, tmp_path / "out", *more)
    assert ours["windows"] == 7 and ours["length"] == CONFIG.max_length and ours["recall"] is None
    assert ours | {"model": None} == theirs | {"model": None}
    other = evaluate(capsys, run, "model.lsh.rounds=1", "data.micro_batch=4", *more)
    assert other["bits_per_base"]["value"] != ours["bits_per_base"]["value"]


@pytest.mark.slow
def test_masked_models_are_evaluated_on_masked_bases(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "run", dataclasses.replace(CONFIG, causal=False), 5)
    more = ["--split", "valid", "--shards", lambda_shards, "--length", "128,256", "--recall", 4]
    found = evaluate(capsys, tmp_path / "run", *more)
    assert found["objective"] == "masked"
    assert found["bits_per_base"]["bases"] == 4850 // 256 * round(0.15 * 256)
    assert found["contexts"][0]["bits"]["bases"] == found["contexts"][1]["bits"]["bases"] > 0
    assert found["recall"]["copies"]


def test_a_damaged_checkpoint_is_passed_over_loudly(
    run: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run, 10)
    more = ["--split", "valid", "--shards", str(lambda_shards), "--windows", "2", "--recall", "0", "--json"]
    assert cli.main(["evaluate", str(run), *more]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"]["step"] == 5
    assert "step-10 is broken" in captured.err and "trying the one before" in captured.err
    message = error_of(capsys, run, "--step", 10, *more)
    assert "step-10 is broken" in message and "use --step 5, which is intact" in message


def test_bad_input_is_named(
    run: Path, lambda_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "table", dataclasses.replace(CONFIG, positions="learned"), 1)
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 1000)
    prepare([text], tmp_path / "text", alphabet="bytes", valid="0.5", progress=False)
    bed = tmp_path / "genes.bed"
    bed.write_text("chr1\t1\t2\tgene\n")
    good = ["--split", "valid", "--shards", lambda_shards]
    for arguments, message in (
        ([tmp_path / "none", *good], "none holds no model: give a run directory"),
        ([run, "--split", "valid"], "does not say which shards it was trained on: give --shards DIR"),
        (
            [run, "--shards", tmp_path / "no"],
            "no: no such directory: make shards with `megabase prepare INPUT... OUTPUT`\n",
        ),
        (
            [run, "data.shards=gone"],
            "gone: no such directory: make shards with `megabase prepare INPUT... OUTPUT` (these",
        ),
        (
            [run, "--shards", lambda_shards],
            "has no split 'test', only train, valid: score another with --split valid, or prepare shards with --test",
        ),
        (
            [run, "--split", "valid", "--shards", tmp_path / "text"],
            "has the alphabet bytes, but the model was trained",
        ),
        (
            [run, *good, "--length", "9000"],
            "split 'valid' has no window of 9000: the longest part of a record in it has 4850: give --length 4850",
        ),
        (
            [tmp_path / "table", *good, "--length", "128"],
            "--length 128: the model cannot take it: its table of positions (model.positions=learned) ends at 64: give",
        ),
        ([run, *good, "--length", "1x"], "--length: '1x' is not a length"),
        ([run, *good, "--step", "newest"], "--step newest: give the step of a checkpoint, or best"),
        ([run, *good, "--recall", "-1"], "--recall -1: must be 0 or more"),
        (
            [run, *good, "--bed", tmp_path / "no.bed"],
            "no.bed: cannot be read (No such file or directory): give --annotation",
        ),
        ([run, *good, "--bed", bed], "names 'chr1', but the shards hold 'gi|9626243|ref|NC_001416.1|'"),
        ([run, "trainer.devices=0", *good], "trainer.devices=0: must be above zero"),
        ([run, "trainer.sequence_ranks=2", *good], "trainer.sequence_ranks=2 does not divide the 1 rank"),
        ([run, "trainer.nodes=2", *good], "trainer.nodes=2: start it with slurm/evaluate.sbatch"),
        ([run, "data.lenth=5", *good], "unknown key 'data.lenth'"),
    ):
        assert message in error_of(capsys, *arguments)


def test_a_result_that_cannot_be_written(
    run: Path, lambda_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    more = ["--split", "valid", "--shards", lambda_shards, "--windows", 2, "--recall", 0]
    assert cli.main(["evaluate", *map(str, [run, *more, "--output", tmp_path / "taken"])]) == 1
    assert "taken cannot be written: File exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_one_rank_and_two_give_the_numbers_of_the_journal(
    undisturbed: Path, lambda_shards: Path, start_job, capsys: pytest.CaptureFixture[str]
) -> None:
    row = [row for row in read(undisturbed / "metrics.jsonl") if "valid_loss" in row][-1]
    more = ["--split", "valid", "--length", "128,512", "--recall", 5]
    one = evaluate(capsys, undisturbed, *more)
    assert (
        one["model"]["step"] == row["step"] == STEPS
        and one["bits_per_base"]["bases"] == row["full_valid_bases"]
    )
    assert one["bits_per_base"]["value"] == pytest.approx(row["full_valid_bits_per_base"], rel=1e-6)
    for shared in (1, 2):  # two ranks with windows of their own, and two that share each window
        out = undisturbed.parent / f"evaluated-{shared}"
        settings = ["trainer.devices=2", f"trainer.sequence_ranks={shared}"]
        code, output = start_job(
            *map(str, ["evaluate", undisturbed, *settings, *more, "--output", out])
        ).wait()
        assert code == 0, output
        two = json.loads((out / "evaluation.json").read_text())
        assert two | {"compressors": []} == one | {"compressors": []}
        assert output.count("written: ") == output.count("measuring recall: ") == 1  # by one rank
