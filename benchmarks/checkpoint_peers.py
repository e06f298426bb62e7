"""How the peers of `checkpoint.py` save: Lightning, torch.distributed.checkpoint, and plain writes."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_run import DCP, DCP_ASYNC, LIGHTNING, Task
from torch.distributed import checkpoint as dcp

from megabase.datamodules.files import sync


class Peer:
    """Saves at the end of a step as a peer does, and publishes by rename as ours does.

    Args:
        task: of this run; `task.contestant` is the peer.
        checkpoints: directory of the checkpoints; made if it is missing.
    """

    def __init__(self, task: Task, checkpoints: Path) -> None:
        self._task = task
        self._checkpoints = checkpoints
        self._rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo")
        self._threads: list[threading.Thread] = []
        self._checkpoints.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        """Where the published checkpoint of a step is."""
        return self._checkpoints / f"step-{step}"

    def between(self, trainer: Any) -> None:
        """Save if a checkpoint is due; the last step's always is, because a resume reads it."""
        step, task = trainer.global_step, self._task
        if not task.every or task.resume or (step % task.every and step < task.steps):
            return
        partial = self._checkpoints / f"step-{step}.partial"
        self.finish()
        if task.contestant == DCP_ASYNC:
            writing = dcp.async_save(self._states(trainer), checkpoint_id=partial, process_group=self._group)
            # Publish as soon as it is written, as ours does.
            self._threads.append(threading.Thread(target=self._publish_later, args=(step, writing)))
            self._threads[-1].start()
            return
        if task.contestant == LIGHTNING:
            trainer.save_checkpoint(partial, weights_only=False)
            for path in self._own(partial):
                sync(path)
        elif task.contestant == DCP:
            dcp.save(self._states(trainer), checkpoint_id=partial)
        else:
            partial.mkdir(exist_ok=True)
            write_plainly(partial / f"rank-{self._rank}", self._states(trainer).values())
        self._publish(step)

    def finish(self) -> None:
        """Wait until everything is written."""
        for thread in self._threads:
            thread.join()
        self._threads = []

    def read(self, trainer: Any) -> None:
        """Read the last step's states into those of a new trainer."""
        dcp.load(self._states(trainer), checkpoint_id=self.path(self._task.steps))

    def _publish_later(self, step: int, writing: Any) -> None:
        writing.result()
        if self._rank == 0:
            self._rename(step)

    def _publish(self, step: int) -> None:
        dist.barrier(group=self._group)
        if self._rank == 0:
            self._rename(step)
        dist.barrier(group=self._group)

    def _rename(self, step: int) -> None:
        before = [path for path in self._checkpoints.glob("step-*") if path.suffix != ".partial"]
        self.path(step).with_suffix(".partial").rename(self.path(step))
        for path in before:
            shutil.rmtree(path)

    def _states(self, trainer: Any) -> dict[str, Any]:
        """The states that DeepSpeed would write on this rank, under names that no other rank uses."""
        engine = trainer.strategy.deepspeed_engine
        parts = {"optimizer": engine.optimizer.state_dict()}
        if self._rank == 0:
            parts["module"] = engine.module.state_dict()
        return {f"{self._rank}.{name}": tensor for name, tensor in tensors(parts, "")}

    def _own(self, directory: Path) -> Iterator[Path]:
        """The files that this rank has written. Files without a rank in their name are rank 0's."""
        for path in directory.rglob("*"):
            owner = path.name.partition("pp_rank_")[2].partition("_")[0] or "0"
            if path.is_file() and int(owner) == self._rank:
                yield path


def tensors(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of each tensor in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from tensors(part, f"{name}.{number}")


def write_plainly(path: Path, states: Iterable[torch.Tensor]) -> None:
    """Write the bytes of tensors one after the other, and wait until they are on disk."""
    with path.open("wb") as file:
        for tensor in states:
            file.write(memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
