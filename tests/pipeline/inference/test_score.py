"""`megabase score` from its command line to its table: the numbers of one pass, resuming, bad input."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from megabase.datamodules.alphabet import BOS, FIRST_LETTER
from megabase.models import Seeds
from megabase.pipeline import cli
from megabase.pipeline.inference import score
from megabase.pipeline.inference.model import load_model
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint

RECORDS = {"one": b"ACGTTGCANNNRacgtaccgattacagatt" * 7, "empty": b"", "chr2": b"GATTACA" * 21}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with random weights."""
    directory = tmp_path_factory.mktemp("score") / "run"
    write_checkpoint(directory, CONFIG, 5)
    return directory


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    lines = [
        b">" + name.encode() + b" described\n"
        + b"".join(letters[i : i + 60] + b"\n" for i in range(0, len(letters), 60))
        for name, letters in RECORDS.items()
    ]  # fmt: skip
    path.write_bytes(b"".join(lines))
    return path


def expected(run: Path, letters: bytes, *, reverse: bool) -> tuple[float, int]:
    """Nats and number of bases of one pass over a sequence."""
    loaded = load_model(run)
    codes = torch.frombuffer(bytearray(letters), dtype=torch.uint8).numpy()
    codes = loaded.alphabet.reverse_complement(codes) if reverse else codes
    tokens = torch.tensor([[BOS, *loaded.alphabet.encode(codes).tolist()]])
    with torch.no_grad():
        log_probs = loaded.model(tokens, seeds=Seeds(run=loaded.config.run.seed)).double().log_softmax(-1)
    labels = tokens[:, 1:]
    nats = -log_probs[:, :-1].gather(2, labels[..., None]).squeeze(2)
    return nats[labels >= FIRST_LETTER].sum().item(), int((labels >= FIRST_LETTER).sum())


def rows(path: Path) -> list[dict]:
    found: list[dict] = parquet.read_table(path).to_pylist()
    return found


def test_a_table_has_what_one_pass_gives(
    run: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.bed").write_text("chr2\t3\t130\nchr2\t3\t130\tname\n")
    for options, regions in (
        ([], [("one", 0, 210), ("chr2", 0, 147)]),
        (["--regions", tmp_path / "some.bed", "--block", 10], [("chr2", 3, 130)] * 2),
    ):
        output = tmp_path / f"{len(options)}.parquet"
        arguments = ["score", run, fasta, "--output", output, "--json", *options]
        assert cli.main([str(argument) for argument in arguments]) == 0
        summary, found = json.loads(capsys.readouterr().out), rows(output)
        assert [(row["record"], row["start"], row["end"]) for row in found] == regions
        for row in found:
            letters = RECORDS[row["record"]][row["start"] : row["end"]]
            (forward, bases), (reverse, _) = (expected(run, letters, reverse=r) for r in (False, True))
            assert (row["bases"], row["other"]) == (bases, len(letters) - bases)
            assert row["nats_forward"] == pytest.approx(forward, rel=1e-5)
            assert row["nats_reverse"] == pytest.approx(reverse, rel=1e-5)
            assert row["nats"] == pytest.approx((forward + reverse) / 2, rel=1e-5)
            assert row["bits_per_base"] == pytest.approx(row["nats"] / bases / math.log(2))
        assert summary["regions"] == 2 and summary["model"]["step"] == 5
        assert summary["bases"] == sum(row["bases"] for row in found)
        assert summary["nats"] == pytest.approx(sum(row["nats"] for row in found))
        assert not output.with_name(output.name + ".partial").exists()


def test_a_call_that_was_killed_goes_on(
    run: Path,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    walk_over, walks = score.walk_over, []

    def stopped(*arguments: object) -> list[score.Walk]:
        if len(walks) == 3:
            raise KeyboardInterrupt
        walks.append(1)
        return walk_over(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(score, "TASK_BASES", 1)  # a task for each of the two records and strands
    monkeypatch.setattr(score, "walk_over", stopped)
    arguments = ["score", str(run), str(fasta), "-o", str(tmp_path / "out.parquet")]
    assert cli.main(arguments) == 130
    assert not (tmp_path / "out.parquet").exists()
    capsys.readouterr()
    assert cli.main([*arguments, "--block", "99"]) == 2
    assert "was left by a call with another model, input or options" in capsys.readouterr().err
    walks.clear()
    assert cli.main(arguments) == 0
    assert len(walks) == 1
    monkeypatch.setattr(score, "walk_over", walk_over)
    assert cli.main([*arguments[:-1], str(tmp_path / "whole.parquet")]) == 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert "bits per base" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_that_share_the_work_write_the_same_bytes(
    run: Path,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(score, "TASK_BASES", 100)
    pieces = [(name, start, start + n) for name in ("one", "chr2") for n in (5, 30, 64) for start in (0, 9)]
    bed = tmp_path / "some.bed"
    bed.write_text("".join(f"{name}\t{start}\t{end}\n" for name, start, end in pieces))
    arguments = ["score", str(run), str(fasta), "--regions", str(bed), "--block", "128", "-o"]
    assert cli.main([*arguments, str(tmp_path / "whole.parquet")]) == 0
    capsys.readouterr()
    output = tmp_path / "shared.parquet"
    for number in (3, 1, 2):
        assert not output.exists()
        assert cli.main([*arguments, str(output), "--portion", f"{number}/3"]) == 0
    assert capsys.readouterr().out.count("bits per base") == 1
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    for row, (name, start, end) in zip(rows(output), pieces, strict=True):
        for reverse, strand in ((False, "forward"), (True, "reverse")):
            nats, bases = expected(run, RECORDS[name][start:end], reverse=reverse)
            assert row["bases"] == bases
            assert row[f"nats_{strand}"] == pytest.approx(nats, rel=1e-5)


def test_one_strand(run: Path, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.parquet"
    assert cli.main(["score", str(run), str(fasta), "-o", str(output), "--strand", "reverse"]) == 0
    for row in rows(output):
        assert row["nats_forward"] is None
        assert row["nats"] == row["nats_reverse"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fasta": "none.fa"}, "none.fa: there is no such file"),
        ({"fasta": "text.fa"}, "text.fa: cannot be indexed as FASTA"),
        ({"fasta": "hollow.fa"}, "hollow.fa: cannot be indexed as FASTA"),
        ({"fasta": "twice.fa"}, "twice.fa: two records are named 'a': give each record a name of its own"),
        ({"fasta": "changed.fa"}, "changed.fa.fai is older than changed.fa"),
        ({"bed": "2\t0\t5\n"}, "no record '2'; did you mean 'chr2'?"),
        ({"bed": "chr2\t0\t148\n"}, "line 1: [0, 148) reaches beyond record 'chr2' of 147 bases"),
        ({"bed": "chr2\t0\n"}, "is not chr, start and end with tabs"),
        ({"bed": "# nothing\n"}, "holds no region"),
        ({"output": "text.fa"}, "text.fa exists: remove it, or choose another --output"),
        ({"model": "nowhere"}, "nowhere"),
        ({"more": ["--block", "0"]}, "--block 0: must be 1 or more"),
        ({"more": ["--step", "x"]}, "--step x"),
        (
            {"output": "x.tracks", "more": ["--track", "logp"]},
            "x.tracks: the tracks go to a directory of this name",
        ),
        ({"more": ["--portion", "4/3"]}, "--portion 4/3: write K/N with K from 1 to N"),
    ],
)
def test_bad_input(
    change: dict, message: str, run: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.fa").write_text("no sequence\n")
    (tmp_path / "hollow.fa").write_text(">a\n>b\n")
    (tmp_path / "twice.fa").write_text(">a\nACGT\n>b\nAC\n>a x\nGGT\n")
    for number, name in enumerate(("changed.fa.fai", "changed.fa")):
        (tmp_path / name).write_bytes(fasta.read_bytes())
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "some.bed").write_text(change.get("bed", "chr2\t0\t5\n"))
    arguments = [change.get("model", run), tmp_path / change.get("fasta", fasta.name)]
    arguments += ["-o", tmp_path / change.get("output", "out.parquet"), "--regions", tmp_path / "some.bed"]
    assert cli.main(["score", *map(str, [*arguments, *change.get("more", [])])]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not (tmp_path / "out.parquet").exists()


def test_a_model_that_sees_both_sides_is_refused(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "both", dataclasses.replace(CONFIG, causal=False), 5)
    assert cli.main(["score", str(tmp_path / "both"), str(fasta), "-o", str(tmp_path / "x.parquet")]) == 2
    assert "model.causal=False" in capsys.readouterr().err
