"""The torture test: a run is killed N times, damaged in between, and must end as the run that nothing disturbed.

    python tests/torture.py --kills 20 [--seed S] [--stage 0..3] [--ranks 2] [--background] [--directory D] [--keep]
        [KEY=VALUE...]

Everything is the product's own `megabase train`, watched from outside. A plan is drawn from the seed: for each kill
the phase, the process, and what is damaged afterwards. The phase is recognised by what appears in the run directory;
the moment within it is a drawn fraction of how long that phase took before.

After every kill:
- the journal is the undisturbed one's beginning, byte for byte, and reaches the newest checkpoint;
- every checkpoint under its own name is whole, but for those that this program has damaged;
- no process of the job is left. If one rank was killed, the others were ended within a bounded time.
After every start: it resumed from the newest whole checkpoint. At the end: `metrics.jsonl` and every tensor of the
last checkpoint, weights and optimizer states, are those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GENOME = ROOT / "tests" / "data" / "lambda_phage.fna.gz"

SAVE_EVERY, EVALUATE_EVERY = 2, 5
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
# A kill comes at the latest when a start has trained so many steps; the run has room for as many before each.
MOST_STEPS = 8
ROOM = MOST_STEPS + 2
# A start imports torch, Lightning and DeepSpeed on every rank; one that says nothing for so long hangs.
SILENCE_S = 240.0
# When a rank dies, or the disk is full, the job must be gone after this time. The product gives ranks 10 s.
BOUND_S = 60.0
POLL_S = 0.001
DISK_BYTES = 192 << 20

IMPORTING, RESUMING, TRAINING = "start-up", "resume", "training"
WRITING, PUBLISHING, PRUNING = "writing", "publish", "pruning"
EVALUATING, FULL_DISK, FULL_START = "evaluation", "full disk", "start on a full disk"
# In the order in which the first kills take them.
PHASES = (WRITING, RESUMING, PUBLISHING, TRAINING, EVALUATING, IMPORTING, PRUNING, FULL_DISK, FULL_START)
NEED_A_SMALL_DISK = (FULL_DISK, FULL_START)
ALL, RANK, SUPERVISOR = "all processes", "rank", "the supervisor"
TARGETS = (ALL, RANK, ALL, SUPERVISOR)


class Lost(Exception):
    """The run did not survive."""


# --- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blow:
    """One kill. nth: which occasion of the phase since the start. fraction: of the phase's usual length, to wait.

    target: ALL, SUPERVISOR or "rank R"; nothing is killed when the disk is full. damages: of DAMAGES, done afterwards.
    """

    number: int
    phase: str
    nth: int
    fraction: float
    target: str
    damages: tuple[str, ...]


def plan(seed: int, kills: int, ranks: int, *, small_disk: bool, chance: float) -> list[Blow]:
    """The kills of a seed. Phases, targets and damages come from shuffled decks, so that none is left out for long."""
    draw = random.Random(seed)
    phases = _deck(draw, [p for p in PHASES if small_disk or p not in NEED_A_SMALL_DISK], in_order=True)
    targets = _deck(draw, TARGETS)
    checkpoint_damages = _deck(draw, CHECKPOINT_DAMAGES)
    others = _deck(draw, OTHER_DAMAGES)
    blows = []
    for number in range(1, kills + 1):
        phase, target = next(phases), next(targets)
        if target == RANK:
            target = f"{RANK} {draw.randrange(ranks)}"
        damages = [next(deck) for deck in (checkpoint_damages, others) if draw.random() < chance]
        blows.append(
            Blow(number, phase, draw.randint(1, 3), draw.random(), target, tuple(damages)),
        )
    return blows


def _deck(draw: random.Random, cards: Any, in_order: bool = False) -> Iterator[Any]:
    """Cards for ever: each round all of them, shuffled; the first round as they are with `in_order`."""
    cards = list(cards)
    while True:
        if not in_order:
            draw.shuffle(cards)
        in_order = False
        yield from cards


# --- damages ------------------------------------------------------------------------------------------------------


def published(run: Path) -> list[Path]:
    """Checkpoints under their own name, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split(".")[0].removeprefix("step-"))


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, judged without the product's code; None: nothing."""
    try:
        files = json.loads((checkpoint / "megabase.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest: {error!r}"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected["sha256"]:
            return f"{name} is not what the manifest says"
    return None if files else "it has no files"


def _shard(checkpoint: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(checkpoint.rglob("*.pt")))


def _cut(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    left = draw.randrange(size)
    os.truncate(path, left)
    return f"{path.name} cut to {left} of {size} bytes"


def _flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}: bit {bit} of byte {at} flipped"


def _remove(path: Path) -> str:
    path.unlink()
    return f"{path.name} removed"


CHECKPOINT_DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "shard cut": lambda checkpoint, draw: _cut(_shard(checkpoint, draw), draw),
    "shard flipped": lambda checkpoint, draw: _flip(_shard(checkpoint, draw), draw),
    "shard removed": lambda checkpoint, draw: _remove(_shard(checkpoint, draw)),
    "manifest removed": lambda checkpoint, draw: _remove(checkpoint / "megabase.json"),
    "manifest cut": lambda checkpoint, draw: _cut(checkpoint / "megabase.json", draw),
    "manifest flipped": lambda checkpoint, draw: _flip(checkpoint / "megabase.json", draw),
    "pointer removed": lambda checkpoint, draw: _remove(checkpoint / "latest"),
}


def _journal_tail(run: Path, draw: random.Random) -> str:
    """Lose rows that no whole checkpoint counts on."""
    keep = step_of(published(run)[0]) if published(run) else 0
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    needed = [number for number, line in enumerate(lines, 1) if _step_of_row(line) <= keep]
    left = draw.randint(max(needed, default=0), len(lines))
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:left]))
    return f"{len(lines) - left} lines off the end of metrics.jsonl"


def _step_of_row(line: bytes) -> float:
    """The step of a journal's line; no step's, if another damage has struck it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def _journal_torn(run: Path, draw: random.Random) -> str:
    row = b'{"step": 100000, "loss": 1.25, "lr": 0.001}\n'
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(row[: draw.randrange(1, len(row))])
    return "half a line at the end of metrics.jsonl"


def _stray_partial(run: Path, draw: random.Random) -> str:
    newest = step_of(published(run)[0]) if published(run) else 0
    stray = run / "checkpoints" / f"step-{newest + SAVE_EVERY}{draw.choice(['.partial', '.deleting'])}"
    (stray / "checkpoint").mkdir(parents=True, exist_ok=True)
    for name in ("megabase.json", "latest", "checkpoint/mp_rank_00_model_states.pt", "checkpoint/more.pt"):
        (stray / name).write_bytes(draw.randbytes(1000))
    return f"{stray.name} full of garbage"


def _stray_lock(run: Path, draw: random.Random) -> str:
    (run / ".lock").write_text(f"elsewhere process {draw.randint(1, 99999)}\n")
    return "a lock of another host's"


def _one_of(*names: str) -> Callable[[Path, random.Random], str]:
    def damage(run: Path, draw: random.Random) -> str:
        there = [run / name for name in names if (run / name).exists() and (run / name).stat().st_size]
        if not there:
            return "nothing"
        path = draw.choice(there)
        return draw.choice([lambda: _cut(path, draw), lambda: _flip(path, draw), lambda: _remove(path)])()

    return damage


OTHER_DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "journal's tail lost": _journal_tail,
    "journal torn": _journal_torn,
    "stray checkpoint": _stray_partial,
    "stray lock": _stray_lock,
    "speed damaged": _one_of("performance.jsonl"),
    "side file damaged": _one_of("status.json", "mlflow.json", "environment.json", "config.yaml", "loss.png"),
    "baselines damaged": _one_of("baselines.json"),
    "journal damaged": _one_of("metrics.jsonl"),
}


# --- the job, and what can be seen of it --------------------------------------------------------------------------


class Job:
    """`megabase ...` in a process group of its own, its output in a file."""

    def __init__(self, arguments: list[str], cwd: Path, log: Path) -> None:
        self.log = log
        self.began = time.time()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megabase.pipeline.cli", *arguments],
                cwd=cwd,
                # The code beside this file; and no GPU, because there may be fewer than ranks.
                env=os.environ
                | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Everything it printed so far."""
        return self.log.read_text(errors="replace")

    def members(self) -> list[int]:
        """Processes of its group that are alive."""
        return [pid for pid, group in _processes() if group == self.process.pid]

    def kill(self, target: str) -> str:
        """SIGKILL; returns whom, which is everybody where a rank is not there yet."""
        if target == SUPERVISOR:
            self.process.kill()
            return target
        rank = target.removeprefix(f"{RANK} ")
        for pid in self.members() if target != ALL else []:
            if pid != self.process.pid and _environment(pid).get("RANK") == rank:
                os.kill(pid, signal.SIGKILL)
                return target
        self.end()
        return ALL

    def end(self) -> None:
        """SIGKILL to every process of it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def gone(self, within: float) -> bool:
        """Wait until no process of it is left."""
        deadline = time.monotonic() + within
        while self.process.poll() is None or self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _processes() -> Iterator[tuple[int, int]]:
    """(process, its group) of all that are alive."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if state not in "ZX":
                yield int(entry.name), int(group)


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.partition("=")[::2] for entry in text.split("\0"))


class View:
    """A run directory, looked at again and again while a job writes in it.

    steps, evaluations: steps of the journal's rows since the job began to write. partials, whole: names of checkpoints
    that appeared since then. ready: the ranks have met and chosen where to go on from.
    """

    def __init__(self, run: Path, job: Job) -> None:
        self._run = run
        self._job = job
        self._config = _modified(run / "config.yaml")
        self._before = _names(run / "checkpoints")
        self._journal = (_modified(run / "metrics.jsonl"), _size(run / "metrics.jsonl"))
        self._known = _whole_lines(_read(run / "metrics.jsonl"))
        self.ready = False
        self.steps: list[int] = []
        self.evaluations: list[int] = []
        self.partials: list[str] = []
        self.whole: list[str] = []
        self.manifests = 0
        self.times: dict[str, float] = {}

    def look(self) -> None:
        """Look once."""
        now = _names(self._run / "checkpoints")
        for name in sorted(now - self._before, key=lambda name: (len(name), name)):
            if name.endswith(".partial") and name not in self.partials:
                self.partials.append(name)
                self.times[f"{name} appeared"] = time.monotonic()
            elif re.fullmatch(r"step-\d+", name) and name not in self.whole:
                self.whole.append(name)
                self.times[f"{name} appeared"] = time.monotonic()
        # A manifest that was there for less than a look is known by the rename after it.
        waiting = [n for n in self.partials if n.removesuffix(".partial") not in self.whole]
        there = [n for n in waiting if (self._run / "checkpoints" / n / "megabase.json").exists()]
        self.manifests = len(self.whole) + len(there)
        self._before &= now  # a name that is gone is new when it comes again
        if not self.ready and _modified(self._run / "config.yaml") != self._config:
            self.ready = True
            self.times["ready"] = time.monotonic()
        journal = (_modified(self._run / "metrics.jsonl"), _size(self._run / "metrics.jsonl"))
        if journal != self._journal:
            self._journal = journal
            self._read_journal()

    def _read_journal(self) -> None:
        content = _read(self._run / "metrics.jsonl")
        if content.startswith(self._known):
            for row in _rows(content[len(self._known) :]):
                kind = self.steps if "loss" in row else self.evaluations
                kind.append(row["step"])
                self.times[f"{'row' if 'loss' in row else 'evaluation'} {row['step']}"] = time.monotonic()
        self._known = _whole_lines(content)


def _names(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))  # noqa: PTH208
    except FileNotFoundError:
        return set()


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _rows(content: bytes) -> list[dict[str, Any]]:
    """The rows of whole lines."""
    return [json.loads(line) for line in _whole_lines(content).splitlines()]


def _whole_lines(content: bytes) -> bytes:
    """Without half a line at the end."""
    return content[: content.rfind(b"\n") + 1]


# --- when to strike -----------------------------------------------------------------------------------------------


@dataclass
class Pace:
    """How long phases usually take, in seconds: the moment of a kill is a fraction of it."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def of(self, phase: str) -> float:
        """The usual length of a phase; of a publish and what follows, a few milliseconds."""
        lengths = self.seen.get(phase)
        return (
            statistics.median(lengths[-20:])
            if lengths
            else {IMPORTING: 10.0, RESUMING: 2.0}.get(phase, 0.004)
        )

    def learn(self, view: View, began: float) -> None:
        """Take over what a start has shown."""
        times = view.times
        if "ready" in times:
            self._note(IMPORTING, times["ready"] - began)
            if view.steps:
                self._note(RESUMING, times[f"row {view.steps[0]}"] - times["ready"])
        for name in view.whole:
            if f"{name}.partial appeared" in times:
                self._note(WRITING, times[f"{name} appeared"] - times[f"{name}.partial appeared"])
        for step in view.evaluations:
            before = times.get(f"step-{step} appeared", times.get(f"row {step}"))
            if before is not None:
                self._note(EVALUATING, times[f"evaluation {step}"] - before)
        for before, after in zip(view.steps, view.steps[1:], strict=False):
            self._note(TRAINING, times[f"row {after}"] - times[f"row {before}"])

    def _note(self, phase: str, seconds: float) -> None:
        if seconds > 0:
            self.seen.setdefault(phase, []).append(seconds)


def arrived(blow: Blow, view: View) -> bool:
    """Whether the phase of a kill has begun."""
    if blow.phase in (IMPORTING, FULL_START):
        return True
    if blow.phase == RESUMING:
        return view.ready
    if blow.phase in (TRAINING, FULL_DISK):
        return len(view.steps) >= blow.nth
    if blow.phase == WRITING:
        return len(view.partials) >= blow.nth
    if blow.phase == PUBLISHING:
        return view.manifests >= blow.nth
    if blow.phase == PRUNING:
        return len(view.whole) >= blow.nth
    due = [step for step in view.steps[-1:] if step % EVALUATE_EVERY == 0 and step not in view.evaluations]
    return any(step % SAVE_EVERY or f"step-{step}" in view.whole for step in due)


# --- the run ------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """What the command line says. chance: of each kind of damage after a kill."""

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


class Torture:
    """One run, from the undisturbed reference to the comparison with it."""

    def __init__(self, options: Options, directory: Path, small_disk: bool) -> None:
        """directory: for everything; `directory / "disk"` is a small file system with `small_disk`."""
        self._options = options
        self._root = directory
        self._disk = directory / "disk"
        self._disk.mkdir(exist_ok=True)
        self._run = self._disk / "tortured"
        self._whole = self._disk / "whole"
        self._small_disk = small_disk
        self._pace = Pace()
        # Checkpoints that were damaged here: name -> (inode, what).
        self._spoiled: dict[str, tuple[int, str]] = {}
        self._left: bytes | None = None  # the journal as it was damaged
        self._pending = ""
        self.phases: Counter[str] = Counter()
        self.targets: Counter[str] = Counter()
        self.damages: Counter[str] = Counter()
        self.repeated = 0

    def go(self) -> str:
        """Everything. Returns what was found to be the same.

        Raises:
            Lost: it was not.
        """
        options = self._options
        self._prepare()
        print(f"the undisturbed run: {self._steps} steps", flush=True)
        self._undisturbed(self._whole)
        self._reference = _read(self._whole / "metrics.jsonl")
        blows = plan(
            options.seed,
            options.kills,
            options.ranks,
            small_disk=self._small_disk,
            chance=options.chance,
        )
        for blow in blows:
            self._strike(blow)
        self._undisturbed(self._run, expected=self._whole_steps())
        return self._compare()

    @property
    def _steps(self) -> int:
        return ROOM * (self._options.kills + 1)

    def _prepare(self) -> None:
        shards = self._root / "shards"
        job = Job(
            ["prepare", str(GENOME), str(shards), "--valid", "0.1"], self._root, self._root / "prepare.log"
        )
        if not job.gone(SILENCE_S) or job.process.returncode:
            job.end()
            raise Lost(f"cannot prepare shards: {job.output}")

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

    def _undisturbed(self, run: Path, expected: set[int] | None = None) -> None:
        """Train to the end."""
        job = Job(self._arguments(run), self._root, self._root / f"{run.name}.log")
        view = View(run, job)
        began = time.monotonic()
        try:
            self._watch(job, view, lambda: False)
        finally:
            job.end()
        self._pace.learn(view, began)
        if expected is not None:
            self._say(self._heard(job, view, expected))
        if job.process.returncode != 0:
            raise Lost(f"{run.name} ended with code {job.process.returncode}:\n{job.output[-3000:]}")

    def _strike(self, blow: Blow) -> None:
        """One start and its kill."""
        expected = self._whole_steps()
        ballast = Ballast(self._disk / "ballast")
        if blow.phase == FULL_START:
            ballast.fill(0)
        job = Job(self._arguments(self._run), self._root, self._root / f"{blow.number:03}.log")
        view = View(self._run, job)
        began = time.monotonic()
        try:
            self._watch(job, view, lambda: arrived(blow, view) or len(view.steps) >= MOST_STEPS)
            in_time = arrived(blow, view)
            if blow.phase in NEED_A_SMALL_DISK:
                done = self._fill(blow, job, view, ballast)
            else:
                self._pause(job, view, blow.fraction * self._pace.of(blow.phase))
                done = self._kill(blow, job)
            if not in_time:
                done += " (the phase did not come)"
        finally:
            job.end()
            ballast.clear()
        if not job.gone(5):
            raise Lost(f"kill {blow.number}: processes {job.members()} are still there")
        view.look()
        self._pace.learn(view, began)
        self._say(self._heard(job, view, expected))
        self.repeated += len(view.steps)
        self.phases[blow.phase] += 1
        found = self._examine(blow)
        self._pending = f"{blow.number:4}  {done} at step {self._journal_step()} ({found})"
        self._spoil(blow)

    def _watch(self, job: Job, view: View, until: Callable[[], bool]) -> None:
        """Look until something holds or the job has ended."""
        heard, last = time.monotonic(), (-1, -1)
        while job.process.poll() is None:
            view.look()
            if until():
                return
            if (now := (len(view.times), _size(job.log))) != last:
                heard, last = time.monotonic(), now
            if time.monotonic() - heard > SILENCE_S:
                job.end()
                raise Lost(f"the job has done nothing for {SILENCE_S:.0f} s:\n{job.output[-3000:]}")
            time.sleep(POLL_S)
        view.look()

    def _pause(self, job: Job, view: View, seconds: float) -> None:
        """Go on looking for a while."""
        until = time.monotonic() + seconds
        self._watch(job, view, lambda: time.monotonic() >= until or len(view.steps) >= MOST_STEPS)

    def _kill(self, blow: Blow, job: Job) -> str:
        """Kill whom the plan says, wait until the rest has noticed; returns what was done."""
        if job.process.poll() is not None:
            raise Lost(
                f"kill {blow.number}: the job ended by itself with code {job.process.returncode}:\n{job.output[-3000:]}"
            )
        target = job.kill(blow.target)
        self.targets[target] += 1
        struck = time.monotonic()
        if not job.gone(BOUND_S):
            raise Lost(
                f"kill {blow.number}: {target} was killed in {blow.phase}; {BOUND_S:.0f} s later the processes"
                f" {job.members()} are still there"
            )
        took = time.monotonic() - struck
        if target.startswith(RANK) and job.process.returncode != 1:
            raise Lost(
                f"kill {blow.number}: {target} was killed, the job's code is {job.process.returncode}, not 1"
            )
        return f"{blow.phase}: {target} killed" + (f", gone after {took:.1f} s" if took > 1 else "")

    def _fill(self, blow: Blow, job: Job, view: View, ballast: Ballast) -> str:
        """Fill the disk; the job ends by itself, or goes on without what it cannot write, and is killed then."""
        if blow.phase == FULL_DISK:
            checkpoint = max((_bytes_of(path) for path in published(self._run)), default=4 << 20)
            ballast.fill(int(blow.fraction * 1.5 * checkpoint))
        trained, struck = len(view.steps), time.monotonic()
        self._watch(
            job,
            view,
            lambda: len(view.steps) >= trained + MOST_STEPS // 2 or time.monotonic() - struck > BOUND_S,
        )
        if job.process.poll() is None:
            slow = len(view.steps) < trained + MOST_STEPS // 2
            self._kill(blow, job)
            if slow and blow.phase == FULL_DISK:
                raise Lost(
                    f"kill {blow.number}: with a full disk the job neither ends nor goes on:\n{job.output[-3000:]}"
                )
            return f"{blow.phase} ({ballast.left >> 10} KiB left): went on, {blow.target} killed"
        if not job.gone(BOUND_S):
            raise Lost(f"kill {blow.number}: with a full disk the processes {job.members()} stay")
        if job.process.returncode not in ((1,) if blow.phase == FULL_DISK else (1, 2)):
            raise Lost(
                f"kill {blow.number}: with a full disk the job's code is {job.process.returncode}:\n"
                f"{job.output[-3000:]}"
            )
        if "Traceback" in job.output:
            raise Lost(f"kill {blow.number}: a full disk is told by a traceback:\n{job.output[-3000:]}")
        told = [line for line in job.output.splitlines() if "megabase:" in line or "Error" in line]
        return (
            f"{blow.phase} ({ballast.left >> 10} KiB left): ended with code {job.process.returncode}"
            f" [{told[-1][:160] if told else 'silent'}]"
        )

    def _heard(self, job: Job, view: View, expected: set[int]) -> str:
        """What a start said about where it went on from. Raises Lost if that is not where it should."""
        output = job.output
        aside = re.findall(r"checkpoint \S*?(step-\d+) is broken", output)
        told = f", set aside {', '.join(aside)}" if aside else ""
        found = re.search(r"resuming \S+ from \S*step-(\d+)", output)
        if found:
            step = int(found[1])
            if step not in expected:
                raise Lost(
                    f"resumed from step {step}; the newest whole checkpoint is of {sorted(expected)}:\n{output}"
                )
            return f"resumed from step {step}{told}"
        if view.ready and expected:
            raise Lost(f"began again from step 0, though {sorted(expected)} are whole:\n{output[-3000:]}")
        return ("began at step 0" if view.ready else "killed before it chose") + told

    def _examine(self, blow: Blow) -> str:
        """Check what a kill left; returns it in a few words."""
        names = _names(self._run / "checkpoints")
        for path in published(self._run):
            spoiled = self._spoiled.get(path.name)
            if spoiled and spoiled[0] == path.stat().st_ino:
                continue
            self._spoiled.pop(path.name, None)
            if (damage := damage_of(path)) is not None:
                raise Lost(f"kill {blow.number} ({blow.phase}): the published {path} is not whole: {damage}")
        journal = _read(self._run / "metrics.jsonl")
        if journal != self._left:
            self._left = None
            whole = journal[: journal.rfind(b"\n") + 1]
            if not self._reference.startswith(whole):
                raise Lost(f"kill {blow.number} ({blow.phase}): {first_difference(self._reference, whole)}")
            newest = max(
                (s for s in map(step_of, published(self._run)) if not self._is_spoiled(s)), default=0
            )
            if self._journal_step() < newest:
                raise Lost(
                    f"kill {blow.number} ({blow.phase}): checkpoint step-{newest} is published, the journal ends at"
                    f" step {self._journal_step()}"
                )
        left = [
            f"{name} with {_contents(self._run / 'checkpoints' / name)}"
            for name in names
            if _unfinished(name)
        ]
        whole_names = [path.name for path in published(self._run)]
        return f"on disk {', '.join([*whole_names, *sorted(left)]) or 'no checkpoint'}"

    def _is_spoiled(self, step: int) -> bool:
        return f"step-{step}" in self._spoiled

    def _journal_step(self) -> int:
        try:
            rows = _rows(_read(self._run / "metrics.jsonl"))
        except ValueError:  # damaged here
            return -1
        return max((row["step"] for row in rows if "loss" in row), default=0)

    def _whole_steps(self) -> set[int]:
        """Steps from which the next start may go on: the newest whole checkpoint; empty: from none."""
        return {step for step in map(step_of, published(self._run)) if not self._is_spoiled(step)} and {
            max(step for step in map(step_of, published(self._run)) if not self._is_spoiled(step))
        }

    def _spoil(self, blow: Blow) -> None:
        """Do the damages of a kill. One whole checkpoint always stays."""
        draw = random.Random(f"{self._options.seed}-{blow.number}")
        whole = [path for path in published(self._run) if not self._is_spoiled(step_of(path))]
        done = []
        for name in blow.damages:
            if name in CHECKPOINT_DAMAGES:
                if len(whole) < 2:
                    continue
                what = CHECKPOINT_DAMAGES[name](whole[0], draw)
                self._spoiled[whole[0].name] = (whole[0].stat().st_ino, what)
                done.append(f"{whole[0].name}: {what}")
            elif (self._run / "metrics.jsonl").exists():
                # Rows that the newest whole checkpoint does not need: after its step, which may be spoiled now.
                done.append(self._harm(name, draw))
            else:
                continue
            self.damages[name] += 1
        self._left = _read(self._run / "metrics.jsonl")
        self._tidy()
        self._pending += f"; {'; '.join(done) or 'nothing damaged'}"

    def _harm(self, name: str, draw: random.Random) -> str:
        return OTHER_DAMAGES[name](self._run, draw)

    def _tidy(self) -> None:
        """Keep three of the checkpoints that were set aside: the disk is small."""
        aside = sorted(
            (self._run / "checkpoints").glob("step-*.broken*"), key=lambda path: path.stat().st_mtime
        )
        for path in aside[:-3]:
            shutil.rmtree(path)

    def _say(self, next_start: str) -> None:
        if self._pending:
            print(f"{self._pending} -> {next_start}", flush=True)
        self._pending = ""

    def _compare(self) -> str:
        """What is the same in both runs. Raises Lost if anything differs."""
        journal = _read(self._run / "metrics.jsonl")
        if journal != self._reference:
            raise Lost(first_difference(self._reference, journal))
        theirs, ours = published(self._whole)[0], published(self._run)[0]
        if theirs.name != ours.name or step_of(ours) != self._steps:
            raise Lost(f"the last checkpoints are {theirs} and {ours}")
        tensors, size = compare_checkpoints(theirs, ours)
        return (
            f"metrics.jsonl identical ({journal.count(10)} rows, {len(journal):,} bytes); {tensors} tensors of"
            f" {ours.name} identical ({size:,} bytes)"
        )


@dataclass
class Ballast:
    """A file that fills its disk. left: bytes that stay free."""

    path: Path
    left: int = 0

    def fill(self, left: int) -> None:
        """Take all space but `left` bytes."""
        self.left = left
        with self.path.open("wb") as file:
            taken = False
            while not taken:  # the run writes, too: there may be less by then
                disk = os.statvfs(self.path.parent)
                size = disk.f_bavail * disk.f_frsize - left
                with suppress(OSError):
                    if size > 0:
                        os.posix_fallocate(file.fileno(), 0, size)
                    taken = True

    def clear(self) -> None:
        """Give it back."""
        self.path.unlink(missing_ok=True)


def _unfinished(name: str) -> bool:
    return name.endswith((".partial", ".deleting"))


def _contents(directory: Path) -> str:
    files = [path for path in directory.rglob("*") if path.is_file()]
    manifest = " and its manifest" if (directory / "megabase.json").exists() else ""
    return f"{len(files)} files{manifest}"


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# --- the comparison -----------------------------------------------------------------------------------------------


def first_difference(reference: bytes, journal: bytes) -> str:
    """Where a journal differs from the undisturbed one."""
    theirs, ours = reference.splitlines(), journal.splitlines()
    for number, (one, other) in enumerate(zip(theirs, ours, strict=False), 1):
        if one != other:
            return (
                f"metrics.jsonl differs in line {number}:\n  undisturbed {one.decode(errors='replace')}"
                f"\n  tortured    {other.decode(errors='replace')}"
            )
    return f"metrics.jsonl has {len(ours)} lines, the undisturbed one {len(theirs)}"


def compare_checkpoints(one: Path, other: Path) -> tuple[int, int]:
    """(tensors, bytes) that two checkpoints share, to the last bit.

    Raises:
        Lost: a file, a tensor or a number is different or only in one of them.
    """
    from megabase.pipeline.zero.checkpoint_engine import load  # not at the head: it imports torch

    names = [sorted(path.relative_to(root) for path in root.rglob("*.pt")) for root in (one, other)]
    if names[0] != names[1] or not names[0]:
        raise Lost(f"the checkpoints have other files: {names[0]} and {names[1]}")
    tensors = size = 0
    for name in names[0]:
        left, right = (dict(_leaves(load(root / name), name.name)) for root in (one, other))
        if left.keys() != right.keys():
            raise Lost(f"{name}: only in one of the runs: {sorted(left.keys() ^ right.keys())[:5]}")
        for place, value in left.items():
            if not _same(value, right[place]):
                raise Lost(f"{place} differs:\n  undisturbed {value}\n  tortured    {right[place]}")
            if hasattr(value, "nbytes"):
                tensors, size = tensors + 1, size + value.nbytes
    return tensors, size


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}/{index}")
    else:
        yield place, value


def _same(one: Any, other: Any) -> bool:
    """Equal to the last bit: NaN equals itself, zero does not equal minus zero."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        bits = [value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
        return torch.equal(*bits)
    if hasattr(one, "__dict__"):
        return type(one) is type(other) and vars(one) == vars(other)
    return bool(type(one) is type(other) and one == other)


# --- the command --------------------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """The torture test; returns an exit code."""
    began = time.monotonic()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="torture-"))
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    why_not = "--plain-disk" if options.plain_disk else _mount(directory / "disk")
    print(
        f"torture: {options.kills} kills, seed {options.seed}, ZeRO stage {options.stage}, {options.ranks} ranks,"
        f" in {directory}" + (f"; without a full disk ({why_not})" if why_not else ""),
        flush=True,
    )
    torture = Torture(options, directory, small_disk=not why_not)
    try:
        same = torture.go()
    except BaseException as error:
        if not why_not:
            _unmount(directory / "disk", keep=True)
        if not isinstance(error, Lost):
            raise
        print(f"{torture._pending}\ntorture: NOT SURVIVED, seed {options.seed}: {error}\nkept: {directory}")
        return 1
    for title, counter in (
        ("", torture.phases),
        ("killed: ", torture.targets),
        ("damaged: ", torture.damages),
    ):
        print(f"  {title}{', '.join(f'{name} {count}' for name, count in counter.most_common())}")
    minutes = (time.monotonic() - began) / 60
    print(f"torture: {options.kills} kills survived, seed {options.seed}: {same}; {minutes:.1f} minutes")
    if not why_not:
        _unmount(directory / "disk", keep=options.keep)
    if not options.keep:
        shutil.rmtree(directory)
    return 0


def _mount(disk: Path) -> str:
    """Make a small file system of its own; returns why not, if not."""
    disk.mkdir(exist_ok=True)
    if any(disk.iterdir()):
        return f"{disk} is not empty"
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "torture", str(disk)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no mount"
    return answer.stderr.strip()


def _unmount(disk: Path, keep: bool) -> None:
    """Give the small file system back; its content stays as ordinary files with `keep`."""
    kept = disk.with_name("disk.kept")
    if keep:
        shutil.copytree(disk, kept, symlinks=True)
    # Lazily: processes that were just killed may still hold a file.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
    if keep:
        disk.rmdir()
        kept.rename(disk)


def main() -> int:
    """Read the command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(description="Kill a training run again and again; it must not notice.")
    parser.add_argument("--kills", type=int, default=defaults.kills, metavar="N")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="of the plan")
    parser.add_argument("--stage", type=int, default=defaults.stage, choices=range(4), help="zero.stage")
    parser.add_argument("--ranks", type=int, default=defaults.ranks, metavar="N")
    parser.add_argument("--background", action="store_true", help="checkpoint.background")
    parser.add_argument("--tracking", action="store_true", help="with MLflow")
    parser.add_argument("--plain-disk", action="store_true", help="no small tmpfs, so no full disk")
    parser.add_argument(
        "--chance",
        type=float,
        default=defaults.chance,
        metavar="P",
        help="of each kind of damage after a kill",
    )
    parser.add_argument("--directory", type=Path, metavar="D", help="where (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the run, besides")
    return run(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # else tests/pipeline would be taken for the product
    sys.exit(main())
