"""The tables of an evaluation."""

from megabase.pipeline.inference.evaluation.table import as_tables
from megabase.pipeline.tables import as_text
from tests.pipeline.inference.evaluation.made import made


def lines(**changes: object) -> list[list[str]]:
    parts = [part if isinstance(part, str) else as_text(part) for part in as_tables(made(**changes))]
    return [line.split() for line in "\n".join(parts).splitlines()]


def test_every_number_has_its_row() -> None:
    found = lines()
    assert " ".join(found[0]) == "runs/a (step 1,200) on split valid of shards: 3,000 windows of 64 bases"
    for row in (
        "model 1.9000 1.8900 1.9100 5,000",
        "Markov order 1 1.9700",
        "xz 2.1000 4,850",
        "32 1.9200 1.9100 1.9300 5,000",
        "16-63 1.8800 1.8700 1.8900 5,000",
        "lower case 1.7000 1.6900 1.7100 5,000",
        "(none) 0",
        "exact 64 0.4000 +1.5100 +1.5000 +1.5200",
        "exact 128",
    ):
        assert row.split() in found, row


def test_a_part_that_was_not_measured_has_no_table() -> None:
    text = [" ".join(line) for line in lines(contexts=[], cases=[], classes=[], recall=None)]
    assert not [
        line for line in text if line.startswith(("The same bases", "By letter", "By class", "Recall"))
    ]
