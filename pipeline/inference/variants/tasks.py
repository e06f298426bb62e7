"""The work: walks over strands of records, or windows. Each task's result is a file; together they score all edits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megabase.datamodules.alphabet import Alphabet
from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.partial import grouped
from megabase.pipeline.inference.score import REVERSE
from megabase.pipeline.inference.variants.edits import Edit, Strand
from megabase.pipeline.inference.variants.reading import TERMS, Reader
from megabase.pipeline.inference.variants.walk import walk, walk_size
from megabase.pipeline.inference.variants.windows import windows, windows_size

TASK_TOKENS = 1 << 20
"""A task reads consecutive windows that have about this many tokens together."""


@dataclass(frozen=True)
class Task:
    """Score the edits `numbers`, all of one record, along one strand, with one rotation of the hashes."""

    record: str
    numbers: Sequence[int]
    strand: str
    rotation: int


@dataclass(frozen=True)
class Plan:
    """All edits, and how they are scored.

    Attributes:
        genome: what is edited.
        alphabet: of the model.
        edits: in any order.
        strands: FORWARD, REVERSE or both.
        rotations: with how many rotations of the hashes.
        context: bases that are read before an edit; None: all.
        downstream: bases that are scored after an edit.
    """

    genome: Genome
    alphabet: Alphabet
    edits: Sequence[Edit]
    strands: Sequence[str]
    rotations: int
    context: int | None
    downstream: int

    def tasks(self) -> dict[str, Task]:
        """The tasks by the names of their files."""
        by_record: dict[str, list[int]] = {}
        for number, edit in enumerate(self.edits):
            by_record.setdefault(edit.record, []).append(number)
        found: dict[str, Task] = {}
        for name, numbers in sorted(by_record.items()):
            numbers.sort(key=lambda number: (self.edits[number].start, self.edits[number].end, number))
            for group in self._groups(numbers):
                for strand in self.strands:
                    for rotation in range(self.rotations):
                        task = Task(name, [numbers[place] for place in group], strand, rotation)
                        found[f"{len(found):06d}.npy"] = task
        return found

    def size(self, task: Task) -> int:
        """How many tokens a task reads."""
        edits, strand = self._edits(task), self._strand(task)
        if self.context is None:
            return walk_size(strand, edits, self.downstream)
        return windows_size(strand, edits, self.context, self.downstream)

    def run(self, task: Task, reader: Reader, advance: Callable[[int], None]) -> NDArray[np.void]:
        """Do a task: (numbers,) of TERMS. The arguments and errors are those of `walk`."""
        edits, strand = self._edits(task), self._strand(task)
        if self.context is None:
            return walk(reader, strand, edits, advance)
        return windows(reader, strand, edits, self.context, advance)

    def collect(
        self, tasks: Mapping[str, Task], path_of: Callable[[str], Path]
    ) -> dict[str, NDArray[np.void]]:
        """What finished tasks found: (rotations, edits) of TERMS for each strand. Raises OSError."""
        found = {strand: np.zeros((self.rotations, len(self.edits)), TERMS) for strand in self.strands}
        for name, task in tasks.items():
            found[task.strand][task.rotation, list(task.numbers)] = np.load(path_of(name))
        return found

    def _groups(self, numbers: Sequence[int]) -> list[Collection[int]]:
        """Places of the edits of each task. A walk goes past all edits of a record."""
        if self.context is None:
            return [range(len(numbers))]
        window = self.context + 2 * self.downstream
        return grouped([window + len(self.edits[number].bases) for number in numbers], TASK_TOKENS)

    def _edits(self, task: Task) -> list[Edit]:
        return [self.edits[number] for number in task.numbers]

    def _strand(self, task: Task) -> Strand:
        return Strand(self.genome, task.record, self.alphabet, task.strand == REVERSE)
