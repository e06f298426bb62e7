"""The commands that messages suggest: only for files that they can correct."""

from pathlib import Path

import pytest

from megabase.datamodules.prepare.rewrite import with_numbers, with_t_for_u


@pytest.mark.parametrize(
    "name", ["a.genbank", "a.GBK.gz", "a.embl", "a.tar", "a.jsonl.zst", ".pipes-x1/stdin"]
)
def test_no_command_is_suggested_for_what_it_would_spoil(name: str) -> None:
    assert with_t_for_u(Path(name)) == "change it in the sequences"
    assert with_numbers(Path(name)) == "rename one"


def test_upper_case_suffixes_are_those_of_lower_case() -> None:
    assert with_t_for_u(Path("a.FQ")) == "`cat a.FQ | sed '2~4y/Uu/Tt/' > a.dna.FQ`"
