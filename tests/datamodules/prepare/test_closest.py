"""A name that no record has leads to the record that was meant."""

import pytest

from megabase.datamodules.prepare.closest import closest, hint

HUMAN = [f"chr{name}" for name in (*range(1, 23), "X", "Y", "M")]


@pytest.mark.parametrize(
    ("name", "names", "meant"),
    [
        ("chrb", ["chrA", "chrB"], "chrB"),
        ("8", HUMAN, "chr8"),
        ("chr8", [name.removeprefix("chr") for name in HUMAN], "8"),
        ("NC_007795", ["gi|88193823|ref|NC_007795.1|", "gi|1|ref|NC_1.1|"], "gi|88193823|ref|NC_007795.1|"),
        ("scafold_12", ["scaffold_1", "scaffold_12"], "scaffold_12"),
        ("plasmid", HUMAN, ""),
        ("x", [], ""),
    ],
)
def test_closest(name: str, names: list[str], meant: str) -> None:
    assert closest(name, names) == meant


def test_hint_lists_the_names_where_they_are_few() -> None:
    assert hint("8", HUMAN) == "; did you mean 'chr8'?"
    assert hint("b", ["A", "B"]) == "; did you mean 'B'? The records are A, B"
    assert hint("b", ["B"]) == "; did you mean 'B'?"
    assert hint("q", ["A", "B"]) == "; the records are A, B"
    assert hint("plasmid", HUMAN) == "; records have names such as 'chr1'"
    assert hint("x", []) == ""
