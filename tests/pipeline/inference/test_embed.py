"""`megabase embed` from its command line to its files: the states of one pass, any block size, bad input."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
import zarr
from pyarrow import parquet

from megabase.datamodules.alphabet import BOS, FIRST_LETTER
from megabase.models import LSHConfig, Seeds
from megabase.models.call import Call
from megabase.pipeline import cli
from megabase.pipeline.inference import embed, embedding_files
from megabase.pipeline.inference.model import load_model
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint

RECORDS = {"one": "ACGTTGCANNNRacgtaccgattacagatt" * 3, "chr2": "GATTACA" * 9, "short": "ACGTN"}
WIDTH = 2 * CONFIG.dim


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with random weights."""
    directory = tmp_path_factory.mktemp("embed") / "run"
    write_checkpoint(directory, dataclasses.replace(CONFIG, max_length=None), 5)
    return directory


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    path.write_text("".join(f">{name} described\n{letters}\n" for name, letters in RECORDS.items()))
    return path


def call(run: Path, fasta: Path, output: Path, *more: object) -> int:
    return cli.main(["embed", str(run), str(fasta), "-o", str(output), *map(str, more)])


@functools.cache
def one_pass(run: Path, letters: str, layer: int, *, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """The state after each base, and whether it is a letter, in the order of the forward strand."""
    loaded = load_model(run)
    codes = np.frombuffer(letters.encode(), dtype=np.uint8)
    codes = loaded.alphabet.reverse_complement(codes) if reverse else codes
    causal = loaded.config.model.causal
    tokens = torch.tensor([[BOS] * causal + loaded.alphabet.encode(codes).tolist()])
    states = loaded.model.body.outputs(tokens, Call(Seeds(run=loaded.config.run.seed)), [layer])[layer]
    states, letter = states[0, int(causal) :], tokens[0, int(causal) :] >= FIRST_LETTER
    return (states.flip(0), letter.flip(0)) if reverse else (states, letter)


def expected(run: Path, letters: str, layer: int, places: list[int], *, reverse: bool) -> np.ndarray:
    """The mean state of the letters at some places."""
    states, letter = one_pass(run, letters, layer, reverse=reverse)
    return states[[i for i in places if letter[i]]].mean(0).numpy()


def rows(path: Path) -> list[dict]:
    found: list[dict] = parquet.read_table(path).to_pylist()
    return found


def numbers(path: Path) -> np.ndarray:
    return np.array(parquet.read_table(path)["embedding"].to_pylist(), dtype=np.float32)


@pytest.mark.slow
def test_rows_are_the_means_of_one_pass(
    run: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.bed").write_text("one\t3\t80\nchr2\t0\t63\none\t3\t80\n")
    options = ["--regions", tmp_path / "some.bed", "--pool", "bin:25", "--layer", 1]
    for strand in ("forward", "reverse", "mean", "concat"):
        output = tmp_path / f"{strand}.parquet"
        assert call(run, fasta, output, *options, "--strand", strand, "--json") == 0
        summary = json.loads(capsys.readouterr().out)
        found = rows(output)
        bins = [
            (r, s, min(s + 25, e)) for r, b, e in (("one", 3, 80), ("chr2", 0, 63)) for s in range(b, e, 25)
        ]
        assert [(row["record"], row["start"], row["end"]) for row in found] == [*bins, *bins[:4]]
        assert (summary["rows"], summary["width"]) == (11, WIDTH * (1 + (strand == "concat")))
        for row in found:
            region = RECORDS[row["record"]][slice(3, 80) if row["record"] == "one" else slice(0, 63)]
            offset = 3 if row["record"] == "one" else 0
            places = [i - offset for i in range(row["start"], row["end"])]
            both = [expected(run, region, 1, places, reverse=reverse) for reverse in (False, True)]
            of = {"forward": both[0], "reverse": both[1], "mean": (both[0] + both[1]) / 2}
            np.testing.assert_allclose(row["embedding"], of.get(strand, np.concatenate(both)), atol=1e-4)
            assert row["bases"] == sum(region[i].upper() in "ACGT" for i in places)


@pytest.mark.slow
def test_the_block_size_changes_nothing_but_the_rounding(run: Path, fasta: Path, tmp_path: Path) -> None:
    for pool, blocks in {
        "none": (17, 33),
        "bin:20": (32,),
        "center:5": (17,),
        "last": (33,),
    }.items():
        found = {}
        for block in (*blocks, 1 << 14):
            output = tmp_path / f"{pool}-{block}.parquet"
            assert call(run, fasta, output, "--pool", pool, "--block", block) == 0
            found[block] = numbers(output)
        assert len(found[block]) == {"none": 158, "bin:20": 5 + 4 + 1}.get(pool, 3)
        for block in blocks:
            np.testing.assert_allclose(found[block], found[1 << 14], atol=1e-4)
    again = tmp_path / "again.parquet"
    assert call(run, fasta, again, "--pool", "none", "--block", 17) == 0
    assert again.read_bytes() == (tmp_path / "none-17.parquet").read_bytes()
    # Every base has the state of one pass, N too.
    for name, first in (("one", 0), ("chr2", 90), ("short", 153)):
        both = [one_pass(run, RECORDS[name], CONFIG.depth, reverse=reverse)[0] for reverse in (False, True)]
        mean = ((both[0] + both[1]) / 2).numpy()
        np.testing.assert_allclose(
            numbers(tmp_path / "none-33.parquet")[first : first + len(mean)], mean, atol=1e-4
        )
        last = numbers(tmp_path / "last-33.parquet")[list(RECORDS).index(name)]
        np.testing.assert_allclose(last, ((both[0][-1] + both[1][0]) / 2).numpy(), atol=1e-4)


@pytest.mark.slow
def test_formats_hold_the_same(
    run: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_files, "CHUNK_BYTES", 7 * WIDTH * 4)  # chunks of 7 rows
    monkeypatch.setattr(embed, "BYTES_AT_ONCE", 5 * (WIDTH * 4 + 8))  # pieces of 5 rows
    found = {}
    for suffix in ("parquet", "zarr", "h5ad"):
        found[suffix] = tmp_path / f"out.{suffix}"
        assert call(run, fasta, found[suffix], "--pool", "bin:4") == 0
    table = rows(found["parquet"])
    wanted = np.array([row["embedding"] for row in table], dtype=np.float32)
    group = zarr.open_group(found["zarr"], mode="r")
    np.testing.assert_array_equal(group["embedding"][:], wanted)
    records = group.attrs["records"]
    assert [records[code] for code in group["record"][:]] == [row["record"] for row in table]
    data = anndata.read_h5ad(found["h5ad"])
    np.testing.assert_array_equal(data.X, wanted)
    assert data.obs["record"].tolist() == [row["record"] for row in table]
    assert data.obs_names[1] == "one:4-8" and data.var_names[WIDTH - 1] == f"channel_{WIDTH - 1}"
    for name in ("start", "end", "bases"):
        assert group[name][:].tolist() == data.obs[name].tolist() == [row[name] for row in table]
    settings = json.loads(parquet.read_schema(found["parquet"]).metadata[b"megabase"])
    assert settings == json.loads(data.uns["megabase"]) == group.attrs["megabase"]
    assert settings["pool"] == "bin:4" and settings["model"]["step"] == 5
    half = tmp_path / "half.zarr"
    assert call(run, fasta, half, "--pool", "bin:4", "--dtype", "float16") == 0
    np.testing.assert_array_equal(zarr.open_group(half, mode="r")["embedding"][:], wanted.astype(np.float16))


@pytest.mark.slow
def test_portions_and_a_killed_call_write_the_same_bytes(
    run: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megabase.pipeline.inference.score.TASK_BASES", 60)
    whole, shared, killed = (tmp_path / f"{name}.parquet" for name in ("whole", "shared", "killed"))
    assert call(run, fasta, whole) == 0
    for portion in ("2/2", "1/2"):
        assert not shared.exists()
        assert call(run, fasta, shared, "--portion", portion) == 0
    write, tasks = embed.Walks.write, []

    def stopped(self: embed.Walks, path: Path) -> None:
        write(self, path)
        if len(tasks) == 2:
            raise KeyboardInterrupt
        tasks.append(1)

    monkeypatch.setattr(embed.Walks, "write", stopped)
    assert call(run, fasta, killed) == 130
    assert len([*killed.with_name("killed.parquet.partial").glob("*.rows")]) == 2
    monkeypatch.setattr(embed.Walks, "write", write)
    assert call(run, fasta, killed, "--pool", "last") == 2
    assert call(run, fasta, killed) == 0
    assert shared.read_bytes() == killed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_model_that_sees_both_sides_reads_windows_in_one_pass(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, settings in {
        "masked": dataclasses.replace(CONFIG, causal=False, max_length=90),
        "chunk": dataclasses.replace(CONFIG, lsh=LSHConfig(chunk_length=8, attend="chunk"), max_length=91),
    }.items():
        model, output = tmp_path / name, tmp_path / f"{name}.parquet"
        write_checkpoint(model, settings, 5)
        assert call(model, fasta, output, "--strand", "reverse") == 0
        for row, letters in zip(rows(output), RECORDS.values(), strict=True):
            of = expected(model, letters, CONFIG.depth, list(range(len(letters))), reverse=True)
            np.testing.assert_allclose(row["embedding"], of, atol=1e-4)
    capsys.readouterr()
    write_checkpoint(tmp_path / "other", dataclasses.replace(CONFIG, causal=False, max_length=None), 5)
    fasta.write_text(f">long\n{'A' * 9000}\n")
    fasta.with_name("genome.fa.fai").unlink()
    assert call(tmp_path / "other", fasta, tmp_path / "x.parquet") == 2
    error = capsys.readouterr().err
    assert "long:0-9000 has 9,000 bases: this model reads a region in one pass" in error
    assert "model.causal=False" in error and error.count("\n") == 1


BAD = [
    ({"more": ["--layer", "3"]}, "--layer 3: the model has the layers 0 to 2, and last"),
    ({"more": ["--layer", "first"]}, "--layer first: the model has"),
    ({"more": ["--pool", "max"]}, "--pool max: give mean, last, center:N"),
    ({"more": ["--pool", "center:6"]}, "--pool center:6: short:0-5 has only 5 bases"),
    ({"more": ["--block", "0"]}, "--block 0: must be 1 or more"),
    ({"output": "out.csv"}, "out.csv: its suffix must be one of .parquet, .zarr, .h5ad"),
    ({"output": "there.parquet"}, "there.parquet exists: remove it, or choose another --output"),
    ({"output": "out.zarr", "missing": "zarr"}, "zarr is not installed: pip install 'megabase[zarr]'"),
    (
        {"output": "out.h5ad", "missing": "anndata"},
        "anndata is not installed: pip install 'megabase[anndata]'",
    ),
    ({"fasta": "none.fa"}, "none.fa: there is no such file"),
    ({"model": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(
    change: dict,
    message: str,
    run: Path,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "there.parquet").touch()
    if "missing" in change:
        monkeypatch.setitem(sys.modules, change["missing"], None)
    output = tmp_path / change.get("output", "out.parquet")
    assert (
        call(
            change.get("model", run),
            tmp_path / change.get("fasta", fasta.name),
            output,
            *change.get("more", []),
        )
        == 2
    )
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert output.name == "there.parquet" or not output.exists()


def test_a_model_with_full_layers_is_refused_before_it_reads(
    tmp_path: Path, fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megabase.models.reading.LONGEST_WITH_FULL_LAYERS", 90)
    write_checkpoint(tmp_path / "run", dataclasses.replace(CONFIG, layers=["full"], max_length=None), 5)
    for command in ("embed", "score"):
        output = tmp_path / "out.parquet"
        assert cli.main([command, str(tmp_path / "run"), str(fasta), "-o", str(output)]) == 2
        assert "at most 90 tokens can be read in blocks, and 91 are asked for" in capsys.readouterr().err
        assert not output.with_name("out.parquet.partial").exists()


def test_one_strand_only(tmp_path: Path, fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(
        tmp_path / "run", dataclasses.replace(CONFIG, vocab_size=25, max_length=None), 5, alphabet="protein"
    )
    assert call(tmp_path / "run", fasta, tmp_path / "out.parquet") == 2
    assert "alphabet 'protein' has one strand only: add --strand forward" in capsys.readouterr().err
    assert call(tmp_path / "run", fasta, tmp_path / "out.parquet", "--strand", "forward") == 0
