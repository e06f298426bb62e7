"""Whether a job starts again after training has ended in it: what `slurm/train.sbatch` asks at its end.

`decide` is pure. A job may start again for as long as its starts bring the run forward: only starts in a row that
published no newer checkpoint are counted. What SLURM starts again by itself (after a preemption or a lost node) never
gets here, and is not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish_json
from megabase.pipeline.files import read_object
from megabase.pipeline.ranks.stop import EXIT_AGAIN
from megabase.pipeline.rundir.paths import newest_step

BAD_INPUT = 2
# Of a shell: a program that cannot be run, or is not there.
NO_PROGRAM = (126, 127)
# A code above this is that of a process that a signal ended: 128 + the signal's number.
SIGNALLED = 128


@dataclass(frozen=True)
class Ended:
    """How a start of a job ended.

    Attributes:
        code: exit code of srun.
        state: in the status file, see `training/outcome.py`; "starting" before the ranks have met, "" if there is none.
        reached: step of the run's newest checkpoint; None if there is none, or if it is not known.
        job_state, reason: JobState and Reason of `scontrol show job`; "" if it did not answer.
    """

    code: int
    state: str = ""
    reached: int | None = None
    job_state: str = "RUNNING"
    reason: str = "None"


@dataclass(frozen=True)
class Record:
    """What a job keeps from one start to the next.

    Attributes:
        restarts: how often it was started again.
        stalls: starts in a row, up to the last, that published no newer checkpoint.
        step: of the newest checkpoint at the end of the last start.
        checkpoints: directory of the run's checkpoints, as the last start named it.
    """

    restarts: int = 0
    stalls: int = 0
    step: int | None = None
    checkpoints: str = ""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job.

    Attributes:
        again: it goes back into the queue.
        code: exit code of the job, if it does not.
        text: why, for the log.
        record: for the next start.
    """

    again: bool
    code: int
    text: str
    record: Record


def decide(ended: Ended, record: Record, max_stalls: int) -> Verdict:
    """Whether a job starts again.

    Args:
        ended: how this start ended.
        record: of the starts before.
        max_stalls: starts in a row without a newer checkpoint after which a job ends, `slurm.max_stalls`.
    """
    # srun reports the code of a task that it killed, not of the task that failed.
    code = 1 if ended.state == "failed" and ended.code > SIGNALLED else ended.code
    what = f"ended with code {code}" + (f" ({ended.state})" if ended.state else "")
    if ended.state == "finished":
        done = f"training is finished; srun exited with code {code} afterwards" if code else ""
        return Verdict(False, 0, done, record)
    if ended.state == "stopped":
        text = (
            "a STOP file in the run directory stopped training: not started again; the checkpoint is complete"
        )
        return Verdict(False, EXIT_AGAIN, text, record)
    checkpointed = ended.state == "again" or (not ended.state and code == EXIT_AGAIN)
    if checkpointed:
        code, what = EXIT_AGAIN, "checkpointed"
    if not _may_differ_next_time(ended, code, record):
        return Verdict(False, code, f"{what}; not started again", record)
    known = record.step if ended.reached is None else ended.reached
    progressed = known is not None and (record.step is None or known > record.step)
    stalls = 0 if progressed else record.stalls + 1
    if stalls > max_stalls:
        place = "without a checkpoint" if known is None else f"after the checkpoint of step {known}"
        text = f"{what}, {stalls} times {place} (slurm.max_stalls={max_stalls}): not started again"
        return Verdict(False, code, text, record)
    if ended.job_state not in ("RUNNING", "") and ended.reason != "TimeLimit":
        text = f"{what}; SLURM is ending it (scancel, or a preemption that requeues it itself): no requeue from here"
        return Verdict(False, code, text, record)
    counted = (
        f"; {stalls} of at most {max_stalls} starts in a row without a newer checkpoint" if stalls else ""
    )
    again = replace(record, restarts=record.restarts + 1, stalls=stalls, step=known)
    return Verdict(True, code, f"{what}; back in the queue (restart {again.restarts}{counted})", again)


def _may_differ_next_time(ended: Ended, code: int, record: Record) -> bool:
    """Whether another start can end differently."""
    if ended.state == "failed" or code == BAD_INPUT or code in NO_PROGRAM:
        return False
    if ended.state or code > SIGNALLED or code == EXIT_AGAIN:
        return True
    # It ended before it wrote a status, for example while it imported its libraries. If that went well before, it may
    # go well again.
    return record.step is not None


def judge(status: Path, record: Path, code: int, job_state: str, reason: str, max_stalls: int) -> Verdict:
    """Read what a start left, decide, and write the record for the next start.

    Args:
        status: the status file of this start; need not exist.
        record: of the job; need not exist. It is removed if the job does not start again.
        code, job_state, reason: see `Ended`.
        max_stalls: see `decide`.

    Raises:
        OSError: the record cannot be written.
    """
    known = Record(**_read(record, asdict(Record())))
    left = _read(status, {"state": "", "checkpoints": known.checkpoints})
    known = replace(known, checkpoints=left["checkpoints"])
    reached = newest_step(Path(known.checkpoints)) if known.checkpoints else None
    verdict = decide(Ended(code, left["state"], reached, job_state, reason), known, max_stalls)
    if verdict.again:
        publish_json(record, asdict(verdict.record))
    else:
        record.unlink(missing_ok=True)
    return verdict


def _read(path: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """The values of a JSON object under the names of `defaults`; a file that is missing or damaged has none."""
    found = read_object(path)
    return {name: found.get(name, value) for name, value in defaults.items()}
