"""Paths of results are checked before minutes of measuring."""

from __future__ import annotations

import pytest

from megabase.pipeline.bench.files import Files
from megabase.pipeline.errors import UserError


def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path):
    existing = tmp_path / "existing.json"
    existing.write_text("before")
    Files.of(existing, tmp_path / "new.png")
    assert existing.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["existing.json"]
    with pytest.raises(UserError, match="cannot be written"):
        Files.of(tmp_path, None)
