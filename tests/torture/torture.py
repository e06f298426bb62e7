"""One torture test: the undisturbed run, then a run that is killed and damaged, checked each time, and compared."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.torture.compare import compare_checkpoints, first_difference
from tests.torture.damages import CHECKPOINT_DAMAGES, EVALUATE_EVERY, OTHER_DAMAGES, SAVE_EVERY
from tests.torture.disk import Ballast
from tests.torture.job import ROOT, Job
from tests.torture.plan import FULL_DISK, FULL_START, NEED_A_SMALL_DISK, RANK, Kill, plan
from tests.torture.rundir import (
    Failed,
    bytes_of,
    complete_lines,
    damage_of,
    is_unfinished,
    names_in,
    published,
    read,
    rows,
    size_of,
    step_of,
    summary_of,
)
from tests.torture.view import Pace, View, has_begun

GENOME = ROOT / "tests" / "data" / "lambda_phage.fna.gz"
# Dropout, accumulation (see `train`), several epochs; checkpoints of a few MB, so that writing them takes a while.
SETTINGS = [
    "data.length=256",
    "data.micro_batch=1",
    "model.dim=128",
    "model.depth=2",
    "model.layers=[local,lsh]",
    "model.dropout=0.1",
    "model.lsh.rounds=2",
    "model.lsh.chunk_length=16",
    "model.local.window=32",
    "optim.warmup_steps=5",
    "trainer.log_every_steps=1",
    f"trainer.eval_every_steps={EVALUATE_EVERY}",
    "trainer.eval_sequences=4",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "checkpoint.every_minutes=0",
    "checkpoint.keep=3",
]
# A start is killed at the latest when it has trained this many steps. The run is long enough for that before each kill.
MOST_STEPS = 8
STEPS_PER_KILL = MOST_STEPS + 2
# A job that neither prints nor writes for so many seconds hangs. A start imports torch, Lightning and DeepSpeed.
SILENCE_S = 240.0
# When a rank dies, or the disk is full, the job must end within this time. Its supervisor gives ranks 10 s.
BOUND_S = 60.0
POLL_S = 0.001


@dataclass
class Options:
    """The options of the command. chance: of each kind of damage after a kill. job: starts `megabase`."""

    kills: int = 20
    seed: int = 1
    stage: int = 2
    ranks: int = 2
    background: bool = False
    tracking: bool = False
    plain_disk: bool = False
    chance: float = 0.5
    directory: Path | None = None
    keep: bool = False
    settings: Sequence[str] = ()
    job: type[Job] = Job


class Torture:
    """One run, from the undisturbed reference to the comparison with it."""

    def __init__(self, options: Options, directory: Path, small_disk: bool) -> None:
        """directory: for everything; `directory / "disk"` is a small file system with `small_disk`."""
        self._options = options
        self._root = directory
        self._disk = directory / "disk"
        self._disk.mkdir(exist_ok=True)
        self._run = self._disk / "tortured"
        self._undisturbed = self._disk / "whole"
        self._small_disk = small_disk
        self._pace = Pace()
        # Checkpoints that this program damaged: name -> (inode, how).
        self._damaged: dict[str, tuple[int, str]] = {}
        self._left: bytes | None = None  # the journal after the last damage; None once a start has changed it
        self.pending = ""
        self.phases: Counter[str] = Counter()
        self.targets: Counter[str] = Counter()
        self.damages: Counter[str] = Counter()

    def go(self) -> str:
        """Run everything; returns in words what is identical in the two runs.

        Raises:
            Failed: a check failed, or the runs differ.
        """
        options = self._options
        self._prepare()
        print(f"the undisturbed run: {self._steps} steps", flush=True)
        self._train(self._undisturbed)
        self._reference = read(self._undisturbed / "metrics.jsonl")
        planned = plan(
            options.seed,
            options.kills,
            options.ranks,
            small_disk=self._small_disk,
            chance=options.chance,
        )
        for kill in planned:
            self._run_and_kill(kill)
        self._train(self._run, expected=self._expected_steps())
        return self._compare()

    @property
    def _steps(self) -> int:
        return STEPS_PER_KILL * (self._options.kills + 1)

    def _prepare(self) -> None:
        shards = self._root / "shards"
        job = self._options.job(
            ["prepare", str(GENOME), str(shards), "--valid", "0.1"], self._root, self._root / "prepare.log"
        )
        if not job.gone(SILENCE_S) or job.poll():
            job.end()
            raise Failed(f"cannot prepare shards: {job.output}")

    def _arguments(self, run: Path) -> list[str]:
        options = self._options
        return [
            "train",
            f"data.shards={self._root / 'shards'}",
            f"run.root={self._disk}",
            f"run.name={run.name}",
            *SETTINGS,
            # Two micro batches to a step on every rank.
            f"data.global_batch={2 * options.ranks}",
            f"trainer.max_steps={self._steps}",
            f"trainer.devices={options.ranks}",
            f"zero.stage={options.stage}",
            f"checkpoint.background={str(options.background).lower()}",
            f"tracking.enabled={str(options.tracking).lower()}",
            *options.settings,
        ]

    def _train(self, run: Path, expected: set[int] | None = None) -> None:
        """Train to the end without a kill. expected: the step from which it must resume; None: not checked."""
        job = self._options.job(self._arguments(run), self._root, self._root / f"{run.name}.log")
        view = View(run)
        began = time.monotonic()
        try:
            self._watch(job, view, lambda: False)
        finally:
            job.end()
        self._pace.learn(view, began)
        if expected is not None:
            self._print(self._check_start(job, view, expected))
        if job.poll() != 0:
            raise Failed(f"{run.name} ended with code {job.poll()}:\n{job.output[-3000:]}")

    def _run_and_kill(self, kill: Kill) -> None:
        """One start and its kill."""
        expected = self._expected_steps()
        ballast = Ballast(self._disk / "ballast")
        if kill.phase == FULL_START:
            ballast.fill(0)
        job = self._options.job(self._arguments(self._run), self._root, self._root / f"{kill.number:03}.log")
        view = View(self._run)
        began = time.monotonic()
        try:
            self._watch(job, view, lambda: has_begun(kill, view) or len(view.steps) >= MOST_STEPS)
            in_time = has_begun(kill, view)
            if kill.phase in NEED_A_SMALL_DISK:
                done = self._fill(kill, job, view, ballast)
            else:
                self._pause(job, view, kill.fraction * self._pace.of(kill.phase))
                done = self._kill(kill, job)
            if not in_time:
                done += " (the phase was not reached)"
        finally:
            job.end()
            ballast.clear()
        if not job.gone(5):
            raise Failed(f"kill {kill.number}: processes {job.members()} are still there")
        view.look()
        self._pace.learn(view, began)
        self._print(self._check_start(job, view, expected))
        self.phases[kill.phase] += 1
        found = self._check_files(kill)
        self.pending = f"{kill.number:4}  {done} at step {self._journal_step()} ({found})"
        self._damage(kill)

    def _watch(self, job: Job, view: View, until: Callable[[], bool]) -> None:
        """Read the run directory until `until` holds or the job has ended."""
        changed, last = time.monotonic(), (-1, -1)
        while job.poll() is None:
            view.look()
            if until():
                return
            if (now := (len(view.times), size_of(job.log))) != last:
                changed, last = time.monotonic(), now
            if time.monotonic() - changed > SILENCE_S:
                job.end()
                raise Failed(f"the job has done nothing for {SILENCE_S:.0f} s:\n{job.output[-3000:]}")
            time.sleep(POLL_S)
        view.look()

    def _pause(self, job: Job, view: View, seconds: float) -> None:
        """Watch for `seconds` more, or until the job has trained MOST_STEPS."""
        until = time.monotonic() + seconds
        self._watch(job, view, lambda: time.monotonic() >= until or len(view.steps) >= MOST_STEPS)

    def _kill(self, kill: Kill, job: Job) -> str:
        """Kill the target of the plan and wait until all processes are gone; returns in words what was done."""
        if job.poll() is not None:
            raise Failed(
                f"kill {kill.number}: the job ended by itself with code {job.poll()}:\n{job.output[-3000:]}"
            )
        target = job.kill(kill.target)
        self.targets[target] += 1
        killed_at = time.monotonic()
        if not job.gone(BOUND_S):
            raise Failed(
                f"kill {kill.number}: {target} was killed in {kill.phase}; {BOUND_S:.0f} s later the processes"
                f" {job.members()} are still there"
            )
        took = time.monotonic() - killed_at
        if target.startswith(RANK) and job.poll() != 1:
            raise Failed(f"kill {kill.number}: {target} was killed, the job's code is {job.poll()}, not 1")
        return f"{kill.phase}: {target} killed" + (f", gone after {took:.1f} s" if took > 1 else "")

    def _fill(self, kill: Kill, job: Job, view: View, ballast: Ballast) -> str:
        """Fill the disk. The job must end by itself, or continue without what it cannot write. Then it is killed."""
        if kill.phase == FULL_DISK:
            checkpoint = max((bytes_of(path) for path in published(self._run)), default=4 << 20)
            ballast.fill(int(kill.fraction * 1.5 * checkpoint))
        trained, filled_at = len(view.steps), time.monotonic()
        self._watch(
            job,
            view,
            lambda: len(view.steps) >= trained + MOST_STEPS // 2 or time.monotonic() - filled_at > BOUND_S,
        )
        if job.poll() is None:
            slow = len(view.steps) < trained + MOST_STEPS // 2
            self._kill(kill, job)
            if slow and kill.phase == FULL_DISK:
                raise Failed(
                    f"kill {kill.number}: with a full disk the job neither ends nor continues:\n{job.output[-3000:]}"
                )
            return f"{kill.phase} ({ballast.left >> 10} KiB left): continued, {kill.target} killed"
        if not job.gone(BOUND_S):
            raise Failed(f"kill {kill.number}: with a full disk the processes {job.members()} do not end")
        if job.poll() not in ((1,) if kill.phase == FULL_DISK else (1, 2)):
            raise Failed(
                f"kill {kill.number}: with a full disk the job's code is {job.poll()}:\n{job.output[-3000:]}"
            )
        if "Traceback" in job.output:
            raise Failed(f"kill {kill.number}: a full disk is reported by a traceback:\n{job.output[-3000:]}")
        message = [line for line in job.output.splitlines() if "megabase:" in line or "Error" in line]
        return (
            f"{kill.phase} ({ballast.left >> 10} KiB left): ended with code {job.poll()}"
            f" [{message[-1][:160] if message else 'silent'}]"
        )

    def _check_start(self, job: Job, view: View, expected: set[int]) -> str:
        """Check by its output from which checkpoint a start resumed; returns that in words."""
        output = job.output
        aside = re.findall(r"checkpoint \S*?(step-\d+) is broken", output)
        broken = f", set aside {', '.join(aside)}" if aside else ""
        found = re.search(r"resuming \S+ from \S*step-(\d+)", output)
        if found:
            step = int(found[1])
            if step not in expected:
                raise Failed(
                    f"resumed from step {step}; the newest complete checkpoint is of {sorted(expected)}:\n{output}"
                )
            return f"resumed from step {step}{broken}"
        if view.ready and expected:
            raise Failed(
                f"began again from step 0, though {sorted(expected)} are complete:\n{output[-3000:]}"
            )
        return ("began at step 0" if view.ready else "killed before it chose a checkpoint") + broken

    def _check_files(self, kill: Kill) -> str:
        """Check the files that a kill left; returns in words which checkpoints are on disk."""
        names = names_in(self._run / "checkpoints")
        for path in published(self._run):
            damaged = self._damaged.get(path.name)
            if damaged and damaged[0] == path.stat().st_ino:
                continue
            self._damaged.pop(path.name, None)
            if (damage := damage_of(path)) is not None:
                raise Failed(
                    f"kill {kill.number} ({kill.phase}): the published {path} is not complete: {damage}"
                )
        journal = read(self._run / "metrics.jsonl")
        if journal != self._left:
            self._left = None
            complete = complete_lines(journal)
            if not self._reference.startswith(complete):
                raise Failed(
                    f"kill {kill.number} ({kill.phase}): {first_difference(self._reference, complete)}"
                )
            newest = max(
                (s for s in map(step_of, published(self._run)) if not self._is_damaged(s)), default=0
            )
            if self._journal_step() < newest:
                raise Failed(
                    f"kill {kill.number} ({kill.phase}): checkpoint step-{newest} is published, the journal ends at"
                    f" step {self._journal_step()}"
                )
        left = [
            f"{name} with {summary_of(self._run / 'checkpoints' / name)}"
            for name in names
            if is_unfinished(name)
        ]
        complete_names = [path.name for path in published(self._run)]
        return f"on disk {', '.join([*complete_names, *sorted(left)]) or 'no checkpoint'}"

    def _is_damaged(self, step: int) -> bool:
        return f"step-{step}" in self._damaged

    def _journal_step(self) -> int:
        try:
            found = rows(read(self._run / "metrics.jsonl"))
        except ValueError:  # damaged here
            return -1
        return max((row["step"] for row in found if "loss" in row), default=0)

    def _expected_steps(self) -> set[int]:
        """The step from which the next start must resume: the newest undamaged checkpoint's; empty if there is none."""
        intact = [step for step in map(step_of, published(self._run)) if not self._is_damaged(step)]
        return {max(intact)} if intact else set()

    def _damage(self, kill: Kill) -> None:
        """Damage the run as planned for this kill. At least one checkpoint stays undamaged."""
        draw = random.Random(f"{self._options.seed}-{kill.number}")
        intact = [path for path in published(self._run) if not self._is_damaged(step_of(path))]
        done = []
        for name in kill.damages:
            if name in CHECKPOINT_DAMAGES:
                if len(intact) < 2:
                    continue
                what = CHECKPOINT_DAMAGES[name](intact[0], draw)
                self._damaged[intact[0].name] = (intact[0].stat().st_ino, what)
                done.append(f"{intact[0].name}: {what}")
            elif (self._run / "metrics.jsonl").exists():
                # Rows that the newest intact checkpoint does not need: after its step, which may be damaged now.
                done.append(OTHER_DAMAGES[name](self._run, draw))
            else:
                continue
            self.damages[name] += 1
        self._left = read(self._run / "metrics.jsonl")
        self._tidy()
        self.pending += f"; {'; '.join(done) or 'nothing damaged'}"

    def _tidy(self) -> None:
        """Keep three of the checkpoints that were set aside: the disk is small."""
        aside = sorted(
            (self._run / "checkpoints").glob("step-*.broken*"), key=lambda path: path.stat().st_mtime
        )
        for path in aside[:-3]:
            shutil.rmtree(path)

    def _print(self, next_start: str) -> None:
        if self.pending:
            print(f"{self.pending} -> {next_start}", flush=True)
        self.pending = ""

    def _compare(self) -> str:
        """Compare both runs; returns in words what is identical. Raises Failed if anything differs."""
        journal = read(self._run / "metrics.jsonl")
        if journal != self._reference:
            raise Failed(first_difference(self._reference, journal))
        theirs, ours = published(self._undisturbed)[0], published(self._run)[0]
        if theirs.name != ours.name or step_of(ours) != self._steps:
            raise Failed(f"the last checkpoints are {theirs} and {ours}")
        tensors, size = compare_checkpoints(theirs, ours)
        return (
            f"metrics.jsonl identical ({journal.count(10)} rows, {len(journal):,} bytes); {tensors} tensors of"
            f" {ours.name} identical ({size:,} bytes)"
        )
