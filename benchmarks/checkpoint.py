"""What a checkpoint costs a training, and what a resume does: prints two tables.

    python benchmarks/checkpoint.py [--sizes 10M,50M,100M] [--ranks 2] [--directory DIR] [--json FILE]

Every run is a training of its own processes (ZeRO-2, as many ranks on this machine as asked) of the same model on the
same windows; only what saves differs:

- `ours`, `ours, background`: `megabase train`, with `checkpoint.background` false and true;
- `Lightning`: `Trainer.save_checkpoint` of Lightning's DeepSpeedStrategy with DeepSpeed's own writer, then fsync of
  every file: without that, a checkpoint is in memory only;
- `DCP`, `DCP, async`: `torch.distributed.checkpoint.save` and `async_save` of the same states;
- `plain write`: the bytes of the same states to one file for each rank, and fsync. The floor: no format, no checksum.

stall: how long the training loop stood still for one checkpoint, from the end of its step to the begin of the next
(median of three). slowdown: wall time of the same steps with three checkpoints minus without, for one of them: so
what a background thread takes from the training's processors is in there. written: from the begin of a save until the
checkpoint is whole and published. The resume reads files that are no longer in the page cache; ours compares every
byte with its checksum before it loads (`verify`), which no peer does.

Only when nothing else runs on the machine do the figures mean anything.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS, BACKGROUND, LIGHTNING = "ours", "ours, background", "Lightning"
DCP, DCP_ASYNC, PLAIN = "DCP", "DCP, async", "plain write"
CONTESTANTS = (OURS, BACKGROUND, LIGHTNING, DCP, DCP_ASYNC, PLAIN)
RESUMED = (OURS, LIGHTNING, DCP)
# The first steps warm up; then there are so many checkpoints.
WARM_UP, SAVES = 2, 3
LENGTH = 256
POLL_S = 0.01


@dataclass
class Task:
    """One training of a contestant.

    directory: where it may write. every: steps between checkpoints (0: none but the last of ours). steps: of the
    run. resume: go on from the last checkpoint for a step. started: Unix time at which the processes were started.
    """

    contestant: str
    directory: str
    shards: str
    dim: int
    ranks: int
    steps: int
    every: int
    resume: bool = False
    started: float = 0.0

    @property
    def settings(self) -> list[str]:
        """KEY=VALUE arguments of `megabase train`."""
        return [
            "run.name=run",
            f"run.root={self.directory}",
            f"data.shards={self.shards}",
            f"data.length={LENGTH}",
            f"data.global_batch={self.ranks}",
            "data.micro_batch=1",
            f"model.dim={self.dim}",
            "model.depth=4",
            "model.heads=4",
            "model.lsh.rounds=2",
            "model.lsh.chunk_length=32",
            "model.local.window=32",
            f"trainer.devices={self.ranks}",
            f"trainer.max_steps={self.steps + self.resume}",
            "trainer.eval_every_steps=0",
            f"checkpoint.every_steps={self.every}",
            "checkpoint.every_minutes=0",
            "checkpoint.keep=1",
            f"checkpoint.background={'true' if self.contestant == BACKGROUND else 'false'}",
            "optim.min_lr=1",
            "tracking.enabled=false",
        ]


@dataclass
class Times:
    """What rank 0 saw of a run; seconds of its monotonic clock unless said otherwise.

    ends: when the computation of each step was done. begins: when the loop went on after it. written: from the begin of
    a save until its directory had its name. bytes: of a checkpoint. verify, load: a resume's. ready: from
    the start of the processes to the begin of reading; first_step: to the end of the first step.
    """

    ends: list[float] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    bytes: int = 0
    verify: float = 0.0
    load: float = 0.0
    ready: float = 0.0
    first_step: float = 0.0

    def stalls(self, every: int) -> list[float]:
        """How long the loop stood still at each checkpoint but the last, beyond what it does at other steps."""
        held = [begin - end for end, begin in zip(self.ends, self.begins, strict=True)]
        due = [step for step in range(WARM_UP + 1, len(held)) if step % every == 0]
        usual = [held[step - 1] for step in range(WARM_UP + 1, len(held)) if step % every]
        return [held[step - 1] - statistics.median(usual) for step in due]

    def wall(self) -> float:
        """From the end of the warm-up to the end of the last step, so without the checkpoint that ends a run."""
        return self.ends[-1] - self.begins[WARM_UP - 1]

    def step(self) -> float:
        """Median of a step."""
        return statistics.median(
            end - begin for begin, end in zip(self.begins[WARM_UP - 1 : -1], self.ends[WARM_UP:], strict=True)
        )


@dataclass
class Row:
    """One line of the tables; seconds, bytes. None: this contestant does not do that."""

    parameters: int
    contestant: str
    bytes: int
    step: float
    every: int
    stalls: list[float]
    slowdown: float
    written: list[float]
    verify: float | None = None
    load: float | None = None
    ready: float | None = None
    first_step: float | None = None


def main() -> None:
    """Run everything and print the tables; with `--worker`, be one rank of one run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", default="10M,50M,100M", metavar="P,P", help="parameters (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--contestants", default=";".join(CONTESTANTS), metavar="A;B", help="default: %(default)s"
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="on the disk to measure (default: a temporary one)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, with the machine named"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Task(**json.loads(options.worker)))
        return
    contestants = options.contestants.split(";")
    if unknown := sorted(set(contestants) - set(CONTESTANTS)):
        parser.error(f"--contestants: {unknown[0]!r} is none of {', '.join(CONTESTANTS)}")
    try:
        sizes = [size_of(text) for text in options.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes {options.sizes!r}: give numbers such as 10M,500k")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="checkpoint-") as directory:
        shards = make_shards(Path(directory))
        for size in sizes:
            for row in measure(size, contestants, options.ranks, Path(directory), shards):
                rows.append(row)
                if options.json:
                    write_json(options.json, rows, options.ranks)
    print(tables(rows))


def write_json(path: Path, rows: list[Row], ranks: int) -> None:
    """What there is so far, with the machine named."""
    from megabase.pipeline.rundir import environment

    machine = environment.describe()
    machine["command"] = "python benchmarks/checkpoint.py"  # not where it lies on this machine
    described = {
        "rows": [asdict(row) for row in rows],
        "ranks": ranks,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
    }
    path.write_text(json.dumps(described, indent=1) + "\n")


def size_of(text: str) -> int:
    """'10M' -> 10,000,000."""
    units = {"k": 10**3, "M": 10**6, "G": 10**9}
    return int(float(text.rstrip("kMG")) * units.get(text[-1:], 1))


def make_shards(directory: Path) -> Path:
    """The genome of phage lambda, without a validation split."""
    from megabase.datamodules.prepare.run import prepare

    shards = directory / "shards"
    prepare([ROOT / "tests" / "data" / "lambda_phage.fna.gz"], shards, progress=False)
    return shards


def dim_for(parameters: int) -> tuple[int, int]:
    """(model.dim, its number of parameters): the multiple of 64 that comes closest."""
    counts = {dim: count_parameters(dim) for dim in range(64, 4097, 64)}
    dim = min(counts, key=lambda dim: abs(math.log(counts[dim] / parameters)))
    return dim, counts[dim]


def count_parameters(dim: int) -> int:
    """Parameters of the model of the runs."""
    import torch

    from megabase.models import Reformer
    from megabase.pipeline.config.load import load

    model = load([], Task(OURS, ".", ".", dim, 1, 1, 1).settings).model
    model.vocab_size = 9
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Reformer(model).parameters())


def measure(size: int, contestants: list[str], ranks: int, directory: Path, shards: Path) -> Iterator[Row]:
    """All rows of one size of model."""
    dim, parameters = dim_for(size)

    def run(contestant: str, every: int, steps: int, resume: bool = False) -> Times:
        place = directory / f"{dim}-{CONTESTANTS.index(contestant)}-{every}-{steps}"
        say(
            f"{parameters / 1e6:.0f}M parameters: {contestant}, {'resume' if resume else f'{steps} steps'}"
            f"{f', a checkpoint every {every}' if every and not resume else ''}"
        )
        return start(Task(contestant, str(place), str(shards), dim, ranks, steps, every, resume))

    # How far apart checkpoints have to be, that one in the background is done before the next.
    trial = run(OURS, 0, WARM_UP + 4)
    every = max(4, min(60, math.ceil(4 * (trial.begins[-1] - trial.ends[-1]) / trial.step())))
    steps = (SAVES + 1) * every
    bare = {ours: run(OURS if ours else PLAIN, 0, steps) for ours in (True, False)}
    for contestant in contestants:
        times = run(contestant, every, steps)
        without = bare[contestant in (OURS, BACKGROUND)]
        slowdown = (times.wall() - without.wall()) / SAVES
        row = Row(
            parameters,
            contestant,
            times.bytes,
            without.step(),
            every,
            times.stalls(every),
            slowdown,
            times.written,
        )
        if contestant in RESUMED:
            forget(Path(directory))
            again = run(contestant, every, steps, resume=True)
            row.verify = again.verify if contestant == OURS else None
            row.load, row.ready, row.first_step = again.load, again.ready, again.first_step
        yield row


def start(task: Task) -> Times:
    """Run a task in processes of its own."""
    from megabase.pipeline.ranks.stop import StopRequest
    from megabase.pipeline.ranks.supervisor import supervise

    task.started = time.time()
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--worker", json.dumps(asdict(task))]
    if supervise(command, task.ranks, StopRequest()) != 0:
        raise SystemExit(f"{task.contestant} failed; its message is above")
    return Times(**json.loads((Path(task.directory) / "times.json").read_text()))


def forget(directory: Path) -> None:
    """Take the files in a directory, which are on disk, out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def say(text: str) -> None:
    print(f"checkpoint: {text}", file=sys.stderr, flush=True)


def tables(rows: list[Row]) -> str:
    """Both tables as Markdown."""
    lines = [
        "| parameters | checkpoint, MB | | step, s | stall, s | slowdown, s | written after, s | write, MB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        written = statistics.median(row.written)
        lines.append(
            f"| {row.parameters / 1e6:.0f}M | {row.bytes / 1e6:,.0f} | {row.contestant} | {row.step:.2f}"
            f" | {statistics.median(row.stalls):.2f} | {row.slowdown:.2f} | {written:.2f}"
            f" | {row.bytes / 1e6 / written:,.0f} |"
        )
    lines += [
        "",
        "| parameters | | verify, s | load, s | read, MB/s | start to reading, s | start to first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.load is not None:
            verify = "" if row.verify is None else f"{row.verify:.2f}"
            lines.append(
                f"| {row.parameters / 1e6:.0f}M | {row.contestant} | {verify} | {row.load:.2f}"
                f" | {row.bytes / 1e6 / ((row.verify or 0) + row.load):,.0f} | {row.ready:.1f}"
                f" | {row.first_step:.1f} |"
            )
    return "\n".join(lines)


def work(task: Task) -> None:
    """Be one rank of one run."""
    import megabase.pipeline.zero.strategy  # noqa: F401  # before all that imports DeepSpeed: it tells it of the device

    Path(task.directory).mkdir(parents=True, exist_ok=True)
    watch = Watch(task)
    if task.contestant in (OURS, BACKGROUND):
        train_ours(task, watch)
    else:
        train_peer(task, watch)
    if os.environ["RANK"] == "0":
        watch.times.bytes = checkpoint_bytes(watch.checkpoints)
        (Path(task.directory) / "times.json").write_text(json.dumps(asdict(watch.times)))


class Watch:
    """Takes a run's times; each rank has one, rank 0's counts.

    checkpoints: directory in which a checkpoint is called step-N when it is whole.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.times = Times()
        self.checkpoints = Path(task.directory) / "run" / "checkpoints"

    def boundary(self, step: int, between: Callable[[], None]) -> None:
        """Time what happens between two steps."""
        if not self.times.first_step:
            self.times.first_step = time.time() - self.task.started
        due = bool(self.task.every) and step % self.task.every == 0 and step < self.task.steps
        self.times.ends.append(time.monotonic())
        if due and os.environ["RANK"] == "0":
            threading.Thread(target=self._await, args=(step, time.monotonic()), daemon=True).start()
        between()
        self.times.begins.append(time.monotonic())

    def _await(self, step: int, began: float) -> None:
        path = self.checkpoints / f"step-{step}"
        while not path.exists():
            time.sleep(POLL_S)
        self.times.written.append(time.monotonic() - began)

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is noted as `kind` ("verify" or "load"); the first call is the begin of reading."""

        def run(*arguments: Any, **more: Any) -> Any:
            began = time.monotonic()
            self.times.ready = self.times.ready or time.time() - self.task.started
            result = function(*arguments, **more)
            setattr(self.times, kind, time.monotonic() - began)
            return result

        return run


def train_ours(task: Task, watch: Watch) -> None:
    """`megabase train`, watched from outside."""
    from megabase.pipeline.config.load import load
    from megabase.pipeline.ranks.stop import StopRequest
    from megabase.pipeline.training import resume
    from megabase.pipeline.training import run as train
    from megabase.pipeline.training.callback import TrainingCallback
    from megabase.pipeline.zero.strategy import ZeroStrategy

    between = TrainingCallback.on_train_batch_end

    def watched(self: TrainingCallback, trainer: Any, *arguments: Any) -> None:
        watch.boundary(trainer.global_step, lambda: between(self, trainer, *arguments))

    TrainingCallback.on_train_batch_end = watched  # type: ignore[method-assign]
    resume.choose_to_resume = watch.timed("verify", resume.choose_to_resume)  # type: ignore[attr-defined]
    ZeroStrategy.load_checkpoint = watch.timed("load", ZeroStrategy.load_checkpoint)  # type: ignore[method-assign]
    config = load([], task.settings)
    if train.train(config, task.settings, StopRequest()) != 0:
        raise SystemExit(1)


def train_peer(task: Task, watch: Watch) -> None:
    """The same training under Lightning, with a peer's way to save."""
    import pytorch_lightning as pl
    import torch.distributed as dist
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from pytorch_lightning.strategies import DeepSpeedStrategy

    from megabase.datamodules.datamodule import SequenceDataModule
    from megabase.pipeline.config.load import load
    from megabase.pipeline.ranks import rendezvous
    from megabase.pipeline.training.check import check
    from megabase.pipeline.training.module import PretrainModule
    from megabase.pipeline.training.trainer import silence_libraries
    from megabase.pipeline.zero.strategy import LIGHTNING_PRECISION, ZeroStrategy, quiet

    class PlainStrategy(ZeroStrategy):
        """Saves and loads as Lightning's, with DeepSpeed's own writer."""

        save_checkpoint = DeepSpeedStrategy.save_checkpoint
        load_checkpoint = watch.timed("load", DeepSpeedStrategy.load_checkpoint)

        def _setup_model_and_optimizer(self, *arguments: Any, **more: Any) -> Any:
            engine, optimizer = super()._setup_model_and_optimizer(*arguments, **more)
            engine.checkpoint_engine = TorchCheckpointEngine()
            return engine, optimizer

    config = load([], task.settings)
    rendezvous.start()
    check(config, task.ranks)
    peer = Peer(task, watch)

    class Between(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            if task.resume and task.contestant == DCP:
                watch.timed("load", peer.read)(trainer)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.next_step()
            watch.boundary(trainer.global_step, lambda: peer.between(trainer))

        def on_train_end(self, trainer: Any, module: Any) -> None:
            peer.finish()

    silence_libraries()
    resume_from = peer.path(task.steps) if task.resume and task.contestant == LIGHTNING else None
    trainer = pl.Trainer(
        accelerator="auto",
        devices=task.ranks,
        strategy=PlainStrategy(config),
        precision=LIGHTNING_PRECISION["32"],  # type: ignore[arg-type]
        max_steps=1 if task.resume and not resume_from else task.steps + task.resume,
        max_epochs=-1,
        gradient_clip_val=config.optim.clip,
        callbacks=[Between()],
        default_root_dir=task.directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    module, data = PretrainModule(config, task.ranks), SequenceDataModule(config.data, config.run.seed)
    quiet(trainer).fit(module, datamodule=data, ckpt_path=resume_from, weights_only=False)
    dist.destroy_process_group()


class Peer:
    """How a peer saves at the end of a step."""

    def __init__(self, task: Task, watch: Watch) -> None:
        import torch.distributed as dist

        self._task = task
        self._checkpoints = watch.checkpoints
        self._rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[int, Any] | None = None
        self._threads: list[threading.Thread] = []
        self._checkpoints.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        """Where a checkpoint is when it is whole."""
        return self._checkpoints / f"step-{step}"

    def between(self, trainer: Any) -> None:
        """Save if it is due; the last step's is what a resume reads."""
        step, task = trainer.global_step, self._task
        if not task.every or task.resume or (step % task.every and step < task.steps):
            return
        partial = self._checkpoints / f"step-{step}.partial"
        self.finish()
        if task.contestant == DCP_ASYNC:
            from torch.distributed.checkpoint import async_save

            writing = async_save(self._states(trainer), checkpoint_id=partial, process_group=self._group)
            self._pending = step, writing
            # Publish as soon as it is there, as ours does.
            self._threads.append(threading.Thread(target=self._publish_later, args=(step, writing)))
            self._threads[-1].start()
            return
        if task.contestant == LIGHTNING:
            from megabase.datamodules.files import sync

            trainer.save_checkpoint(partial, weights_only=False)
            for path in self._own(partial):
                sync(path)
        elif task.contestant == DCP:
            from torch.distributed.checkpoint import save

            save(self._states(trainer), checkpoint_id=partial)
        else:
            partial.mkdir(exist_ok=True)
            write_plainly(partial / f"rank-{self._rank}", self._states(trainer).values())
        self._publish(step)

    def finish(self) -> None:
        """Wait for what is being written."""
        for thread in self._threads:
            thread.join()
        self._threads = []

    def read(self, trainer: Any) -> None:
        """Read the last step's states into those of a new trainer."""
        from torch.distributed.checkpoint import load

        load(self._states(trainer), checkpoint_id=self.path(self._task.steps))

    def _publish_later(self, step: int, writing: Any) -> None:
        writing.result()
        if self._rank == 0:
            self._rename(step)

    def _publish(self, step: int) -> None:
        import torch.distributed as dist

        dist.barrier(group=self._group)
        if self._rank == 0:
            self._rename(step)
        dist.barrier(group=self._group)

    def _rename(self, step: int) -> None:
        import shutil

        before = [path for path in self._checkpoints.glob("step-*") if path.suffix != ".partial"]
        self.path(step).with_suffix(".partial").rename(self.path(step))
        for path in before:
            shutil.rmtree(path)

    def _states(self, trainer: Any) -> dict[str, Any]:
        """What DeepSpeed would write on this rank, under names that no other rank has."""
        engine = trainer.strategy.deepspeed_engine
        parts = {"optimizer": engine.optimizer.state_dict()}
        if self._rank == 0:
            parts["module"] = engine.module.state_dict()
        return {f"{self._rank}.{name}": tensor for name, tensor in tensors(parts, "")}

    def _own(self, directory: Path) -> Iterator[Path]:
        """The files of this rank; rank 0 has those that name none."""
        for path in directory.rglob("*"):
            owner = path.name.partition("pp_rank_")[2].partition("_")[0] or "0"
            if path.is_file() and int(owner) == self._rank:
                yield path


def tensors(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of everything in nested dictionaries and lists."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from tensors(part, f"{name}.{number}")


def write_plainly(path: Path, states: Any) -> None:
    """The bytes of tensors, one after the other, on disk when this returns."""
    import torch

    with path.open("wb") as file:
        for tensor in states:
            file.write(memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def checkpoint_bytes(checkpoints: Path) -> int:
    """Bytes of the newest checkpoint; 0 without one."""
    found = sorted(checkpoints.glob("step-*"), key=lambda path: path.stat().st_mtime)
    return sum(path.stat().st_size for path in found[-1].rglob("*") if path.is_file()) if found else 0


if __name__ == "__main__":
    main()
