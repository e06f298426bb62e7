"""Scores windows base by base: by position, by letter case, by class, by length of context, and copies.

Every function scores this rank's share of the windows and returns the merged tally of all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from megabase.datamodules.alphabet import BOS
from megabase.datamodules.batches.collate import IGNORE, Batch, Wide
from megabase.datamodules.batches.numbered import EvalBatches, Place
from megabase.datamodules.batches.visits import Windows
from megabase.datamodules.report import recall
from megabase.datamodules.report.classes import Classes
from megabase.models import Reformer, Seeds
from megabase.pipeline.inference.evaluation.tally import Tally
from megabase.pipeline.inference.parts import LOWER, UPPER, position_bins
from megabase.pipeline.inference.scoring import base_nats
from megabase.pipeline.log import console
from megabase.pipeline.ranks.groups import Groups


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores batches on one device.

    Attributes:
        model: on the device, in evaluation mode.
        place: which windows this process scores.
        groups: the ranks that share out the windows, and each window; None: this process scores all.
        precision: of matrix products: 32, bf16 or 16.
        seed: of the rotations of LSH attention.
    """

    model: Reformer
    place: Place
    groups: Groups | None
    precision: str
    seed: int

    def nats(self, wide: Wide) -> NDArray[np.float64]:
        """(batch, length) nats of every labelled base, 0 elsewhere.

        Ranks that share windows must call it together, with the same tensors.
        """
        device = next(self.model.parameters()).device
        dtype = torch.float16 if self.precision == "16" else torch.bfloat16
        length, part = wide.tokens.shape[1], None
        if self.groups is not None and length % self.groups.sequence_ranks == 0:
            part = self.groups.part(length)
        rows = slice(None) if part is None else part.rows
        moved = Wide(wide.tokens[:, rows].to(device), wide.labels[:, rows].to(device), None)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=self.precision != "32"):
            nats = base_nats(self.model, moved, Seeds(run=self.seed), part)
        whole = nats if part is None else part.gather(nats)
        found: NDArray[np.float64] = whole.double().cpu().numpy()
        return found

    def tally(
        self,
        batches: Iterable[Batch],
        groups: Callable[[Batch, Wide], tuple[NDArray[np.float64], NDArray[np.int64]]],
    ) -> Tally:
        """Score this rank's batches; returns the tally of all ranks.

        Args:
            batches: of this rank; every rank has equally many.
            groups: (batch, its tensors) -> nats and bases (batch, groups).
        """
        parts = []
        for batch in self._with_progress(batches):
            nats, bases = groups(batch, batch.widened())
            parts.append(Tally(batch.samples.numpy(), nats, bases))
        mine, ranks = Tally.merged(parts), self.groups
        if ranks is None:
            return mine
        return Tally.merged(ranks.world.gather(mine)[:: ranks.sequence_ranks])

    def _with_progress(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches, with a bar on stderr if it is a terminal and their number is known."""
        shown = isinstance(batches, Sized) and self.place.rank == 0 and sys.stderr.isatty()
        return track(batches, "scoring", console=console(), transient=True) if shown else batches


@dataclass(frozen=True, eq=False)
class Parts:
    """What the groups of `score_windows` are: first all bases, then these.

    Attributes:
        bins: of positions.
        cases: LOWER and UPPER; () for an alphabet in which case does not mark repeats.
        classes: of a BED file.
    """

    bins: list[tuple[int, int]]
    cases: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def of_bins(self) -> range:
        return range(1, 1 + len(self.bins))

    @property
    def of_cases(self) -> range:
        return range(self.of_bins.stop, self.of_bins.stop + len(self.cases))

    @property
    def of_classes(self) -> range:
        return range(self.of_cases.stop, self.of_cases.stop + len(self.classes))


def score_windows(
    scorer: Scorer, windows: Windows, most: int, classes: Classes | None
) -> tuple[Parts, Tally]:
    """Score the windows of a split.

    Args:
        scorer: scores them.
        windows: of the split.
        most: number of windows, spread evenly over the split; 0: all.
        classes: of a BED file, if there is one.
    """
    has_case = windows.has_case
    read = windows.with_case()
    parts = Parts(
        position_bins(windows.plan.length),
        (LOWER, UPPER) if has_case else (),
        classes.names if classes else (),
    )
    starts = [start for start, _ in parts.bins]

    def groups(batch: Batch, wide: Wide) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        nats, labelled = scorer.nats(wide), (wide.labels != IGNORE).numpy()
        masks = [np.ones_like(labelled)]
        if batch.lower is not None:
            lower = batch.lower.numpy()
            masks += [lower, ~lower]
        if classes is not None:
            of_each = [
                classes.of_window(windows.plan, windows.index.segments, int(sample))
                for sample in batch.samples
            ]
            masks += list(np.stack(of_each, axis=1))
        sums = [(nats * mask).sum(axis=1) for mask in masks]
        counts = [(labelled & mask).sum(axis=1) for mask in masks]
        sums[1:1] = list(np.add.reduceat(nats, starts, axis=1).T)
        counts[1:1] = list(np.add.reduceat(labelled.astype(np.int64), starts, axis=1).T)
        return np.stack(sums, axis=1), np.stack(counts, axis=1)

    return parts, scorer.tally(EvalBatches(read, scorer.place, most), groups)


def score_contexts(scorer: Scorer, windows: Windows, most: int, lengths: Sequence[int]) -> Tally:
    """Score the same bases with contexts of different length; one group for each length.

    The bases are half of each window, whose length is the longest of `lengths`: the last half, or for masked bases the
    middle one. For a length c they are scored in pieces of c/2, each at the end of c bases (masked: in their middle).
    So each base has c/2 to c bases before it (masked: c/4 to 3c/4 on each side) if it is scored with length c. Every
    length takes one forward pass over as many bases as the windows have.
    """
    causal = windows.mask_rate is None
    longest = windows.plan.length

    def groups(batch: Batch, wide: Wide) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        of_each = [_in_context(scorer, wide, length, longest, causal) for length in lengths]
        nats, counts = zip(*of_each, strict=True)
        return np.stack(nats, axis=1), np.stack(counts, axis=1)

    return scorer.tally(EvalBatches(windows, scorer.place, most), groups)


def _in_context(
    scorer: Scorer, wide: Wide, length: int, longest: int, causal: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Nats and number, for each window, of the bases that all lengths score, in contexts of `length`."""
    batch = len(wide.tokens)
    first = longest // 2 if causal else longest // 4
    last = longest if causal else first + longest // 2
    step = max(length // 2, 1)
    tokens, labels = [], []
    for start in range(first, last, step):
        end = min(start + step, last)
        begin = end - length if causal else min(max(start - length // 4, 0), longest - length)
        part = wide.tokens[:, begin : begin + length].clone()
        if causal:
            part[:, 0] = BOS
        label = torch.full_like(part, IGNORE)
        label[:, start - begin : end - begin] = wide.labels[:, start:end]
        tokens.append(part)
        labels.append(label)
    nats, counts = np.zeros(batch), np.zeros(batch, np.int64)
    together = max(longest // length, 1)
    for at in range(0, len(tokens), together):
        piece = Wide(torch.cat(tokens[at : at + together]), torch.cat(labels[at : at + together]), None)
        nats += scorer.nats(piece).sum(axis=1).reshape(-1, batch).sum(axis=0)
        counts += (piece.labels != IGNORE).sum(dim=1).numpy().reshape(-1, batch).sum(axis=0)
    return nats, counts


def score_copies(
    scorer: Scorer, windows: Windows, most: int, copy: int, source: recall.Source | None, gap: int
) -> Tally:
    """Score the copies at the ends of windows; one group.

    Args:
        scorer: scores them.
        windows: of the split.
        most: number of windows; 0: all.
        copy: bases of a copy.
        source: what is written before it; None: nothing.
        gap: the distance between them.
    """

    def groups(batch: Batch, wide: Wide) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        labelled = (wide.labels != IGNORE).numpy()
        return scorer.nats(wide).sum(axis=1)[:, None], labelled.sum(axis=1)[:, None]

    batches = recall.probe_batches(windows, scorer.place, most, copy, source, [gap])
    return scorer.tally(batches, groups)
