"""How fast training goes: tokens a second, utilisation of the device, memory."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from megabase.models.flops import training_flops_per_token
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.hardware import peak_flops, peak_memory, precision_of
from megabase.pipeline.rundir.journal import Row


class Speed:
    """Throughput since the last measurement. Call `restart` after evaluations and checkpoints, which do not count.

    Args:
        config: of the run.
        ranks: devices that share the work.

    Attributes:
        data_seconds: time since the last measurement that was spent waiting for batches.
    """

    def __init__(self, config: RunConfig, ranks: int) -> None:
        self._ranks = ranks
        self._tokens_per_step = config.data.global_batch * config.data.length
        self._flops = training_flops_per_token(config.model, config.data.length)
        self._peak = None
        if torch.cuda.is_available():
            self._peak = peak_flops(torch.cuda.get_device_name(), precision_of(config.trainer.precision))
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._marks = [time.monotonic()]
        self.data_seconds = 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps since the last measurement."""
        return len(self._marks) - 1

    def add_step(self) -> None:
        """Note that an optimizer step has ended."""
        self._marks.append(time.monotonic())

    def measure(self) -> Row:
        """The figures since the last measurement, for `performance.jsonl`; starts the next measurement.

        Returns:
            tokens_per_second of all ranks; tokens_per_second_per_device; model_tflops per device, counted as one
            forward pass and a backward pass of twice its cost; hardware_tflops per device, with the forward pass that
            a reversible model computes again; mfu and hfu, these two as shares of the device's peak, if its data
            sheet is known; step_seconds_median and step_seconds_most; peak_memory_bytes of rank 0; data_wait, the share
            of time spent waiting for batches.
        """
        seconds = max(time.monotonic() - self._marks[0], 1e-9)
        steps = sorted(after - before for before, after in itertools.pairwise(self._marks))
        rate = self._tokens_per_step * self.steps / seconds
        per_device = rate / self._ranks
        model, hardware = (per_device * flops for flops in self._flops)
        row: Row = {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": per_device,
            "model_tflops": model / 1e12,
            "hardware_tflops": hardware / 1e12,
            "step_seconds_median": statistics.median(steps),
            "step_seconds_most": steps[-1],
            "peak_memory_bytes": peak_memory(),
            "data_wait": self.data_seconds / seconds,
        }
        if self._peak:
            row |= {"mfu": model / self._peak, "hfu": hardware / self._peak}
        self.restart()
        return row
