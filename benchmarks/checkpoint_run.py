"""One training of `checkpoint.py`, as one of its ranks: `python benchmarks/checkpoint_run.py TASK`, TASK as JSON.

Rank 0 writes its times to `times.json` in the directory of the task.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS, BACKGROUND, LIGHTNING = "ours", "ours, background", "Lightning"
DCP, DCP_ASYNC, PLAIN = "DCP", "DCP, async", "plain write"
CONTESTANTS = (OURS, BACKGROUND, LIGHTNING, DCP, DCP_ASYNC, PLAIN)
RESUMED = (OURS, LIGHTNING, DCP)
# First steps, which are not measured, and measured checkpoints.
WARM_UP, SAVES = 2, 3
LENGTH = 256
POLL_S = 0.01


@dataclass
class Task:
    """One training of a contestant.

    Attributes:
        contestant: one of CONTESTANTS.
        directory: where it writes.
        shards: what it trains on.
        dim: width of the model.
        ranks: number of processes.
        steps: of the run.
        every: steps between checkpoints. 0: none, except that `megabase train` saves at the end.
        resume: train one step from the last checkpoint.
        started: Unix time at which the processes were started.
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
    """What rank 0 measured in a run, in seconds.

    Attributes:
        ends: time of the monotonic clock at which the computation of each step ended.
        begins: the same at which the loop continued after that step.
        written: for each checkpoint, from the start of a save until the checkpoint is published.
        bytes: size of a checkpoint.
        verify: time to compare a checkpoint with its checksums, on resume.
        load: time to load it.
        ready: from the start of the processes until a checkpoint is read.
        first_step: from the start of the processes to the end of the first step.
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
        """For each checkpoint but the last, how much longer the loop was held up than after other steps."""
        held = [begin - end for end, begin in zip(self.ends, self.begins, strict=True)]
        due = [step for step in range(WARM_UP + 1, len(held)) if step % every == 0]
        usual = [held[step - 1] for step in range(WARM_UP + 1, len(held)) if step % every]
        return [held[step - 1] - statistics.median(usual) for step in due]

    def wall(self) -> float:
        """From the end of the warm-up to the end of the last step: without the checkpoint that ends a run."""
        return self.ends[-1] - self.begins[WARM_UP - 1]

    def step(self) -> float:
        """Median time of a step."""
        return statistics.median(
            end - begin for begin, end in zip(self.begins[WARM_UP - 1 : -1], self.ends[WARM_UP:], strict=True)
        )


def work(task: Task) -> None:
    """Train as one rank of a task."""
    # Before anything else imports DeepSpeed: this module sets the variable by which DeepSpeed chooses its device.
    import megabase.pipeline.zero.strategy  # noqa: F401

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
    """Measures the times of a run. Each rank has one; rank 0's is used.

    Attributes:
        times: measured so far.
        checkpoints: directory in which a published checkpoint is named step-N.
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
        """`function`, with its time noted as `kind` ("verify" or "load"). The first call also sets `ready`."""

        def run(*arguments: Any, **more: Any) -> Any:
            began = time.monotonic()
            self.times.ready = self.times.ready or time.time() - self.task.started
            result = function(*arguments, **more)
            setattr(self.times, kind, time.monotonic() - began)
            return result

        return run


def train_ours(task: Task, watch: Watch) -> None:
    """`megabase train`, with the methods to measure replaced by ones that note their time."""
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
    """The same training under Lightning, which saves as a peer does.

    Long because it defines a strategy and a callback, which import DeepSpeed and Lightning.
    """
    import pytorch_lightning as pl
    import torch.distributed as dist
    from checkpoint_peers import Peer
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
        """Saves and loads as Lightning's strategy does, with DeepSpeed's own writer."""

        save_checkpoint = DeepSpeedStrategy.save_checkpoint
        load_checkpoint = watch.timed("load", DeepSpeedStrategy.load_checkpoint)

        def _setup_model_and_optimizer(self, *arguments: Any, **more: Any) -> Any:
            engine, optimizer = super()._setup_model_and_optimizer(*arguments, **more)
            engine.checkpoint_engine = TorchCheckpointEngine()
            return engine, optimizer

    config = load([], task.settings)
    rendezvous.start()
    check(config, task.ranks)
    peer = Peer(task, watch.checkpoints)

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
    module, data = (
        PretrainModule(config, log=False),
        SequenceDataModule(config.data, config.run.seed),
    )
    quiet(trainer).fit(module, datamodule=data, ckpt_path=resume_from, weights_only=False)
    dist.destroy_process_group()


def checkpoint_bytes(checkpoints: Path) -> int:
    """Bytes of the newest checkpoint; 0 if there is none."""
    found = sorted(checkpoints.glob("step-*"), key=lambda path: path.stat().st_mtime)
    return sum(path.stat().st_size for path in found[-1].rglob("*") if path.is_file()) if found else 0


if __name__ == "__main__":
    work(Task(**json.loads(sys.argv[1])))
