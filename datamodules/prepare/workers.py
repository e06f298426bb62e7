"""Do many things in several processes: results as they come, and a clear word when a process dies.

`multiprocessing.Pool` hangs when a worker is killed, and `concurrent.futures` does not say over which item.
Here each process gets one item at a time over a pipe of its own, so that is known. Processes are spawned: the
parent has threads, which do not survive a fork. A script that calls this needs the usual
`if __name__ == "__main__":`.
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
"""Takes a number of bytes that were done since it was last called."""

_REPORT_EVERY_S = 0.2


def checked_jobs(jobs: int | None) -> int:
    """Processes to use: those asked for, or one for every CPU of this process. Raises DataError below 1."""
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
    """(item, `task(item, report)`) of every item, as they are done, by at most `jobs` processes.

    With one process to use, that is this one. place: what an item is called in messages.

    The first exception of a task is raised here and ends the other workers, as does closing the iterator.
    Raises DataError, naming the item, if a worker dies.
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
    """The parent's side of one process; `item` is what it does while `busy`."""

    item: T

    def __init__(self, task: Callable[[T, Report], R]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, task), daemon=True)
        self.busy = False
        with signals_blocked([signal.SIGINT]):  # for good in the worker: Ctrl-C is for the parent alone
            self.process.start()
        theirs.close()

    def give(self, item: T) -> None:
        self.item, self.busy = item, True
        with suppress(BrokenPipeError):  # it died: `receive` says so
            self.connection.send(item)

    def receive(self, place: Callable[[T], str]) -> tuple[str, Any]:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            why = " (out of memory? take fewer --jobs)" if -code == signal.SIGKILL else ""
            raise DataError(f"{place(self.item)}: the process that worked on it {end}{why}") from None
        if kind == "error":
            raise value
        return kind, value

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, task: Callable[[Any, Report], Any]) -> None:
    """What a worker does: items in, results out, until the parent is gone."""
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
    """Sends the sum of what is reported to it a few times a second."""

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
