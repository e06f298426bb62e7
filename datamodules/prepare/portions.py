"""A prepare in portions: calls on several machines write the units of one output, and one more call publishes them.

    OUTPUT.portions/K-of-N/    where portion K of N is written, laid out as OUTPUT.partial

Each portion has a directory and a lock of its own. So portions may be written at the same time, die, and be written
again, also on a file system without locks. Which units it has follows from the sizes of the inputs. The call without a
portion moves all finished units to OUTPUT.partial, writes those that are missing, and publishes.
"""

import heapq
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.unfinished import Unfinished, Unit, unfinished


@dataclass(frozen=True)
class Portion:
    """Portion `number` (from 1) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Portion":
        """Read K/N.

        Raises:
            DataError: it is not two numbers with 1 <= K <= N.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise DataError(f"--portion {text}: write K/N with K from 1 to N, such as 3/10")
        return cls(int(match[1]), int(match[2]))

    def folder(self, output: Path) -> Path:
        """Where this portion of an output is written."""
        return _all(output) / f"{self.number}-of-{self.count}"

    def units(self, units: Sequence[Unit], sizes: Sequence[int]) -> list[Unit]:
        """The units of this portion. sizes: bytes of each unit of the whole prepare."""
        return [units[place] for place in self.share(sizes)]

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Places of the items of this portion: the largest item first, each to the portion that is smallest so far."""
        loads = [(0, number) for number in range(1, self.count + 1)]  # a heap
        mine = []
        for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
            load, number = loads[0]
            heapq.heapreplace(loads, (load + sizes[place], number))
            if number == self.number:
                mine.append(place)
        return mine


def take_over(work: Unfinished, output: Path, arguments: dict[str, object]) -> None:
    """Move the finished units of all portions of an output to `work`.

    Raises:
        DataError: a portion is being written, or was begun with other arguments.
    """
    for folder in sorted(path for path in _all(output).glob("*-of-*") if path.is_dir()):
        with unfinished(output, arguments, folder=folder) as portion:
            work.take_over(portion)


def remove(output: Path) -> None:
    """Remove the directories of all portions."""
    shutil.rmtree(_all(output), ignore_errors=True)


def _all(output: Path) -> Path:
    return output.with_name(output.name + ".portions")
