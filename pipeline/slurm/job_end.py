"""Whether a job starts again after training has ended in it: what `slurm/train.sbatch` asks at its end.

`decide` is pure. A job may start again for as long as its starts bring the run forward: only starts in a row that
published no newer checkpoint are counted. What SLURM starts again by itself (after a preemption or a lost node) is not
counted. In a chain, the next job continues instead. A node on which the run failed twice is excluded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megabase.datamodules.files import publish_json
from megabase.pipeline.files import read_object
from megabase.pipeline.ranks.stop import EXIT_AGAIN
from megabase.pipeline.readable import counted
from megabase.pipeline.rundir.paths import newest_step
from megabase.pipeline.slurm.failed_nodes import read_failed_nodes

BAD_INPUT = 2
# Of a shell: a program that cannot be run, or is not there.
NO_PROGRAM = (126, 127)
# A code above this is that of a process that a signal ended: 128 + the signal's number.
SIGNALLED = 128
# A node on which this many starts failed is excluded.
NODE_FAILURES = 2
# What the job script does.
AGAIN, NEXT, END = "again", "next", "end"


@dataclass(frozen=True)
class Ended:
    """How a start of a job ended.

    Attributes:
        code: exit code of srun.
        state: in the status file, see `training/outcome.py`; "starting" before the ranks have met, "" if there is none.
        reached: step of the run's newest checkpoint; None if there is none, or if it is not known.
        job_state, reason: JobState and Reason of `scontrol show job`; "" if it did not answer.
        cancelled: by scancel, as the job's log says.
        failed: nodes that failed, see `failed_nodes.py`.
    """

    code: int
    state: str = ""
    reached: int | None = None
    job_state: str = "RUNNING"
    reason: str = "None"
    cancelled: bool = False
    failed: frozenset[str] = frozenset()

    @property
    def ending(self) -> bool:
        """Whether SLURM is ending the job: its tasks do not end by themselves."""
        return self.job_state not in ("RUNNING", "")


@dataclass(frozen=True)
class Place:
    """Where the job starts again.

    Attributes:
        successors: jobs that follow this one in a chain; None if it is in no chain, and can be requeued.
        needed: nodes of the job.
        usable: nodes of its partition that work; empty: not known.
        excluded, required: nodes that the job must not, and must, have.
    """

    successors: Sequence[int] | None = None
    needed: int = 1
    usable: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Record:
    """What a job keeps from one start to the next.

    Attributes:
        restarts: how often it was started again.
        stalls: starts in a row, up to the last, that published no newer checkpoint.
        step: of the newest checkpoint at the end of the last start.
        checkpoints: directory of the run's checkpoints, as the last start named it.
        failures: by node, how many starts failed on it.
    """

    restarts: int = 0
    stalls: int = 0
    step: int | None = None
    checkpoints: str = ""
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job.

    Attributes:
        what: AGAIN: it goes back into the queue. NEXT: it ends; what SLURM starts again, or the next job of its chain,
            continues. END: it ends, and the jobs that follow it in a chain are cancelled.
        code: exit code of the job, if it does not start again.
        text: why, for the log.
        record: for the next start.
        exclude: nodes that the next start must not get, besides those that are excluded already.
    """

    what: str
    code: int
    text: str
    record: Record
    exclude: tuple[str, ...] = ()


def decide(ended: Ended, record: Record, max_stalls: int, place: Place = Place()) -> Verdict:
    """Whether a job starts again.

    Args:
        ended: how this start ended.
        record: of the starts before.
        max_stalls: starts in a row without a newer checkpoint after which a job ends, `slurm.max_stalls`.
        place: where it would start again.
    """
    # srun reports the code of a task that it killed, not of the task that failed.
    code = 1 if ended.state == "failed" and ended.code > SIGNALLED else ended.code
    what = f"ended with code {code}" + (f" ({ended.state})" if ended.state else "")
    if ended.state == "finished":
        done = f"training is finished; srun exited with code {code} afterwards" if code else ""
        return Verdict(END, 0, done, record)
    if ended.state == "stopped":
        text = (
            "a STOP file in the run directory stopped training: not started again; the checkpoint is complete"
        )
        return Verdict(END, EXIT_AGAIN, text, record)
    checkpointed = ended.state == "again" or (not ended.state and code == EXIT_AGAIN)
    if checkpointed:
        code, what = EXIT_AGAIN, "checkpointed"
    if not _may_differ_next_time(ended, code, record):
        return Verdict(END, code, f"{what}; not started again", record)
    known = record.step if ended.reached is None else ended.reached
    progressed = known is not None and (record.step is None or known > record.step)
    stalls = 0 if progressed else record.stalls + 1
    if not checkpointed and not ended.cancelled:
        record = _with_failures(record, ended.failed)
    exclude, about_nodes = _exclude(record, place)
    if ended.ending and ended.reason != "TimeLimit":
        text = f"{what}; SLURM is ending it (scancel, a lost node or a preemption): no requeue from here"
        what = END if ended.cancelled else NEXT
        return Verdict(what, code, text + about_nodes, replace(record, step=known), exclude)
    if stalls > max_stalls:
        where = "without a checkpoint" if known is None else f"after the checkpoint of step {known}"
        text = f"{what}, {stalls} times {where} (slurm.max_stalls={max_stalls}): not started again"
        return Verdict(END, code, text, record)
    again = replace(record, restarts=record.restarts + 1, stalls=stalls, step=known)
    counts = (
        f"; {stalls} of at most {max_stalls} starts in a row without a newer checkpoint" if stalls else ""
    )
    how = f"(restart {again.restarts}{counts}){about_nodes}"
    if place.successors is None:
        return Verdict(AGAIN, code, f"{what}; back in the queue {how}", again, exclude)
    if not place.successors:
        text = f"{what}; this was the last job of its chain: submit the run again to continue"
        return Verdict(END, code, text, again)
    return Verdict(NEXT, code, f"{what}; job {place.successors[0]} continues {how}", again, exclude)


def _with_failures(record: Record, nodes: frozenset[str]) -> Record:
    """The record with one more failure of each of `nodes`."""
    more = {node: record.failures.get(node, 0) + 1 for node in sorted(nodes)}
    return replace(record, failures=record.failures | more)


def _exclude(record: Record, place: Place) -> tuple[tuple[str, ...], str]:
    """The nodes to exclude from now on, and what the log says of them."""
    bad = [node for node, times in record.failures.items() if times >= NODE_FAILURES]
    new = tuple(sorted(set(bad) - place.excluded))
    if not new:
        return (), ""
    names = f"{', '.join(new)} failed {NODE_FAILURES} times or more"
    if fixed := place.required.intersection(new):
        return (), f"; {names}, but the job asks for {', '.join(sorted(fixed))}: not excluded"
    left = len(place.usable - place.excluded - set(new))
    if place.usable and left < place.needed:
        others = f"{counted(left, 'other node')} of the partition"
        return (), f"; {names}, but the job needs {place.needed} and has {others}: not excluded"
    return new, f"; {names}: excluded from now on"


def _may_differ_next_time(ended: Ended, code: int, record: Record) -> bool:
    """Whether another start can end differently."""
    if ended.state == "failed" or code == BAD_INPUT or code in NO_PROGRAM:
        return False
    if ended.state or code > SIGNALLED or code == EXIT_AGAIN:
        return True
    # It ended before it wrote a status, for example while it imported its libraries. If that went well before, it may
    # go well again.
    return record.step is not None


def was_cancelled(log: Path, job: str) -> bool:
    """Whether the log of a job says that scancel ended it.

    slurmstepd writes there `*** JOB 12 ON n1 CANCELLED AT 2026-01-31T12:00:00 ***`, with `DUE TO ...` before the last
    asterisks if SLURM ended it for a reason of its own. After scancel there is no further start.

    Args:
        log: of the job; need not exist.
        job: its id.
    """
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return False
    return bool(re.search(rf"\*\*\* JOB {re.escape(job)} ON \S+ CANCELLED AT \S+ \*\*\*", text))


@dataclass(frozen=True)
class Files:
    """What a start and those before it left. None of the files needs to exist.

    Attributes:
        status: the status file of this start, in the directory of its logs.
        record: of the job, or of its chain. It is removed when the run needs no further start.
        log: of the job.
    """

    status: Path
    record: Path
    log: Path


def judge(files: Files, ended: Ended, job: str, seconds: float, max_stalls: int, place: Place) -> Verdict:
    """Read what a start left, decide, and write the record for the next start.

    Args:
        files: to read.
        ended: its code, job_state and reason; the rest is read.
        job: its id.
        seconds: since this start began.
        max_stalls, place: see `decide`.

    Raises:
        OSError: the record cannot be written.
    """
    since = time.time() - seconds
    known = Record(**_read(files.record, asdict(Record())))
    left = _read(files.status, {"state": "", "checkpoints": known.checkpoints})
    known = replace(known, checkpoints=left["checkpoints"])
    checkpoints = Path(known.checkpoints) if known.checkpoints else None
    ended = replace(
        ended,
        state=left["state"],
        reached=newest_step(checkpoints) if checkpoints else None,
        cancelled=was_cancelled(files.log, job),
        failed=read_failed_nodes(
            files.status.parent, checkpoints and checkpoints.parent, since, lost_only=ended.ending
        ),
    )
    verdict = decide(ended, known, max_stalls, place)
    if verdict.what == END:
        files.record.unlink(missing_ok=True)
    else:
        publish_json(files.record, asdict(verdict.record))
    return verdict


def _read(path: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """The values of a JSON object under the names of `defaults`; a file that is missing or damaged has none."""
    found = read_object(path)
    return {name: found.get(name, value) for name, value in defaults.items()}
