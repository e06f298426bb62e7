"""How calls are run and measured: `CpuLab` and `GpuLab`.

Time. CPU: the host's clock. GPU: events around the call, then a synchronisation. The inputs of each call are drawn
before it and are not timed.

Memory is the peak during a call minus what was in use before its inputs were made. GPU: the allocator's peak. CPU:
the peak resident memory of a new process for each contestant and size, so that memory freed by another call does not
count. The process is forked from a server that has imported the libraries and computed nothing. It first makes a tiny
call of the same kind, so that code pages and thread pools do not count. Its allocator returns every large block when it
is freed, so that the memory held is counted, as on a GPU. (By default glibc keeps blocks depending on earlier ones, and
the same call may come out at twice the memory.) The process may take no more than the free memory: an allocation beyond
that fails, before the machine runs out of memory.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

import psutil
import torch

from megabase.models.config import ConfigError
from megabase.pipeline.bench.contest import Call, Lab, LeftOut, Probe, Reason, out_of_memory
from megabase.pipeline.errors import first_line

FREE_SHARE = 0.6
"""The share of the free memory that a probe may take. The same call may take more when it is timed in this process,
whose allocator keeps freed blocks."""

START_S = 120.0
"""Seconds that a process may take to start and warm up, besides its call."""

M_MMAP_THRESHOLD, BLOCK = -3, 128 << 10
"""glibc option and value: larger blocks are mapped one by one. Setting it stops glibc from changing it by itself."""

NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
"""Parts of messages of a RuntimeError that mean too little memory, from torch's allocators and libraries."""


class Task(Protocol):
    """What contestants do. It is sent to other processes, so it must pickle."""

    def prepare(self, name: str, size: int, seed: int) -> Call:
        """Draw the inputs; returns the call to measure. Raises LeftOut."""

    def tiny(self, name: str) -> Call:
        """A call of the same kind at a very small size."""


def open_lab(task: Task, device: str) -> Lab:
    """The lab of a device, "cpu" or "cuda"."""
    return GpuLab(task) if device == "cuda" else CpuLab(task)


class CpuLab:
    """Runs calls on the CPU, with the number of threads of this process."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["megabase.pipeline.bench.lab", "megabase.pipeline.bench.preload"]
        )

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available * FREE_SHARE)

    def probe(self, name: str, size: int, limit_s: float) -> Probe:
        """Run the call in a new process, which is killed if the call takes twice the limit."""
        _return_freed_memory()
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (theirs, self._task, name, size, torch.get_num_threads(), self.free_bytes())
        process = self._context.Process(target=_measure, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            if not ours.poll(START_S + 2 * limit_s):
                raise LeftOut(Reason(f"too slow (over {2 * limit_s:.0f} s)", for_good=True))
            answer = ours.recv()
        except EOFError:
            process.join()
            if process.exitcode == -signal.SIGKILL:  # the kernel kills it if memory runs out nevertheless
                raise LeftOut(out_of_memory()) from None
            raise LeftOut(
                Reason(f"failed: its process ended with code {process.exitcode}", failed=True)
            ) from None
        finally:
            process.kill()
            process.join()
        if isinstance(answer, Reason):
            raise LeftOut(answer)
        return answer

    def clock(self, name: str, size: int, seed: int) -> float:
        with reasons():
            call = self._task.prepare(name, size, seed)
            start = time.perf_counter()
            call()
            return time.perf_counter() - start


class GpuLab:
    """Runs calls on the current CUDA device."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def free_bytes(self) -> None:
        return None

    def probe(self, name: str, size: int, limit_s: float) -> Probe:
        """A first call compiles and warms up; the second is measured."""
        self.clock(name, size, seed=0)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = self.clock(name, size, seed=0)
        return Probe(seconds, torch.cuda.max_memory_allocated() - before)

    def clock(self, name: str, size: int, seed: int) -> float:
        try:
            with reasons():
                return self._clock(name, size, seed)
        except LeftOut as error:
            reason = error.reason
        # The exception is gone, so the memory that the call held can be freed.
        gc.collect()
        torch.cuda.empty_cache()
        raise LeftOut(reason)

    def _clock(self, name: str, size: int, seed: int) -> float:
        call = self._task.prepare(name, size, seed)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


@contextmanager
def reasons() -> Iterator[None]:
    """Turn every error of a contestant into LeftOut with a reason, so that the others continue."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LeftOut:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise LeftOut(out_of_memory()) from None
    except ConfigError as error:
        raise LeftOut(f"cannot run: {first_line(error)}"[:120]) from None
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY):
            raise LeftOut(out_of_memory()) from None
        raise LeftOut(
            Reason(f"failed: {type(error).__name__}: {first_line(error)}"[:120], failed=True)
        ) from None


def _measure(connection: Connection, task: Task, name: str, size: int, threads: int, free_bytes: int) -> None:
    """In a new process: run one call and send its Probe, or the reason why it is left out."""
    torch.set_num_threads(threads)
    _return_blocks_when_freed()
    answer: Any
    try:
        with reasons():
            task.tiny(name)()
            _return_freed_memory()
            before = psutil.Process().memory_info()
            resource.setrlimit(resource.RLIMIT_AS, (before.vms + free_bytes, resource.RLIM_INFINITY))
            call = task.prepare(name, size, 0)
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            answer = Probe(seconds, max(0, _peak_resident() - before.rss))
    except LeftOut as error:
        answer = error.reason
    connection.send(answer)


def _return_blocks_when_freed() -> None:
    with suppress(AttributeError, OSError):  # only glibc has mallopt
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK)


def _return_freed_memory() -> None:
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _peak_resident() -> int:
    """Peak resident memory of this process in bytes. A forked process starts its own count."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
