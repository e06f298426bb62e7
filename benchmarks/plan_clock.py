"""A callback for `plan.py`: what a training holds in memory, and the CPU time of its steps."""

from __future__ import annotations

import ctypes
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
RETURNED, KEPT = 128 << 10, 32 << 20
"""Blocks that glibc returns at once when they are freed: larger ones than this."""


class Clock(pl.Callback):
    """Measures memory in the first steps, and time in the later ones. Writes a JSON object.

    In the first steps glibc returns every freed block, so that the peak is what is held, and not what the allocator
    keeps. That takes time; later it keeps blocks, as it does by default after the first steps.

    Args:
        path: of the file.
        steps: that memory is measured in.
    """

    def __init__(self, path: str, steps: int) -> None:
        self.path, self.steps = Path(path), steps
        self.step, self.start, self.peak = 0, 0.0, 0
        self.seconds: list[float] = []
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note memory or time if a step has ended."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        now = time.process_time()
        if self.step > self.steps:
            self.seconds.append(now - self.start)
        if self.step == self.steps:
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, KEPT)
            ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2 * KEPT)
        self.start = time.process_time()
        if trainer.is_global_zero:
            self.path.write_text(json.dumps({"peak": self.peak, "seconds": self.seconds}))
