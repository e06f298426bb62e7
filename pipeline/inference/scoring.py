"""Loss and bits per base of a model on batches of windows. Needs neither Lightning nor DeepSpeed.

A training passes a function that scores a batch through DeepSpeed; a plain Reformer in one process is scored by
`scorer(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megabase.datamodules.batches.collate import IGNORE, Batch, Wide
from megabase.models import Reformer, Seeds
from megabase.models.sequence import Part
from megabase.pipeline.inference.parts import part_sums


class Score(NamedTuple):
    """The score of one batch, in tensors on the model's device.

    Attributes:
        nats: sum over the scored bases.
        bases: number of these bases.
        skipped: number of windows that could not be read.
        parts: (parts, 2) fp64, nats and number of bases of each part of the windows, see `parts.part_sums`.
    """

    nats: Tensor
    bases: Tensor
    skipped: Tensor
    parts: Tensor


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)


def evaluate(
    score: Callable[[Batch], Score],
    loader: Iterable[Batch],
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    stop: Callable[[], bool] = lambda: False,
    parts: Sequence[str] = (),
) -> dict[str, float] | None:
    """Mean loss over all batches, of all ranks of a group. Put the model into evaluation mode before.

    Args:
        score: scores one batch as it comes from the loader.
        loader: this rank's batches, each window of the split in one batch of one rank.
        device: of the sums: the device of the tensors that `score` returns.
        group: the ranks to sum over, each of which calls this function; None: this process alone.
        stop: called before each batch; if it returns true, the evaluation ends. Every rank must get the same answer.
        parts: names of the parts of the windows to report, `parts.part_names`; empty: none.

    Returns:
        valid_loss (nats per scored base), valid_bits_per_base, valid_bases (number of scored bases: all letters of
        the windows, or with `data.objective` masked the masked ones), valid_skipped, the number of windows that could
        not be read (`data.on_error` skip), if there are any, and valid_PART_bits_per_base of each part that has some of
        the scored bases, but not all. None if `stop` ended it.
    """
    total = torch.zeros(3 + 2 * len(parts), dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in loader:
            if stop():
                return None
            *whole, of_parts = score(batch)
            total[:3] += torch.stack([each.double() for each in whole])
            if parts:
                total[3:] += of_parts.flatten()
    if group is not None:
        dist.all_reduce(total, group=group)
    nats, bases, skipped, *sums = total.tolist()
    loss = nats / bases if bases else math.nan
    result = {"valid_loss": loss, "valid_bits_per_base": bits(loss), "valid_bases": int(bases)}
    if skipped:
        result["valid_skipped"] = int(skipped)
    for name, of_part, count in zip(parts, sums[::2], sums[1::2], strict=True):
        if 0 < count < bases:
            result[f"valid_{name}_bits_per_base"] = bits(of_part / count)
    return result


def measure_recall(
    score: Callable[[Batch], Score],
    probe: tuple[Iterable[Batch], Iterable[Batch]],
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """How much better copies are predicted than the same bases without a source, over all ranks of a group.

    Args:
        score, device, group, stop: see `evaluate`.
        probe: this rank's batches with the sources of the copies, and without, of `SequenceDataModule.recall_probe`.

    Returns:
        valid_copy_bits_per_base (of the copies, with their sources) and valid_recall_bits (bits per base gained by the
        sources); empty if no base was scored. None if `stop` ended it.
    """
    losses = []
    for batches in probe:
        result = evaluate(score, batches, device, group=group, stop=stop)
        if result is None:
            return None
        if not result["valid_bases"]:
            return {}
        losses.append(result["valid_bits_per_base"])
    return {"valid_copy_bits_per_base": losses[0], "valid_recall_bits": losses[1] - losses[0]}


def scorer(model: Reformer, seed: int) -> Callable[[Batch], Score]:
    """A function that scores batches with a plain Reformer, moving them to its device.

    Args:
        model: in evaluation mode.
        seed: `run.seed`, from which the rotations of LSH attention are drawn.
    """
    device = next(model.parameters()).device

    def score(batch: Batch) -> Score:
        moved = batch._replace(
            codes=batch.codes.to(device),
            hidden=None if batch.hidden is None else batch.hidden.to(device),
            soft=None if batch.soft is None else batch.soft.to(device),
            samples=batch.samples.to(device),
        )
        return score_batch(model, moved, seed)

    return score


def score_batch(model: Reformer, batch: Batch, seed: int, part: Part | None = None) -> Score:
    """Score one batch that is on the model's device. Evaluation weighs every scored base alike.

    Args:
        model: in evaluation mode.
        batch: of windows, or of a part of each.
        seed: `run.seed`.
        part: what part of the windows the batch holds; None: all of them.
    """
    wide = batch.widened()._replace(weights=None)
    hidden = model.body(wide.tokens, seeds=Seeds(run=seed), part=part)
    nats = model.head(hidden, wide.labels)
    bases, skipped = scored(wide, batch.skipped)
    of_bases, labelled = _label_nats(model, hidden, wide.labels), wide.labels != IGNORE
    if part is None:
        return Score(nats, bases, skipped, part_sums(of_bases, labelled, batch.lower))
    return Score(nats, bases, skipped, part_sums(of_bases, labelled, batch.lower, part.start, part.length))


def base_nats(model: Reformer, wide: Wide, seeds: Seeds, part: Part | None = None) -> Tensor:
    """The nats of every labelled base, by itself.

    The products run in the precision of autocast; logits, log-softmax and result are fp32.

    Args:
        model: in evaluation mode.
        wide: on the model's device; `weights` are ignored.
        seeds: of the rotations of LSH attention.
        part: what part of the sequences `wide` holds; None: all of them.

    Returns:
        (batch, length) fp32, 0 where there is no label.
    """
    return _label_nats(model, model.body(wide.tokens, seeds=seeds, part=part), wide.labels)


def _label_nats(model: Reformer, hidden: Tensor, labels: Tensor) -> Tensor:
    """The nats (batch, length) of labels from hidden states, without all logits in memory."""
    found = []
    for part, of_part in zip(
        hidden.split(model.head.chunk, dim=1), labels.split(model.head.chunk, dim=1), strict=True
    ):
        logits = model.head(part).float()
        nats = F.cross_entropy(logits.flatten(0, 1), of_part.flatten(), ignore_index=IGNORE, reduction="none")
        found.append(nats.view(of_part.shape))
    return torch.cat(found, dim=1)


def scored(wide: Wide, skipped: int) -> Tensor:
    """The sum of the weights of a batch's labels, and `skipped`: (2,) fp64 on its device, without synchronising."""
    labelled = wide.labels != IGNORE
    weight = labelled.sum() if wide.weights is None else wide.weights.double().where(labelled, 0.0).sum()
    return torch.stack([weight.double(), torch.full_like(weight, skipped, dtype=torch.float64)])
