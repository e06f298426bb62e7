"""`megabase score --track`: bigWig files, read back by another library, have the numbers of one pass."""

import dataclasses
import functools
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pybigtools
import pytest
import torch

from megabase.datamodules.alphabet import BOS, FIRST_LETTER
from megabase.models import Seeds
from megabase.pipeline import cli
from megabase.pipeline.inference import tracks
from megabase.pipeline.inference.model import load_model
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint
from tests.pipeline.inference.test_score import rows

RECORDS = {"one": "ACGTTGCANNNRacgtaccgattacagatt" * 7, "chr2": "GATTACA" * 21}
REGIONS = [("chr2", 3, 130), ("one", 150, 160), ("one", 0, 77), ("one", 160, 210)]
COLUMNS = ["logp", "entropy", "A", "C", "G", "T"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with random weights."""
    directory = tmp_path_factory.mktemp("tracks") / "run"
    write_checkpoint(directory, dataclasses.replace(CONFIG, max_length=None), 5)
    return directory


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    path.write_text("".join(f">{name} described\n{letters}\n" for name, letters in RECORDS.items()))
    (tmp_path / "some.bed").write_text("".join(f"{r}\t{s}\t{e}\n" for r, s, e in REGIONS))
    return path


def call(run: Path, fasta: Path, output: Path, *more: object) -> int:
    regions = ["--regions", str(fasta.with_name("some.bed"))]
    return cli.main(["score", str(run), str(fasta), "-o", str(output), *regions, *map(str, more)])


@functools.cache
def expected(run: Path, letters: str, *, reverse: bool) -> np.ndarray:
    """(bases, columns) of one pass over a region, by the letters of the forward strand; NaN for what is no letter."""
    loaded = load_model(run)
    codes = np.frombuffer(letters.encode(), dtype=np.uint8)
    codes = loaded.alphabet.reverse_complement(codes) if reverse else codes
    tokens = torch.tensor([[BOS, *loaded.alphabet.encode(codes).tolist()]])
    with torch.no_grad():
        every = loaded.model(tokens, seeds=Seeds(run=loaded.config.run.seed)).log_softmax(-1)[0, :-1]
    labels = tokens[0, 1:]
    probabilities = {base: every[:, FIRST_LETTER + i].exp() for i, base in enumerate("ACGT")}
    values = [
        every.gather(1, labels[:, None]).squeeze(1),
        torch.distributions.Categorical(logits=every).entropy(),
    ]
    values += [probabilities[base] for base in ("TGCA" if reverse else "ACGT")]
    found = torch.stack(values, dim=1).where((labels >= FIRST_LETTER)[:, None], torch.nan).numpy()
    return found[::-1] if reverse else found


def values(path: Path, record: str) -> np.ndarray:
    """The value of every base of a record, NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(pybigtools.open(str(path)).values(record, 0, len(RECORDS[record])))


@pytest.mark.slow
def test_files_have_the_numbers_of_one_pass(
    run: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracks, "ROWS_AT_ONCE", 19)
    monkeypatch.setattr("megabase.pipeline.inference.score.TASK_BASES", 100)  # three tasks a strand
    for block in (33, 1 << 14):  # one region by one, or all of a task together
        output = tmp_path / f"{block}.parquet"
        assert call(run, fasta, output, "--track", "acgt, logp,entropy", "--block", block) == 0
        directory = tmp_path / f"{block}.tracks"
        for reverse, column in ((reverse, column) for reverse in (False, True) for column in COLUMNS):
            path = directory / f"{column}.{'reverse' if reverse else 'forward'}.bw"
            for record, letters in RECORDS.items():
                of = np.full(len(letters), np.nan, dtype=np.float32)
                for name, start, end in REGIONS:
                    if name == record:
                        region = expected(run, letters[start:end], reverse=reverse)
                        of[start:end] = region[:, COLUMNS.index(column)]
                assert np.isnan(of).any()
                np.testing.assert_allclose(values(path, record), of, atol=2e-5)
        for row in rows(output):
            found = values(directory / "logp.forward.bw", row["record"])[row["start"] : row["end"]]
            assert -np.nansum(found) == pytest.approx(row["nats_forward"], rel=1e-5)
            assert np.isfinite(found).sum() == row["bases"]
        assert not output.with_name(f"{block}.parquet.partial").exists()


@pytest.mark.slow
def test_the_hub_names_every_file(run: Path, fasta: Path, tmp_path: Path) -> None:
    for number, (options, names) in enumerate(
        (
            (["--track", "logp", "--strand", "reverse"], ["logp.reverse.bw"]),
            (
                ["--track", "entropy,acgt", "--assembly", "hg38"],
                [f"{c}.{strand}.bw" for strand in ("forward", "reverse") for c in ("entropy", *"ACGT")],
            ),
        )
    ):
        output = tmp_path / f"some-{number}.scores.parquet"
        assert call(run, fasta, output, *options) == 0
        directory = output.with_suffix(".tracks")
        stanzas = [
            dict(line.split(" ", 1) for line in stanza.splitlines())
            for stanza in (directory / "hub.txt").read_text().split("\n\n")
        ]
        assert stanzas[0]["hub"] == f"some_{number}_scores" and stanzas[0]["useOneFile"] == "on"
        assert stanzas[1]["genome"] == ("hg38" if "hg38" in options else "genome")
        urls = [stanza["bigDataUrl"] for stanza in stanzas if "bigDataUrl" in stanza]
        assert (
            sorted(urls) == sorted(names) == sorted({path.name for path in directory.iterdir()} - {"hub.txt"})
        )
        labels = [stanza["track"] for stanza in stanzas[2:]]
        assert len(labels) == len(set(labels))
        assert {stanza["parent"] for stanza in stanzas if "parent" in stanza} <= set(labels)


@pytest.mark.slow
def test_portions_write_the_same_bytes_also_after_a_full_disk(
    run: Path,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--track", "logp,acgt"]
    whole, shared = tmp_path / "whole.parquet", tmp_path / "shared.parquet"
    with monkeypatch.context() as full:
        full.setattr(tracks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert call(run, fasta, whole, *options) == 1
    assert "the tracks need up to" in capsys.readouterr().err
    assert call(run, fasta, whole, *options) == 0
    for portion in ("2/2", "1/2"):
        assert not shared.exists() and not shared.with_suffix(".tracks").exists()
        assert call(run, fasta, shared, *options, "--portion", portion) == 0
    files = sorted(whole.with_suffix(".tracks").glob("*.bw"))
    assert len(files) == 10
    for path in files:
        assert (shared.with_suffix(".tracks") / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"more": ["--track", "logp,gc"]},
            "--track logp,gc: 'gc' is no track: choose from logp, entropy, acgt",
        ),
        ({"more": ["--track", ""]}, "--track : '' is no track"),
        ({"more": ["--assembly", "hg38"]}, "--assembly hg38: it names the genome of tracks: add --track"),
        ({"bed": "one\t0\t50\nchr2\t0\t9\none\t49\t60\n"}, "one:0-50 and 49-60 overlap"),
        ({"bed": "one\t0\t50\none\t0\t50\n"}, "one:0-50 and 0-50 overlap"),
        ({"output": "there.parquet"}, "there.tracks exists, which is written too"),
        (
            {"alphabet": "protein", "more": ["--strand", "forward", "--track", "acgt"]},
            "alphabet is 'protein'",
        ),
    ],
)
def test_bad_input(
    change: dict, message: str, run: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.tracks").mkdir()
    if "bed" in change:
        (tmp_path / "some.bed").write_text(change["bed"])
    if "alphabet" in change:
        run = tmp_path / "protein"
        settings = dataclasses.replace(CONFIG, vocab_size=25, max_length=None)
        write_checkpoint(run, settings, 5, alphabet=change["alphabet"])
    output = tmp_path / change.get("output", "out.parquet")
    assert call(run, fasta, output, *change.get("more", ["--track", "logp"])) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not output.exists()
