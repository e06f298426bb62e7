"""A run as another process sees it: figures and state, read from its run directory. Imports no torch.

A start of the run rewrites its journal, because it drops rows that it will compute again: then all is read anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megabase.pipeline.errors import UserError, first_line
from megabase.pipeline.files import read_object
from megabase.pipeline.readable import age
from megabase.pipeline.rundir.figures import Figures
from megabase.pipeline.rundir.heartbeat import SILENT_S
from megabase.pipeline.rundir.hint import resume_hint
from megabase.pipeline.rundir.journal import Tail
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import read_status

# What the states of status.json mean for someone who watches.
MEANINGS = {
    "finished": "finished",
    "again": "stopped at a checkpoint; another start resumes from there",
    "stopped": "stopped by a STOP file, at a checkpoint",
    "failed": "failed; its output says why, and another start fails in the same way until that is repaired",
    "crashed": "crashed or was interrupted; its output says why, and another start may succeed",
}


@dataclass(frozen=True)
class State:
    """Whether a run trains.

    Attributes:
        text: for people.
        finished: nothing more will come.
    """

    text: str
    finished: bool = False


class RunView:
    """Follows one run directory.

    Args:
        directory: the run directory, whether its run has started or not.

    Raises:
        UserError: it is not a run directory.
    """

    def __init__(self, directory: Path) -> None:
        check_run_directory(directory)
        self.paths = RunPaths(directory)
        self.name = directory.resolve().name
        self.figures = Figures()
        self._tails: list[Tail] = []

    def read(self) -> bool:
        """Read what is new into `figures`; returns whether anything was.

        Raises:
            UserError: a journal cannot be read, or is damaged.
        """
        new = not self._tails or any(tail.was_rewritten() for tail in self._tails)
        if new:
            self.figures = Figures()
            self._tails = [Tail(path) for path in (self.paths.metrics, self.paths.performance)]
        self.figures.max_steps = self._max_steps()
        for tail, path in zip(self._tails, (self.paths.metrics, self.paths.performance), strict=True):
            try:
                for row in tail.new():
                    if not isinstance(row, dict) or "step" not in row:
                        raise ValueError("no step")
                    self.figures.add(row)
                    new = True
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} is damaged: a line is not a row of a journal ({first_line(error)})"
                ) from None
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
        return new

    def state(self, now: float) -> State:
        """Whether the run trains, at `now` (Unix time)."""
        word, _ = read_status(self.paths.directory)
        if not word:
            return State("has not started yet")
        if word != "running":
            return State(MEANINGS.get(word, word), finished=word == "finished")
        heartbeat = read_object(self.paths.heartbeat(0))
        written, doing = heartbeat.get("written"), heartbeat.get("doing", "training")
        if not isinstance(written, int | float):
            return State("running")
        silent = now - written
        if silent > SILENT_S:
            return State(
                f"no sign of life for {age(silent)}: probably killed; {resume_hint(self.paths.directory)}"
            )
        host = heartbeat.get("host")
        return State(f"{doing}{f', on {host}' if host else ''}")

    def _max_steps(self) -> int | None:
        """`trainer.max_steps` of the last start; None if its config cannot be read."""
        return read_size(self.paths).max_steps if self.figures.max_steps is None else self.figures.max_steps


@dataclass(frozen=True)
class Size:
    """How large a run is, by its last start.

    Attributes:
        max_steps: `trainer.max_steps`; None: not known.
        ranks: on all nodes; None: not known.
    """

    max_steps: int | None = None
    ranks: int | None = None


def read_size(paths: RunPaths) -> Size:
    """How large a run is, from its config.yaml; nothing is known if that cannot be read."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    try:
        trainer = yaml.load(paths.config.read_bytes(), Loader=loader)["trainer"]
    except (OSError, yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
        return Size()
    size = Size()
    with suppress(TypeError, ValueError, KeyError):
        size = replace(size, max_steps=int(trainer["max_steps"]))
    with suppress(TypeError, ValueError, KeyError):
        size = replace(size, ranks=int(trainer["nodes"]) * int(trainer["devices"]))
    return size


def runs_in(directory: Path) -> list[Path]:
    """The run directories in a directory, by name; empty if it cannot be read."""
    with suppress(OSError):
        return sorted(path for path in directory.iterdir() if path.is_dir() and is_run(path))
    return []


def find_runs(directories: Sequence[Path]) -> list[Path]:
    """The run directories that a user names, each once: of a directory that holds runs, all of them.

    Raises:
        UserError: a directory neither is one of a run nor holds any.
    """
    found: dict[Path, None] = {}
    for directory in directories:
        runs = [directory] if is_run(directory) else runs_in(directory)
        if not runs:
            check_run_directory(directory)
        found |= dict.fromkeys(runs)
    return list(found)


def check_run_directory(directory: Path) -> None:
    """Raise UserError unless this is the directory of a run that has been started or submitted."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: {'a file' if directory.exists() else 'no such directory'}: give a run directory"
        )
    if is_run(directory):
        return
    above = next((path for path in directory.resolve().parents if is_run(path)), None)
    if above:
        raise UserError(f"{directory}: not a run directory, but inside one: give {above}")
    if runs := runs_in(directory):
        names = ", ".join(str(path) for path in runs[:5]) + (", ..." if len(runs) > 5 else "")
        raise UserError(f"{directory}: holds runs, but is not one: give one of {names}")
    raise UserError(f"{directory}: not a run directory: no run has started here (give <run.root>/<run.name>)")


def is_run(directory: Path) -> bool:
    """Whether a run has been started or submitted here."""
    paths = RunPaths(directory)  # not its journal: a checkpoint has a copy
    return any(path.exists() for path in (paths.config, paths.status, paths.submit_script))
