"""The status of a run, for people and for the job script."""

import json
from pathlib import Path

import pytest

from megabase.pipeline.rundir.status import read_status, write_launcher_status, write_status


def test_the_status_of_a_run(tmp_path: Path) -> None:
    write_status(tmp_path, "running", 3)
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "running", "step": 3}
    assert read_status(tmp_path) == ("running", 3)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"state": "finished"}'])
def test_without_a_readable_status_there_is_no_state(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) == ("", None)


def test_the_status_is_also_written_to_the_file_that_the_job_script_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGABASE_STATUS_FILE", raising=False)
    write_launcher_status("failed", None)
    file = tmp_path / "for-the-job"
    monkeypatch.setenv("MEGABASE_STATUS_FILE", str(file))
    write_launcher_status("failed", None)
    assert json.loads(file.read_text()) == {"state": "failed", "step": None}
    write_launcher_status("again", 7, tmp_path / "run")
    checkpoints = str(tmp_path / "run" / "checkpoints")
    assert json.loads(file.read_text()) == {"state": "again", "step": 7, "checkpoints": checkpoints}


def test_a_status_that_cannot_be_written_is_logged_and_not_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status(tmp_path / "missing", "running", 3)
    assert "cannot write" in capsys.readouterr().err
