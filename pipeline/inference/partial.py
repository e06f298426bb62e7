"""OUTPUT.partial: what a command that uses a model has found so far, task by task.

    OUTPUT.partial/call.json   the call that the tasks belong to
    OUTPUT.partial/TASK        what a finished task found

A command splits its work into tasks, each with a file name: the walks over a group of regions, a number of sequences to
generate. The result of a task is published by rename, so a call that was killed continues after the finished tasks.
Several processes may share the tasks (`--portion`), whenever and wherever they run, as long as they see the same
directory. The process that finds all tasks finished writes OUTPUT from them and removes the directory. What is in
OUTPUT depends on the tasks only: its bytes are the same for any number of processes, and two processes that write it at
the same time write the same.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabase.datamodules.files import sync
from megabase.datamodules.prepare.portions import Portion
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.ranks.environment import device_of
from megabase.pipeline.readable import counted

logger = logging.getLogger(__name__)

WHOLE = Portion(1, 1)
AUTO = "auto"
_CALL = "call.json"


def parse_portion(text: str | None, environment: Mapping[str, str] = os.environ) -> Portion:
    """The tasks that this process takes.

    Args:
        text: "K/N"; AUTO: by this process's rank among those of torchrun or srun, and by the element of the job array
            that it runs in; None: all tasks.
        environment: variables of torchrun and SLURM.

    Raises:
        DataError: the text has another form.
        UserError: AUTO in an array with gaps.
    """
    if text is None:
        return WHOLE
    if text != AUTO:
        return Portion.parse(text)
    known = {name: int(value) for name, value in environment.items() if value.isdecimal()}
    rank, ranks = known.get("RANK", 0), known.get("WORLD_SIZE", 1)
    if "RANK" not in known and "SLURM_STEP_ID" in known:
        rank = known["SLURM_PROCID"]
        ranks = known.get("SLURM_STEP_NUM_TASKS") or known["SLURM_NTASKS"]
    element, elements = 0, 1
    if "SLURM_ARRAY_TASK_ID" in known:
        first, elements = known["SLURM_ARRAY_TASK_MIN"], known["SLURM_ARRAY_TASK_COUNT"]
        if known["SLURM_ARRAY_TASK_MAX"] - first + 1 != elements:
            raise UserError(f"--portion {AUTO}: the job array has gaps: use --array=0-{elements - 1}")
        element = known["SLURM_ARRAY_TASK_ID"] - first
    return Portion(element * ranks + rank + 1, elements * ranks)


def device_of_process(environment: Mapping[str, str] = os.environ) -> torch.device:
    """The GPU of this process among those of its node, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or "0"
    return torch.device("cuda", device_of(int(local_rank), torch.cuda.device_count()))


def is_finished(output: Path, portion: Portion) -> bool:
    """Whether another process of the same call may have written OUTPUT already.

    Raises:
        UserError: OUTPUT exists, and no other process takes part.
    """
    if not output.exists():
        return False
    if portion.count == 1:
        raise UserError(f"{output} exists: remove it, or choose another --output")
    logger.warning(f"{output} exists, from this call or an earlier one: nothing was done")
    return True


def check_beside(output: Path, beside: Path) -> None:
    """Raise UserError if what is written beside OUTPUT exists, and is not of an unfinished call for this OUTPUT."""
    if beside.exists() and not output.exists() and not _directory_of(output).exists():
        raise UserError(f"{beside} exists, which is written too: remove it, or choose another --output")


@dataclass(frozen=True)
class Partial:
    """The tasks of one output. Methods that write raise RunError if the disk does not take it.

    Attributes:
        output: what is made of the tasks: a file or a directory.
        sizes: name and size of every task, in a fixed order; sizes are relative, to share the tasks fairly.
        portion: those that this process takes.
    """

    output: Path
    sizes: Mapping[str, int]
    portion: Portion

    @classmethod
    def open(
        cls, output: Path, call: Mapping[str, Any], sizes: Mapping[str, int], portion: Portion = WHOLE
    ) -> Partial:
        """Make the directory, or continue with the one that another process, or a call that was killed, has made.

        Args:
            output: see above.
            call: all that the results of the tasks depend on, as JSON: only a call with the same may continue.
            sizes: see above.
            portion: see above.

        Raises:
            UserError: the directory is of another call.
        """
        partial = cls(output, sizes, portion)
        with partial._writing():
            partial.directory.mkdir(parents=True, exist_ok=True)
            partial._claim(call)
        if read_object(partial._path(_CALL)) != call:
            raise UserError(
                f"{partial.directory} was left by a call with another model, input or options: remove it, or choose "
                "another --output"
            )
        return partial

    @property
    def directory(self) -> Path:
        """Where the results of the tasks are."""
        return _directory_of(self.output)

    def todo(self) -> list[str]:
        """The tasks of this process that are not finished, in order; none if another process wrote the output."""
        if self.output.exists():
            return []
        names = list(self.sizes)
        mine = sorted(self.portion.share(list(self.sizes.values())))
        left = set(self._missing())
        return [names[place] for place in mine if names[place] in left]

    def add(self, task: str, write: Callable[[Path], object]) -> None:
        """Publish the result of a task, which `write` writes to the path that it gets."""
        with self._writing():
            self._publish(self._path(task), write)

    def add_json(self, task: str, value: Any) -> None:
        """Publish the result of a task as JSON."""
        self.add(task, lambda path: path.write_text(f"{json.dumps(value)}\n"))

    def read(self, task: str) -> Path:
        """The file of a finished task."""
        return self._path(task)

    def is_complete(self) -> bool:
        """Whether all tasks are finished, so that this process must write the output; if not, a message says so."""
        missing = self._missing()
        if missing and self.output.exists():
            # A process that starts when the output is being published makes the directory again.
            shutil.rmtree(self.directory, ignore_errors=True)
            logger.info(f"{self.output}: written by another process")
        elif missing:
            logger.info(
                f"{self.output}: portion {self.portion.number}/{self.portion.count} is finished; "
                f"{counted(len(missing), 'task')} of {len(self.sizes):,} are not: the process that finishes the last "
                "one writes the output"
            )
        return not missing

    def publish(self, *writes: tuple[Path, Callable[[Path], object]]) -> bool:
        """Publish the output's files in order, the output itself last, and remove the directory.

        A directory beside the output that exists is kept: another process of this call, or this call before it was
        killed, has written it (`check_beside`).

        Args:
            writes: a path, and what reads the finished tasks and writes a file or a directory to the path that it gets.

        Returns:
            Whether this process wrote the output. False: another one did so, and has removed the directory meanwhile.
        """
        try:
            with self._writing():
                for path, write in writes:
                    if path == self.output or not path.is_dir():
                        self._publish(path, write)
        except RunError:
            if self.output.exists() and self.portion.count > 1:
                return False
            raise
        shutil.rmtree(self.directory, ignore_errors=True)
        return True

    def _claim(self, call: Mapping[str, Any]) -> None:
        """Publish the call, unless there is one: of two processes that start at the same time, one does."""
        own = self._path(f".{uuid.uuid4().hex}.{_CALL}")
        own.write_text(f"{json.dumps(call)}\n")
        try:
            sync(own)
            os.link(own, self._path(_CALL))  # unlike a rename, it fails if the file exists
        except FileExistsError:
            pass
        except PermissionError:  # a file system without hard links
            if not self._path(_CALL).exists():
                own.rename(self._path(_CALL))
        finally:
            own.unlink(missing_ok=True)

    def _missing(self) -> list[str]:
        try:
            finished = {path.name for path in self.directory.iterdir()}  # one request for all of them
        except FileNotFoundError:
            finished = set()
        return [task for task in self.sizes if task not in finished]

    def _path(self, name: str) -> Path:
        return self.directory / name

    def _publish(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write under a name of this process's own, sync, rename: several processes may publish the same file.

        A directory beside the output stays if another process was faster: a rename replaces files only.
        """
        # The end of the name may tell a library the format.
        temporary = self._path(f".{uuid.uuid4().hex}.{path.name}")
        try:
            write(temporary)
            sync(temporary)
            try:
                temporary.rename(path)
            except OSError:
                if path == self.output or not path.is_dir():
                    raise
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
        sync(path.parent)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.output}: cannot be written: {error}") from error


def _directory_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def grouped(sizes: Sequence[int], least: int) -> list[Collection[int]]:
    """Consecutive places whose sizes add up to `least` or more; the last group may be smaller."""
    groups: list[Collection[int]] = []
    start = total = 0
    for place, size in enumerate(sizes):
        total += size
        if total >= least or place == len(sizes) - 1:
            groups.append(range(start, place + 1))
            start, total = place + 1, 0
    return groups
