"""Paths of results are checked before minutes of measuring."""

from __future__ import annotations

import pytest

from megabase.pipeline.bench.files import Files
from megabase.pipeline.errors import UserError


def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("before")
    Files.of(there, tmp_path / "new.png")
    assert there.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    with pytest.raises(UserError, match="cannot be written"):
        Files.of(tmp_path, None)
