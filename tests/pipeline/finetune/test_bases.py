"""Windows of a genome with a label for each base, from BED and from bigWig."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyBigWig
import pytest

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.report.classes import REST
from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune import baseline
from megabase.pipeline.finetune.baseline import base_baseline
from megabase.pipeline.finetune.bases import known, neighbourhoods, per_base_examples
from megabase.pipeline.finetune.examples import Examples
from megabase.pipeline.finetune.metrics import accuracy

DNA = Alphabet.named("dna")


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    path = tmp_path / "g.fa"
    path.write_text(">a\n" + "ACGT" * 10 + "\n>b\n" + "NNAC" * 5 + "\n>c\nAAAA\n")
    return path


def made(folder: Path, genome: Path, text: str, window: int = 8) -> Examples:
    (folder / "l.bed").write_text(text)
    return per_base_examples(folder / "l.bed", genome, DNA, window)


def test_windows_of_a_bed_file(tmp_path: Path, genome: Path) -> None:
    examples = made(tmp_path, genome, "a\t3\t10\tgene\nb\t0\t4\trepeat\na\t8\t12\tgene\n")
    assert examples.problem.classes == ("gene", "repeat", REST) and examples.problem.per_base
    # Record c has no interval, so it is not annotated.
    assert examples.names == [f"a:{start}-{start + 8}" for start in range(0, 40, 8)] + [
        "b:0-8",
        "b:8-16",
        "b:16-20",
    ]
    assert examples.sequences[0] == b"ACGTACGT" and examples.sequences[-1] == b"NNAC"
    assert examples.labels[0].tolist() == [2, 2, 2, 0, 0, 0, 0, 0]
    assert examples.labels[1].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert np.array_equal(examples.labels[5], [np.nan, np.nan, 1, 1, np.nan, np.nan, 2, 2], equal_nan=True)
    # The end of the genome is for test, and what comes before it for validation.
    assert examples.splits == ["train"] * 6 + ["valid", "test"]
    # The order of the intervals in the file does not matter.
    assert made(tmp_path, genome, "b\t0\t4\trepeat\na\t3\t10\tgene\na\t8\t12\tgene\n").names == examples.names
    assert known(examples.labels, np.array([5])).tolist() == [1, 1, 2, 2]


def test_windows_of_a_bigwig_file(tmp_path: Path, genome: Path) -> None:
    path = tmp_path / "l.bw"
    file = pyBigWig.open(str(path), "w")
    file.addHeader([("a", 40)])
    file.addEntries("a", 4, values=[0.5, 1.5, 2.5] + [3.0] * 20, span=1, step=1)
    file.close()
    examples = per_base_examples(path, genome, DNA, 8)
    assert examples.problem.classes == () and examples.names == [f"a:{n}-{n + 8}" for n in (0, 8, 16, 24)]
    wanted = [np.nan] * 4 + [0.5, 1.5, 2.5, 3.0]
    assert np.array_equal(examples.labels[0], wanted, equal_nan=True)
    path.write_text("text")
    with pytest.raises(UserError, match="cannot be read as bigWig"):
        per_base_examples(path, genome, DNA, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\t3\t10\tx\na\t9\t12\ty\n", r"line 2: a \[9, 12\) y overlaps an interval of another class"),
        ("z\t3\t10\tx\n", "line 1: .* has no record 'z'"),
        ("a\t3\t41\tx\n", "line 1: .* reaches beyond record 'a' of 40 bases"),
        ("# nothing\n", "holds no interval"),
        ("c\t0\t2\tx\n", "only 1 windows of 8 bases have labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, genome: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, genome, text)


def test_the_baseline_sees_the_letters_around_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    letters = random.choice(list("ACGT"), 1200)
    (tmp_path / "g.fa").write_text(">a\n" + "".join(letters) + "\n")
    after_t = [place for place in range(1, 1200) if letters[place - 1] == "T"]
    text = "".join(f"a\t{place}\t{place + 1}\tafter\n" for place in after_t)
    examples = made(tmp_path, tmp_path / "g.fa", text, 100)
    around, labels, windows = neighbourhoods(examples, DNA, np.array([1, 2]), 3, 0)
    assert (
        np.array_equal(labels == 0, around[:, 0] == 8) or labels[0] == 0
    )  # T, but before a window it is not seen
    assert (around[0, 0], around[100, 0]) == (0, 0) and windows.tolist() == [0] * 100 + [1] * 100
    assert len(neighbourhoods(examples, DNA, np.array([1, 2]), 3, 50)[1]) == 50
    monkeypatch.setattr(baseline, "WIDTHS", (3,))
    monkeypatch.setattr(baseline, "STRENGTHS", (10.0,))
    found = base_baseline(examples, DNA)
    assert found.name == "3 letters around each base, logistic regression, C=10"
    assert accuracy(known(examples.labels, examples.of("test")), found.found) > 0.97
