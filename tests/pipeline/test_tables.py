"""Tables: rich on a terminal, one greppable line for each row in a pipe."""

import re
import sys

import pytest

from megabase.pipeline.tables import new_table, show


def print_table() -> None:
    table = new_table(["name", "size", "state"], left=["name", "state"])
    table.add_row("step-5", "12", "verified")
    table.add_row("step-1000", "7", "broken: " + "/long/path" * 30)
    show("title", table, "end")


def test_in_a_pipe_a_row_is_a_line_whatever_its_length(capsys: pytest.CaptureFixture[str]) -> None:
    print_table()
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "name       size  state",
        "step-5       12  verified",
        "step-1000     7  broken: " + "/long/path" * 30,
        "end",
    ]


def test_on_a_terminal_a_table_fits_its_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    print_table()
    printed = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert all(len(line) <= 60 for line in printed) and any("─" in line for line in printed)
    # Nothing is cut off.
    assert "".join(" ".join(printed).split()).count("/long/path") == 30


def test_brackets_in_a_cell_are_not_a_style(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table(["file"], left=["file"])
    table.add_row("a[red].fa")
    show(table)
    assert capsys.readouterr().out == "file\na[red].fa\n"
