"""`megabase doctor` on this machine, and how its table and exit code follow from what was found."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.doctor import run
from megabase.pipeline.doctor.finding import WRONG, Finding, note, ok, wrong


@pytest.mark.slow
def test_this_machine(
    tmp_path: Path, lambda_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(["doctor", f"run.root={tmp_path / 'runs'}", f"data.shards={lambda_shards}", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == int(any(each["state"] == WRONG for each in found))
    names = {each["what"] for each in found}
    assert {"packages", "GPUs", "CPU kernel", "gloo", "SLURM", "MLflow", "clock", "shards"} <= names
    assert all(each["way_out"] for each in found if each["state"] == WRONG)
    assert list(tmp_path.iterdir()) == []


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [ok("a", "fine"), note("b", "odd", "look"), wrong("c", "broken", "mend it")]

    def check(config: RunConfig) -> Iterator[Finding]:
        yield from findings

    monkeypatch.setattr(run, "check", check)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["ok", "a", "fine"],
        ["note", "b", "odd"],
        ["->", "look"],
        ["wrong", "c", "broken"],
        ["->", "mend", "it"],
        ["1", "thing", "to", "mend"],
    ]
    findings.pop()
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("nothing is wrong\n")


def test_settings_that_cannot_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "none.yaml"]) == 2
    assert cli.main(["doctor", "run.rot=x"]) == 2
    assert "run.root" in capsys.readouterr().err
