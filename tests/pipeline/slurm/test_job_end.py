"""Whether a SLURM job starts again: a table of every way in which training ends."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline import cli
from megabase.pipeline.slurm.job_end import AGAIN, END, NEXT, Ended, Place, Record, decide, was_cancelled

FIRST = Record()
LATER = Record(restarts=2, stalls=0, step=10)


@pytest.mark.parametrize(
    ("ended", "record", "what", "code", "text"),
    [
        (Ended(0, "finished"), FIRST, END, 0, ""),
        (
            Ended(139, "finished"),
            LATER,
            END,
            0,
            "training is finished; srun exited with code 139 afterwards",
        ),
        (Ended(75, "stopped", 20), LATER, END, 75, "a STOP file in the run directory stopped training"),
        (Ended(75, "again", 20), LATER, AGAIN, 75, "checkpointed; back in the queue (restart 3)"),
        # srun killed rank 0 before it exited, or rank 0 wrote no status.
        (Ended(143, "again", 20), FIRST, AGAIN, 75, "checkpointed; back in the queue (restart 1)"),
        (Ended(75, "", 20), FIRST, AGAIN, 75, "checkpointed; back in the queue"),
        (Ended(1, "failed", 20), LATER, END, 1, "ended with code 1 (failed); not started again"),
        (Ended(143, "failed", 20), LATER, END, 1, "ended with code 1 (failed); not started again"),
        (Ended(2), LATER, END, 2, "ended with code 2; not started again"),
        (Ended(127), LATER, END, 127, "ended with code 127; not started again"),
        (
            Ended(1, "crashed", 20),
            LATER,
            AGAIN,
            1,
            "ended with code 1 (crashed); back in the queue (restart 3)",
        ),
        (Ended(137, "running", 20), LATER, AGAIN, 137, "ended with code 137 (running); back in the queue"),
        # The ranks did not meet, or memory ran out while they started: counted, but tried again.
        (Ended(1, "starting"), FIRST, AGAIN, 1, "(restart 1; 1 of at most 2 starts in a row without a newer"),
        (Ended(137), FIRST, AGAIN, 137, "(restart 1; 1 of at most 2"),
        # An error on import: there is no sign that it would go better next time, unless it did before.
        (Ended(1), FIRST, END, 1, "ended with code 1; not started again"),
        (Ended(1), LATER, AGAIN, 1, "(restart 3; 1 of at most 2"),
        # Preempted, or its node was lost: SLURM requeues it. Cancelled: nothing does.
        (Ended(75, "again", 20, "COMPLETING"), LATER, NEXT, 75, "SLURM is ending it"),
        (Ended(75, "again", 20, "COMPLETING", cancelled=True), LATER, END, 75, "SLURM is ending it"),
        (Ended(75, "again", 20, "TIMEOUT", "TimeLimit"), LATER, AGAIN, 75, "back in the queue"),
        # A busy controller did not answer.
        (Ended(75, "again", 20, "", ""), LATER, AGAIN, 75, "back in the queue"),
    ],
)
def test_every_end(ended: Ended, record: Record, what: str, code: int, text: str) -> None:
    verdict = decide(ended, record, max_stalls=2)
    assert (verdict.what, verdict.code) == (what, code)
    assert text in verdict.text
    assert verdict.record.restarts == record.restarts + (what == AGAIN)


CHECKPOINTED, CRASHED = Ended(75, "again", 20), Ended(1, "crashed", 20)


@pytest.mark.parametrize(
    ("ended", "successors", "what", "code", "text"),
    [
        (CHECKPOINTED, [12, 13], NEXT, 75, "checkpointed; job 12 continues (restart 3)"),
        (CRASHED, [12], NEXT, 1, "ended with code 1 (crashed); job 12 continues"),
        (CRASHED, [], END, 1, "this was the last job of its chain: submit the run again to continue"),
        (Ended(0, "finished"), [12], END, 0, ""),
        (Ended(1, "failed", 20), [12], END, 1, "not started again"),
        (Ended(75, "stopped", 20), [12], END, 75, "a STOP file"),
        (Ended(2), [12], END, 2, "not started again"),
        # Preempted with PreemptMode=CANCEL, and scancel.
        (Ended(75, "again", 20, "COMPLETING"), [12], NEXT, 75, "SLURM is ending it"),
        (Ended(75, "again", 20, "COMPLETING", cancelled=True), [12], END, 75, "SLURM is ending it"),
    ],
)
def test_every_end_in_a_chain(ended: Ended, successors: list[int], what: str, code: int, text: str) -> None:
    verdict = decide(ended, LATER, max_stalls=2, place=Place(successors))
    assert (verdict.what, verdict.code) == (what, code)
    assert text in verdict.text


def test_starts_without_progress_end_a_chain() -> None:
    verdict = decide(Ended(1, "crashed", 10), replace(LATER, stalls=2), max_stalls=2, place=Place([12, 13]))
    assert verdict.what == END


ON_N2 = replace(LATER, failures={"n1": 1, "n2": 1})
DIED = Ended(137, "running", 20, failed=frozenset({"n2"}))
FOUR = frozenset({"n1", "n2", "n3", "n4"})


@pytest.mark.parametrize(
    ("ended", "record", "place", "exclude", "text"),
    [
        (DIED, LATER, Place(usable=FOUR), (), "(restart 3)"),
        (DIED, ON_N2, Place(usable=FOUR), ("n2",), "; n2 failed 2 times or more: excluded from now on"),
        # Nothing is known of the partition.
        (DIED, ON_N2, Place(), ("n2",), "excluded from now on"),
        (DIED, ON_N2, Place(needed=3, usable=FOUR), ("n2",), "excluded from now on"),
        (
            DIED,
            ON_N2,
            Place(needed=4, usable=FOUR),
            (),
            "needs 4 and has 3 other nodes of the partition: not excluded",
        ),
        (DIED, ON_N2, Place(needed=3, usable=FOUR, excluded=frozenset({"n1"})), (), "has 2 other nodes"),
        (DIED, ON_N2, Place(usable=FOUR, required=frozenset({"n2"})), (), "asks for n2: not excluded"),
        (DIED, ON_N2, Place(usable=FOUR, excluded=frozenset({"n2"})), (), "(restart 3)"),
        # A chain; a node that SLURM lost: it requeues the job itself.
        (DIED, ON_N2, Place([12], usable=FOUR), ("n2",), "job 12 continues (restart 3); n2 failed"),
        (
            replace(DIED, job_state="COMPLETING"),
            ON_N2,
            Place(usable=FOUR),
            ("n2",),
            "no requeue from here; n2",
        ),
        # Ends for which no node is to blame.
        (replace(DIED, state="again"), ON_N2, Place(usable=FOUR), (), "checkpointed"),
        (
            replace(DIED, job_state="COMPLETING", cancelled=True),
            ON_N2,
            Place(usable=FOUR),
            (),
            "SLURM is ending",
        ),
    ],
)
def test_a_node_that_failed_twice_is_excluded(
    ended: Ended, record: Record, place: Place, exclude: tuple[str, ...], text: str
) -> None:
    verdict = decide(ended, record, max_stalls=2, place=place)
    assert verdict.exclude == exclude
    assert text in verdict.text
    blamed = "checkpointed" not in verdict.text and not ended.cancelled
    assert verdict.record.failures.get("n2", 0) == record.failures.get("n2", 0) + blamed


@pytest.mark.parametrize(
    ("line", "cancelled"),
    [
        ("slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT 2026-01-31T12:00:05 ***", True),
        ("slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-01-31T12:00:05 DUE TO PREEMPTION ***", False),
        ("slurmstepd: error: *** JOB 13 ON n1 CANCELLED AT 2026-01-31T12:00:05 ***", False),
        ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-01-31T12:00:05 ***", False),
        ("slurmstepd: error: *** JOB 112 ON n1 CANCELLED AT 2026-01-31T12:00:05 ***", False),
    ],
)
def test_scancel_is_read_from_the_log(tmp_path: Path, line: str, cancelled: bool) -> None:
    log = tmp_path / "log"
    assert not was_cancelled(log, "12")
    log.write_text(f"before\n{line}\nafter\n")
    assert was_cancelled(log, "12") == cancelled


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
        assert (verdict.what == AGAIN) == (stalls <= max_stalls)
        if verdict.what != AGAIN:
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
    (tmp_path / "srun.log").write_text("srun: error: n2: task 1: Killed\n")
    status.write_text(json.dumps({"state": "crashed", "step": 12, "checkpoints": str(run)}))
    assert ends(1) == "again 1 -"
    kept = {"restarts": 1, "stalls": 0, "step": 10, "checkpoints": str(run), "failures": {"n2": 1}}
    assert json.loads(record.read_text()) == kept
    # The next start ends before it writes a status; the record says where the checkpoints are.
    status.unlink()
    assert ends(1, "--max-stalls", "1", "--usable", "n1 n2") == "again 1 n2"
    kept["failures"] = {"n2": 2}
    assert json.loads(record.read_text()) == kept | {"restarts": 2, "stalls": 1}
    (tmp_path / "srun.log").unlink()
    (run / "step-11").mkdir()
    assert ends(1, "--max-stalls", "1", "--successors", "12", "--excluded", "n2") == "next 1 -"
    assert json.loads(record.read_text()) == kept | {"restarts": 3, "step": 11}
    record.write_text("{torn")
    status.write_text(json.dumps({"state": "again", "checkpoints": str(run)}))
    assert ends(75, "--job-state", "COMPLETING") == "next 75 -"
    assert record.exists()
    assert ends(75, "--successors", "") == "end 75 -"
    assert not record.exists()
