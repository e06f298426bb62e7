"""`megabase generate` from its command line to its files: reproducible draws, the model's numbers, bad input."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megabase.datamodules.alphabet import BOS
from megabase.models import Seeds
from megabase.pipeline import cli
from megabase.pipeline.inference import generate
from megabase.pipeline.inference.drawing import Prompt, plan
from megabase.pipeline.inference.model import load_model
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint

PROMPTS = {"one": "ACGTTGCAGGAT", "same": "acgttgcaggat", "chr2": "GATTACA"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with random weights."""
    directory = tmp_path_factory.mktemp("generate") / "run"
    write_checkpoint(directory, dataclasses.replace(CONFIG, max_length=None), 5)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.fa"
    path.write_text("".join(f">{name} described\n{letters}\n" for name, letters in PROMPTS.items()))
    return path


def call(run: Path, output: Path, *more: object) -> int:
    return cli.main(["generate", str(run), "-o", str(output), *map(str, more)])


def sequences(path: Path) -> dict[str, str]:
    """Name -> letters of a FASTA file."""
    records = path.read_text().split(">")[1:]
    return {record.split("\n")[0]: "".join(record.split("\n")[1:]) for record in records}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_files_have_the_numbers_of_one_pass(
    run: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out.fa"
    options = ["--prompts", prompts, "-n", 2, "--length", 40, "--batch", 4, "--seed", 3]
    options += ["--temperature", 0.7, "--top-p", 0.9]
    assert call(run, output, *options, "--json") == 0
    summary, loaded, found = json.loads(capsys.readouterr().out), load_model(run), sequences(output)
    assert list(found) == ["one_1", "one_2", "same_1", "same_2", "chr2_1", "chr2_2"]
    assert len(set(found.values())) == 6  # prompts of equal letters draw different sequences
    for line in lines(output):
        letters = found[line["name"]]
        assert re.fullmatch("[ACGT]{40}", letters)
        text = np.frombuffer((PROMPTS[line["prompt"]] + letters).encode(), dtype=np.uint8)
        tokens = torch.tensor([[BOS, *loaded.alphabet.encode(text).tolist()]])
        with torch.no_grad():
            every = loaded.model(tokens, seeds=Seeds(run=loaded.config.run.seed)).log_softmax(-1)
        expected = every[0, :-1].gather(1, tokens[0, 1:, None]).flatten()[-40:]
        assert line["log_probs"] == pytest.approx(expected.tolist(), abs=2e-5)
        assert line["nats"] == pytest.approx(-expected.double().sum().item(), rel=1e-5)
        assert (line["length"], line["seed"], line["stopped"]) == (40, 3, False)
    assert [line["number"] for line in lines(output)] == [1, 2] * 3
    assert summary["sequences"] == 6 and summary["letters"] == 240 and summary["model"]["step"] == 5
    assert summary["nats"] == pytest.approx(sum(line["nats"] for line in lines(output)))
    assert not output.with_name("out.fa.partial").exists()


@pytest.mark.slow
def test_a_sequence_does_not_depend_on_the_others(run: Path, prompts: Path, tmp_path: Path) -> None:
    def drawn(name: str, *more: object) -> Path:
        output = tmp_path / f"{name}.fa"
        assert call(run, output, "--length", 15, *more) == 0
        return output

    six = drawn("six", "-n", 6, "--batch", 4)
    three = drawn("three", "-n", 3, "--batch", 4)
    assert lines(three) == lines(six)[:3]
    assert list(sequences(three).items()) == list(sequences(six).items())[:3]
    assert sequences(drawn("seed", "-n", 3, "--seed", 1)) != sequences(three)
    # Another number of rows rounds the logits otherwise, by a millionth: no draw of these is that close.
    for batch in (1, 16):
        other = drawn(f"batch{batch}", "-n", 6, "--batch", batch)
        assert sequences(other) == sequences(six)
        for one, another in zip(lines(other), lines(six), strict=True):
            assert one["log_probs"] == pytest.approx(another["log_probs"], abs=2e-5)


@pytest.mark.slow
def test_portions_and_a_killed_call_write_the_same_bytes(
    run: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--length", 9, "-n", 3, "--batch", 2, "--prompts", prompts, "--forbid", "GA"]
    whole, shared, killed = (tmp_path / f"{name}.fa" for name in ("whole", "shared", "killed"))
    assert call(run, whole, *options) == 0
    for portion in ("2/2", "1/2"):
        assert not shared.exists()
        assert call(run, shared, *options, "--portion", portion) == 0
    draw_batch, batches = generate.draw_batch, []

    def stopped(*arguments: object) -> object:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(1)
        return draw_batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "draw_batch", stopped)
    assert call(run, killed, *options) == 130
    assert not killed.exists()
    capsys.readouterr()
    assert call(run, killed, *options, "--seed", 1) == 2
    assert "was left by a call with another model, input or options" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(run, killed, *options) == 0
    for output in (shared, killed):
        assert output.read_bytes() == whole.read_bytes()
        assert lines(output) == lines(whole)


@pytest.mark.slow
def test_motifs_and_shares(run: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "bounded.fa"
    options = [
        "--prompts",
        prompts,
        "-n",
        5,
        "--batch",
        10,
        "--length",
        60,
        "--forbid",
        "gaw",
        "--forbid",
        "CCC",
    ]
    assert call(run, output, *options, "--gc", "0.5:0.52") == 0
    for name, letters in sequences(output).items():
        whole = PROMPTS[name.split("_")[0]][-2:].upper() + letters
        assert not re.search("GA[AT]|[AT]TC|CCC|GGG", whole)
        assert sum(letter in "GC" for letter in letters) in (30, 31)
    forward = tmp_path / "forward.fa"
    assert call(run, forward, *options, "--forbid-strand", "forward", "--stop", "TTC") == 0
    for line, letters in zip(lines(forward), sequences(forward).values(), strict=True):
        assert not re.search("GA[AT]|CCC", letters)
        assert line["length"] == len(letters) == len(line["log_probs"])
        assert letters.find("TTC") in ((len(letters) - 3,) if line["stopped"] else (-1,))
    assert {line["stopped"] for line in lines(forward)} == {True, False}


def test_batches_hold_prompts_of_one_length() -> None:
    prompts = [Prompt("", np.zeros(length, dtype=np.int64)) for length in (3, 3, 5, 3)]
    assert plan(prompts, 2, 3) == [[(0, 0), (0, 1), (1, 0)], [(1, 1)], [(2, 0), (2, 1)], [(3, 0), (3, 1)]]


BAD = [
    ({"prompts": "none.fa"}, "none.fa: cannot be read as FASTA"),
    ({"text": "ACGT\n"}, "cannot be read as FASTA: Error in FASTA file at line 1"),
    ({"text": ""}, "holds no prompt"),
    ({"text": ">a x\nAC\n>a y\nAC\n"}, "two prompts are called 'a'"),
    ({"text": ">a\nACGTNA\n"}, "prompt 'a' has 'N' at position 5, not A, C, G or T"),
    ({"text": ">a\nAC\n>b\nACU\n"}, "prompt 'b' has 'U' at position 3"),
    ({"text": ">a\nAC\n>b\n>c\nA\n"}, "prompt 'b' is empty"),
    ({"more": ["-n", "0"]}, "--number 0: must be 1 or more"),
    ({"more": ["--length", "0"]}, "--length 0: must be 1 or more"),
    ({"more": ["--batch", "0"]}, "--batch 0: must be 1 or more"),
    ({"more": ["--temperature", "-1"]}, "--temperature=-1.0 must be at least 0"),
    ({"more": ["--top-k", "0"]}, "--top-k=0 must be at least 1"),
    ({"more": ["--top-p", "1.5"]}, "--top-p=1.5 must be above 0 and at most 1"),
    ({"more": ["--gc", "0.4"]}, "--gc 0.4: give two shares LO:HI"),
    ({"more": ["--gc", "0.4:1.1"]}, "--gc 0.4:1.1: give two shares"),
    ({"more": ["--gc", "0.6:0.4"]}, "--gc 0.6:0.4: give two shares"),
    ({"more": ["--gc", "nan:nan"]}, "give two shares"),
    ({"more": ["--gc", "0.41:0.42"]}, "--gc 0.41:0.42: no number of 9 letters is such a share"),
    ({"more": ["--gc", "0.4:0.5", "--stop", "TAA"]}, "--gc with --stop"),
    ({"more": ["--forbid", "GAZ"]}, "--forbid 'GAZ': 'Z' is unknown"),
    ({"more": ["--stop", ""]}, "--stop '': it is empty"),
    ({"more": ["--forbid", "N"]}, "--forbid: no sequence of 9 letters after prompt 'one' satisfies this"),
    ({"more": ["--forbid", "SS", "--gc", "0.9:1"]}, "--forbid and --gc: no sequence of 9 letters"),
    ({"output": "out.txt"}, "out.txt: name a FASTA file, with one of .fa, .fasta, .fna, .faa"),
    ({"output": "prompts.fa"}, "prompts.fa exists: remove it, or choose another --output"),
    ({"output": "beside.fa"}, "beside.jsonl exists, which is written too"),
    ({"model": "nowhere"}, "nowhere"),
    ({"causal": False}, "model.causal=False"),
    ({"alphabet": "bytes"}, "FASTA cannot hold every byte"),
    ({"alphabet": "protein", "more": ["--gc", "0:1"]}, "alphabet is 'protein', without bases"),
]


def test_bounds_that_no_sequence_meets_may_show_while_drawing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the first letter all are G and C, or none is: so one or four of four, or none or three, never two."""
    options = [
        "--length",
        4,
        "--forbid",
        "NWS",
        "--forbid",
        "NSW",
        "--forbid-strand",
        "forward",
        "--gc",
        "0.5:0.5",
    ]
    assert call(run, tmp_path / "out.fa", *options) == 1
    assert "--gc with --forbid: no letter can follow letter 1 of a sequence" in capsys.readouterr().err
    assert not (tmp_path / "out.fa").exists()


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(
    change: dict,
    message: str,
    run: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "beside.jsonl").touch()
    if "text" in change:
        prompts.write_text(change["text"])
    model = change.get("model", run)
    if "causal" in change or "alphabet" in change:
        name = change.get("alphabet", "dna")
        size = {"dna": 9, "bytes": 261, "protein": 25}[name]
        settings = dataclasses.replace(CONFIG, vocab_size=size, causal=change.get("causal", True))
        model = tmp_path / "other"
        write_checkpoint(model, settings, 5, alphabet=name)
    options = ["--length", "9", "--prompts", str(tmp_path / change.get("prompts", prompts.name))]
    output = tmp_path / change.get("output", "out.fa")
    assert call(model, output, *options, *change.get("more", [])) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not (tmp_path / "out.fa").exists()


def test_a_protein_begins_with_nothing(tmp_path: Path) -> None:
    settings = dataclasses.replace(CONFIG, vocab_size=25)
    write_checkpoint(tmp_path / "run", settings, 5, alphabet="protein")
    output = tmp_path / "out.faa"
    assert call(tmp_path / "run", output, "--length", 40, "--forbid", "MX", "--batch", 2) == 0
    [letters] = sequences(output).values()
    assert len(letters) == 40 and "M" not in letters[:-1]
    assert lines(output)[0]["prompt"] is None
