"""What a job does, as seen in its run directory; whether the phase of a kill has begun."""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.damages import EVALUATE_EVERY, SAVE_EVERY
from tests.torture.plan import (
    EVALUATING,
    FULL_DISK,
    FULL_START,
    IMPORTING,
    PRUNING,
    PUBLISHING,
    RESUMING,
    TRAINING,
    WRITING,
    Kill,
)
from tests.torture.rundir import complete_lines, modified, names_in, read, rows, size_of


class View:
    """A run directory, read again and again while a job writes in it.

    Attributes:
        ready: the ranks have joined their group and chosen a checkpoint.
        steps: steps of the training rows that this job added to the journal.
        evaluations: the same of the rows of evaluations.
        partials: names of unfinished checkpoints that appeared since the start of the job.
        published: the same of published checkpoints.
        manifests: how many of these checkpoints have had a manifest.
        times: event -> when it was first seen, by `time.monotonic`.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._config = modified(run / "config.yaml")
        self._before = names_in(run / "checkpoints")
        self._journal = (modified(run / "metrics.jsonl"), size_of(run / "metrics.jsonl"))
        self._known = complete_lines(read(run / "metrics.jsonl"))
        self.ready = False
        self.steps: list[int] = []
        self.evaluations: list[int] = []
        self.partials: list[str] = []
        self.published: list[str] = []
        self.manifests = 0
        self.times: dict[str, float] = {}

    def look(self) -> None:
        """Read the run directory once."""
        now = names_in(self._run / "checkpoints")
        for name in sorted(now - self._before, key=lambda name: (len(name), name)):
            if name.endswith(".partial") and name not in self.partials:
                self.partials.append(name)
                self.times[f"{name} appeared"] = time.monotonic()
            elif re.fullmatch(r"step-\d+", name) and name not in self.published:
                self.published.append(name)
                self.times[f"{name} appeared"] = time.monotonic()
        # A manifest may be moved away between two looks: the published checkpoint shows that it existed.
        waiting = [n for n in self.partials if n.removesuffix(".partial") not in self.published]
        existing = [n for n in waiting if (self._run / "checkpoints" / n / "megabase.json").exists()]
        self.manifests = len(self.published) + len(existing)
        self._before &= now  # a name that was deleted is new when it appears again
        if not self.ready and modified(self._run / "config.yaml") != self._config:
            self.ready = True
            self.times["ready"] = time.monotonic()
        journal = (modified(self._run / "metrics.jsonl"), size_of(self._run / "metrics.jsonl"))
        if journal != self._journal:
            self._journal = journal
            self._read_journal()

    def _read_journal(self) -> None:
        content = read(self._run / "metrics.jsonl")
        if content.startswith(self._known):
            for row in rows(content[len(self._known) :]):
                kind = self.steps if "loss" in row else self.evaluations
                kind.append(row["step"])
                self.times[f"{'row' if 'loss' in row else 'evaluation'} {row['step']}"] = time.monotonic()
        self._known = complete_lines(content)


@dataclass
class Pace:
    """How long each phase usually takes, in seconds. The moment of a kill is a fraction of it."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def of(self, phase: str) -> float:
        """The usual length of a phase; if none was seen yet, a guess."""
        lengths = self.seen.get(phase)
        return (
            statistics.median(lengths[-20:])
            if lengths
            else {IMPORTING: 10.0, RESUMING: 2.0}.get(phase, 0.004)
        )

    def learn(self, view: View, began: float) -> None:
        """Add the lengths of the phases that a start went through."""
        times = view.times
        if "ready" in times:
            self._add(IMPORTING, times["ready"] - began)
            if view.steps:
                self._add(RESUMING, times[f"row {view.steps[0]}"] - times["ready"])
        for name in view.published:
            if f"{name}.partial appeared" in times:
                self._add(WRITING, times[f"{name} appeared"] - times[f"{name}.partial appeared"])
        for step in view.evaluations:
            before = times.get(f"step-{step} appeared", times.get(f"row {step}"))
            if before is not None:
                self._add(EVALUATING, times[f"evaluation {step}"] - before)
        for before, after in zip(view.steps, view.steps[1:], strict=False):
            self._add(TRAINING, times[f"row {after}"] - times[f"row {before}"])

    def _add(self, phase: str, seconds: float) -> None:
        if seconds > 0:
            self.seen.setdefault(phase, []).append(seconds)


def has_begun(kill: Kill, view: View) -> bool:
    """Whether the phase of a kill has begun."""
    if kill.phase in (IMPORTING, FULL_START):
        return True
    if kill.phase == RESUMING:
        return view.ready
    if kill.phase in (TRAINING, FULL_DISK):
        return len(view.steps) >= kill.nth
    if kill.phase == WRITING:
        return len(view.partials) >= kill.nth
    if kill.phase == PUBLISHING:
        return view.manifests >= kill.nth
    if kill.phase == PRUNING:
        return len(view.published) >= kill.nth
    due = [step for step in view.steps[-1:] if step % EVALUATE_EVERY == 0 and step not in view.evaluations]
    return any(step % SAVE_EVERY or f"step-{step}" in view.published for step in due)
