"""Whether a SLURM job starts again: a table of every way in which training ends."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline import cli
from megabase.pipeline.slurm.job_end import Ended, Record, decide

FIRST = Record()
LATER = Record(restarts=2, stalls=0, step=10)


@pytest.mark.parametrize(
    ("ended", "record", "again", "code", "text"),
    [
        (Ended(0, "finished"), FIRST, False, 0, ""),
        (
            Ended(139, "finished"),
            LATER,
            False,
            0,
            "training is finished; srun exited with code 139 afterwards",
        ),
        (Ended(75, "stopped", 20), LATER, False, 75, "a STOP file in the run directory stopped training"),
        (Ended(75, "again", 20), LATER, True, 75, "checkpointed; back in the queue (restart 3)"),
        # srun killed rank 0 before it exited, or rank 0 wrote no status.
        (Ended(143, "again", 20), FIRST, True, 75, "checkpointed; back in the queue (restart 1)"),
        (Ended(75, "", 20), FIRST, True, 75, "checkpointed; back in the queue"),
        (Ended(1, "failed", 20), LATER, False, 1, "ended with code 1 (failed); not started again"),
        (Ended(143, "failed", 20), LATER, False, 1, "ended with code 1 (failed); not started again"),
        (Ended(2), LATER, False, 2, "ended with code 2; not started again"),
        (Ended(127), LATER, False, 127, "ended with code 127; not started again"),
        (
            Ended(1, "crashed", 20),
            LATER,
            True,
            1,
            "ended with code 1 (crashed); back in the queue (restart 3)",
        ),
        (Ended(137, "running", 20), LATER, True, 137, "ended with code 137 (running); back in the queue"),
        # The ranks did not meet, or memory ran out while they started: counted, but tried again.
        (Ended(1, "starting"), FIRST, True, 1, "(restart 1; 1 of at most 2 starts in a row without a newer"),
        (Ended(137), FIRST, True, 137, "(restart 1; 1 of at most 2"),
        # An error on import: there is no sign that it would go better next time, unless it did before.
        (Ended(1), FIRST, False, 1, "ended with code 1; not started again"),
        (Ended(1), LATER, True, 1, "(restart 3; 1 of at most 2"),
        # Preempted, or cancelled: SLURM decides.
        (Ended(75, "again", 20, "CANCELLED"), LATER, False, 75, "SLURM is ending it"),
        (Ended(75, "again", 20, "PREEMPTED"), LATER, False, 75, "SLURM is ending it"),
        (Ended(75, "again", 20, "TIMEOUT", "TimeLimit"), LATER, True, 75, "back in the queue"),
        # A busy controller did not answer.
        (Ended(75, "again", 20, "", ""), LATER, True, 75, "back in the queue"),
    ],
)
def test_every_end(ended: Ended, record: Record, again: bool, code: int, text: str) -> None:
    verdict = decide(ended, record, max_stalls=2)
    assert (verdict.again, verdict.code) == (again, code)
    assert text in verdict.text
    assert verdict.record.restarts == record.restarts + again


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from(["again", "crashed"])), max_size=30), st.integers(0, 4)
)
def test_a_job_ends_at_the_first_run_of_starts_without_progress(
    starts: list[tuple[bool, str]], max_stalls: int
) -> None:
    record, step, stalls = FIRST, 0, 0
    for progress, state in starts:
        step += progress
        stalls = 0 if progress else stalls + 1
        verdict = decide(Ended(75, state, step or None), record, max_stalls)
        assert verdict.again == (stalls <= max_stalls)
        if not verdict.again:
            assert f"slurm.max_stalls={max_stalls}" in verdict.text
            return
        record = verdict.record
    assert record.restarts == len(starts)


def test_the_command_reads_what_a_start_left_and_keeps_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record, run = tmp_path / "status.json", tmp_path / "job.json", tmp_path / "run ü" / "checkpoints"

    def ends(code: int, *more: str) -> str:
        words = ["job-end", "--code", str(code), "--status", str(status), "--record", str(record), *more]
        assert cli.main(words) == 0
        return capsys.readouterr().out.strip()

    (run / "step-10").mkdir(parents=True)
    status.write_text(json.dumps({"state": "crashed", "step": 12, "checkpoints": str(run)}))
    assert ends(1) == "again"
    kept = {"restarts": 1, "stalls": 0, "step": 10, "checkpoints": str(run)}
    assert json.loads(record.read_text()) == kept
    # The next start ends before it writes a status; the record says where the checkpoints are.
    status.unlink()
    assert ends(1, "--max-stalls", "1") == "again"
    assert json.loads(record.read_text()) == kept | {"restarts": 2, "stalls": 1}
    (run / "step-11").mkdir()
    assert ends(1, "--max-stalls", "1") == "again"
    assert json.loads(record.read_text()) == kept | {"restarts": 3, "step": 11}
    record.write_text("{torn")
    status.write_text(json.dumps({"state": "again", "checkpoints": str(run)}))
    assert ends(75, "--job-state", "CANCELLED") == "75"
    assert not record.exists()
