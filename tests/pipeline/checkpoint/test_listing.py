"""`megabase checkpoints`: every kind of directory that a run may hold, and nothing is changed."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabase.pipeline import cli
from megabase.pipeline.checkpoint import listing
from megabase.pipeline.checkpoint.manifest import MANIFEST
from tests.pipeline.checkpoints import write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one directory of every kind."""
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    write_checkpoint(checkpoints / "step-10", created=time.time() - 3 * 86_400)
    write_checkpoint(checkpoints / "step-20", created=time.time() - 60 * 59)
    flipped = write_checkpoint(checkpoints / "step-30") / "checkpoint" / "mp_rank_00_model_states.pt"
    flipped.write_bytes(b"x" + flipped.read_bytes()[1:])
    (write_checkpoint(checkpoints / "step-40") / "latest").unlink()
    write_checkpoint(checkpoints / "step-15", name="step-15.broken")
    (write_checkpoint(checkpoints / "step-15", name="step-15.broken-1") / MANIFEST).unlink()
    write_checkpoint(checkpoints / "step-5", name="step-5.deleting")
    (checkpoints / "step-50.partial" / "checkpoint").mkdir(parents=True)
    (checkpoints / "step-50.partial" / "checkpoint" / "x.pt").write_bytes(b"half")
    write_checkpoint(checkpoints / "step-25", version=99)
    (checkpoints / "notes.txt").write_text("not ours")
    rows = [
        {"step": 10, "valid_loss": 1.5},
        {"step": 20, "valid_loss": 1.25},
        {"step": 12, "valid_loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def entries(run: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    assert cli.main(["checkpoints", str(run), "--json", *options]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["run"] == str(run)
    return {entry["name"]: entry for entry in listed["checkpoints"]}


def test_every_kind_is_listed_newest_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    listed = entries(run, capsys=capsys)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    assert {name: entry["state"] for name, entry in listed.items()} == {
        "step-50.partial": "partial",
        "step-40": "broken",
        "step-30": "broken",
        "step-25": "unknown",
        "step-20": "verified",
        "step-15.broken": "broken",
        "step-15.broken-1": "broken",
        "step-10": "verified",
        "step-5.deleting": "deleting",
    }
    assert [entry["step"] for entry in listed.values()] == [50, 40, 30, 25, 20, 15, 15, 10, 5]
    assert listed["step-30"]["reason"].endswith("states.pt has another checksum than when it was written")
    assert listed["step-40"]["reason"] == "latest is missing"
    assert listed["step-15.broken-1"]["reason"] == "megabase.json is missing"
    assert "rename it to step-15" in listed["step-15.broken"]["reason"]
    assert "update megabase" in listed["step-25"]["reason"]
    assert listed["step-20"]["valid_loss"] == 1.25 and listed["step-30"]["valid_loss"] is None
    assert (listed["step-20"]["ranks"], listed["step-20"]["stage"], listed["step-20"]["precision"]) == (
        2,
        2,
        "32",
    )
    assert listed["step-50.partial"]["bytes"] == 4 and listed["step-50.partial"]["ranks"] is None


def test_fast_reads_no_content(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megabase.pipeline.checkpoint.damage.checksum", None)
    listed = entries(run, "--fast", capsys=capsys)
    assert listed["step-30"]["state"] == listed["step-20"]["state"] == "complete"
    assert listed["step-40"]["state"] == "broken"


def test_the_table_names_the_checkpoint_to_resume_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints" / "step-25")
    assert cli.main(["checkpoints", str(run)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == [
        "checkpoint",
        "size",
        "age",
        "ranks",
        "stage",
        "precision",
        "valid",
        "bits/base",
        "state",
    ]
    row = next(line for line in lines if line.startswith("step-20 "))
    assert re.search(r"59 min +2 +2 +32 +1\.8034  verified$", row), row
    assert next(line for line in lines if line.startswith("step-10 ")).split()[3:5] == ["3", "d"]
    assert f"{run}: the next start resumes from step-20." in lines
    (run / "status.json").write_text('{"state": "finished", "step": 20}')
    assert cli.main(["checkpoints", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{run}: finished at step 20. A larger trainer.max_steps trains it further, from step-20." in out
    assert "the next start resumes" not in out
    (run / "STOP").touch()
    assert cli.main(["checkpoints", str(run)]) == 0
    assert f"{run / 'STOP'} exists: the run does not start until it is removed." in capsys.readouterr().out
    assert cli.main(["checkpoints", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["next"] == "step-20"
    assert "Checkpoints set aside as broken take" in lines[-1]
    for name in ("step-10", "step-20"):
        shutil.rmtree(run / "checkpoints" / name)
    assert cli.main(["checkpoints", str(run)]) == 0
    assert "no checkpoint to resume from" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_judged_stops_the_next_start(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["checkpoints", str(run)]) == 0
    assert (
        f"{run}: the next start cannot resume: step-25 was written by a newer megabase"
        in capsys.readouterr().out
    )


def test_a_journal_that_cannot_be_read_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert cli.main(["checkpoints", str(run)]) == 2
    assert "metrics.jsonl cannot be read: Is a directory" in capsys.readouterr().err


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = listing.find_damage

    def pruned_first(path: Path, **more: object) -> str | None:
        if path.name in ("step-10", "step-20"):
            shutil.rmtree(path)
        return check(path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "find_damage", pruned_first)
    assert not {"step-10", "step-20"} & set(entries(run, capsys=capsys))


def test_the_successor_of_a_deleted_checkpoint_is_listed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpoint.keep=1 a run has one checkpoint. While it is checked, the run replaces it by the next."""
    for name in ("step-10", "step-25"):
        shutil.rmtree(run / "checkpoints" / name)
    check = listing.find_damage

    def replaced_first(path: Path, **more: object) -> str | None:
        if path.name == "step-20":
            shutil.rmtree(path)
            write_checkpoint(run / "checkpoints" / "step-60")
        return check(path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "find_damage", replaced_first)
    assert entries(run, capsys=capsys)["step-60"]["state"] == "verified"


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("nowhere", "nowhere: no such directory: give a run directory"),
        ("run/metrics.jsonl", "metrics.jsonl: a file: give a run directory"),
        (".", "not a run directory: it has no checkpoints/"),
        ("run/checkpoints", "checkpoints: not a run directory, but inside one: give {run}"),
        ("run/checkpoints/step-10", "step-10: not a run directory, but inside one: give {run}"),
        ("new", "new has no checkpoint yet"),
    ],
)
def test_a_path_that_is_no_run_directory_gets_a_hint(
    run: Path, inside: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "new" / "checkpoints").mkdir(parents=True)
    assert cli.main(["checkpoints", str(run.parent / inside)]) == 2
    message_shown = capsys.readouterr().err
    assert message_shown.count("\n") == 1 and message.format(run=run.resolve()) in message_shown


def test_it_needs_no_torch(run: Path) -> None:
    program = (
        "import sys; from megabase.pipeline import cli\n"
        "codes = [cli.main(['checkpoints', sys.argv[1]]), cli.main(['checkpoints', 'nowhere'])]\n"
        "assert codes == [0, 2], codes\n"
        "assert not {'torch', 'deepspeed', 'mlflow'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
