"""What labels mean, which split an example is in, and what letters are warned of."""

import logging
from pathlib import Path

import pytest

from megabase.datamodules.alphabet import Alphabet
from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune.examples import AUTO, CLASSIFICATION, REGRESSION, check_letters, labelled
from megabase.pipeline.finetune.splits import split_of_each
from megabase.pipeline.finetune.tables import Table

DNA, SOURCE = Alphabet.named("dna"), Path("t.csv")


def rows(labels: list[str], splits: list[str] | None = None, sequences: list[bytes] | None = None) -> Table:
    names = [f"row {number}" for number in range(1, len(labels) + 1)]
    return Table(names, sequences or [b"ACGT"] * len(labels), labels, splits)


@pytest.mark.parametrize(
    ("labels", "task", "classes"),
    [
        (["1", "0", "1"], AUTO, ("0", "1")),
        (["10", "2", "2"], AUTO, ("2", "10")),  # numbers in their own order
        (["b", "a", "1"], AUTO, ("1", "a", "b")),
        (["0.5", "1", "2"], AUTO, ()),
        ([str(number) for number in range(30)], AUTO, ()),
        (["0.5", "1.5"], CLASSIFICATION, ("0.5", "1.5")),
        (["1", "0"], REGRESSION, ()),
    ],
)
def test_what_the_labels_mean(labels: list[str], task: str, classes: tuple[str, ...]) -> None:
    problem, numbers = labelled(rows(labels), task, SOURCE)
    assert problem.classes == classes
    expected = [classes.index(label) for label in labels] if classes else [float(label) for label in labels]
    assert numbers.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        (["1", "x"], REGRESSION, "row 2: the label 'x' is not a number"),
        (["1", "nan"], REGRESSION, "row 2: the label 'nan' is not a number"),
        (["a", ""], AUTO, "row 2: the label is empty"),
        (["a", "a"], AUTO, "every label is 'a': a classification needs two classes"),
    ],
)
def test_labels_that_cannot_be_learned(labels: list[str], task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        labelled(rows(labels), task, SOURCE)


def test_letters_outside_the_alphabet_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_letters([b"ACGTacgt"], DNA, SOURCE)
    assert not caplog.text
    check_letters([b"ACNX", b"N"], DNA, SOURCE)
    assert "3 of 5 letters ('NX') are not A, C, G or T" in caplog.text


SEQUENCES = [b"A" * size for size in range(1, 101)]


def test_a_draw_keeps_equal_sequences_together_on_both_strands() -> None:
    doubled = [*SEQUENCES, *(b"t" * len(each) for each in SEQUENCES)]
    splits = split_of_each(rows(["x"] * 200, None, doubled), DNA, 1, SOURCE)
    assert splits[:100] == splits[100:]
    assert [splits[:100].count(split) for split in ("train", "valid", "test")] == [80, 10, 10]
    assert splits == split_of_each(rows(["x"] * 200, None, doubled), DNA, 1, SOURCE)
    assert splits != split_of_each(rows(["x"] * 200, None, doubled), DNA, 2, SOURCE)


def test_a_source_without_validation_gives_some_of_its_training_split() -> None:
    given = ["train"] * 60 + ["test"] * 40
    splits = split_of_each(rows(["x"] * 100, given, SEQUENCES), DNA, 1, SOURCE)
    assert splits[60:] == ["test"] * 40 and splits[:60].count("valid") == 6
    named = ["train", "dev", "Test"]
    assert split_of_each(rows(["x"] * 3, named), DNA, 1, SOURCE) == ["train", "valid", "test"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train", "other"], "row 2: unknown split 'other'"),
        (["train", "train"], "no example is in the split 'test'"),
        (["valid", "test"], "no example is in the split 'train'"),
        (["train", "test"], "no example is left for the split 'train'"),
        (None, "no example is left for the split"),
    ],
)
def test_an_empty_split_is_refused(splits: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_of_each(rows(["x", "y"], splits), DNA, 1, SOURCE)
