"""Runs a task for many items in several processes; if a process dies, the error names its item.

`multiprocessing.Pool` hangs when a worker is killed, and `concurrent.futures` does not tell which item the worker had.
Here each process gets one item at a time over its own pipe. Processes are spawned, because the parent has threads,
which do not survive a fork. So a script that calls this needs the usual `if __name__ == "__main__":`.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from megabase.datamodules.errors import DataError
from megabase.datamodules.processes import end_with_parent, signals_blocked

T = TypeVar("T")
R = TypeVar("R")

Report = Callable[[int], None]
"""Called with the number of bytes processed since the last call."""

_REPORT_EVERY_S = 0.2


def checked_jobs(jobs: int | None) -> int:
    """The number of processes to use; None is one per CPU of this process. Raises DataError below 1."""
    if jobs is not None and jobs < 1:
        raise DataError(f"--jobs {jobs}: must be at least 1")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return jobs or cpus


def run(
    task: Callable[[T, Report], R],
    items: Sequence[T],
    jobs: int,
    report: Report,
    place: Callable[[T], str] = str,
) -> Generator[tuple[T, R], None, None]:
    """Run a task for every item; yield (item, result) as they finish.

    Closing the iterator ends the workers.

    Args:
        task: called with an item and `report`, in a worker; with one process to use, in this one.
        items: what to work on; started in this order.
        jobs: processes to use at most.
        report: called with the bytes that the tasks report.
        place: what an item is called in messages.

    Raises:
        DataError: a worker died; the message names its item.
        Exception: the first exception of a task; it ends the other workers.
    """
    if min(jobs, len(items)) <= 1:
        for item in items:
            yield item, task(item, report)
        return
    waiting = list(reversed(items))
    workers: list[_Worker[T, R]] = []
    try:
        for _ in range(min(jobs, len(items))):
            workers.append(_Worker(task))
            workers[-1].give(waiting.pop())
        while busy := {id(worker.connection): worker for worker in workers if worker.busy}:
            for connection in wait([worker.connection for worker in busy.values()]):
                worker = busy[id(connection)]
                kind, value = worker.receive(place)
                if kind == "report":
                    report(value)
                    continue
                yield worker.item, value
                if waiting:
                    worker.give(waiting.pop())
                else:
                    worker.busy = False
    finally:
        for worker in workers:
            worker.end()


class _Worker(Generic[T, R]):
    """The parent's side of one process. item: what it works on while `busy`."""

    item: T

    def __init__(self, task: Callable[[T, Report], R]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, worker_end = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(worker_end, task), daemon=True)
        self.busy = False
        with signals_blocked([signal.SIGINT]):  # for good in the worker: Ctrl-C is for the parent alone
            self.process.start()
        worker_end.close()

    def give(self, item: T) -> None:
        self.item, self.busy = item, True
        with suppress(BrokenPipeError):  # it died: `receive` raises
            self.connection.send(item)

    def receive(self, place: Callable[[T], str]) -> tuple[str, Any]:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            why = " (out of memory? use fewer --jobs)" if -code == signal.SIGKILL else ""
            raise DataError(f"{place(self.item)}: the process that worked on it {end}{why}") from None
        if kind == "error":
            raise value
        return kind, value

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, task: Callable[[Any, Report], Any]) -> None:
    """The main function of a worker: receive items and send results, until the parent ends."""
    end_with_parent()
    reporter = _Reporter(connection)
    with suppress(EOFError, ConnectionError):
        while True:
            item = connection.recv()
            try:
                result = task(item, reporter)
            except (DataError, OSError) as error:
                connection.send(("error", error))
            except Exception:
                connection.send(("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))
            else:
                reporter.flush()
                connection.send(("result", result))


class _Reporter:
    """Sends the reported bytes to the parent, summed up, a few times a second."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sum = 0
        self._sent = 0.0

    def __call__(self, done: int) -> None:
        self._sum += done
        if time.monotonic() - self._sent > _REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("report", self._sum))
        self._sum, self._sent = 0, time.monotonic()
