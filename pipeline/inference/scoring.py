"""Loss and bits per base of a model on batches of windows. Needs neither Lightning nor DeepSpeed.

A training passes a function that scores a batch through DeepSpeed; a plain Reformer in one process is scored by
`scorer(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megabase.datamodules.batches.collate import Batch, Wide
from megabase.models import Reformer, Seeds


class Score(NamedTuple):
    """The score of one batch: sum of nats over its scored bases, number of these bases, number of windows not read.

    Each is a scalar tensor on the model's device.
    """

    nats: Tensor
    bases: Tensor
    skipped: Tensor


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
) -> dict[str, float] | None:
    """Mean loss over all batches, of all ranks of a group. Put the model into evaluation mode before.

    Args:
        score: scores one batch as it comes from the loader.
        loader: this rank's batches, each window of the split in one batch of one rank.
        device: of the sums: the device of the tensors that `score` returns.
        group: the ranks to sum over, each of which calls this function; None: this process alone.
        stop: called before each batch; if it returns true, the evaluation ends. Every rank must get the same answer.

    Returns:
        valid_loss (nats per scored base), valid_bits_per_base, valid_bases (number of scored bases: all letters of
        the windows, or with `data.objective` masked the masked ones), and valid_skipped, the number of windows that
        could not be read (`data.on_error` skip), if there are any. None if `stop` ended it.
    """
    total = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in loader:
            if stop():
                return None
            total += torch.stack([each.double() for each in score(batch)])
    if group is not None:
        dist.all_reduce(total, group=group)
    nats, bases, skipped = total.tolist()
    loss = nats / bases if bases else math.nan
    result = {"valid_loss": loss, "valid_bits_per_base": bits(loss), "valid_bases": int(bases)}
    return result | ({"valid_skipped": int(skipped)} if skipped else {})


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


def score_batch(model: Reformer, batch: Batch, seed: int) -> Score:
    """Score one batch that is on the model's device. Evaluation weighs every scored base alike."""
    wide = batch.widened()
    nats = model.loss(wide.tokens, wide.labels, seeds=Seeds(run=seed))
    bases, skipped = scored(wide._replace(weights=None), batch.skipped)
    return Score(nats, bases, skipped)


def base_nats(model: Reformer, wide: Wide, seeds: Seeds) -> Tensor:
    """The nats of every labelled base, by itself.

    The products run in the precision of autocast; logits, log-softmax and result are fp32.

    Args:
        model: in evaluation mode.
        wide: on the model's device; `weights` are ignored.
        seeds: of the rotations of LSH attention.

    Returns:
        (batch, length) fp32, 0 where there is no label.
    """
    hidden = model.body(wide.tokens, seeds=seeds)
    parts = []
    for start in range(0, hidden.shape[1], model.head.chunk):
        part = slice(start, start + model.head.chunk)
        labels = wide.labels[:, part]
        logits = model.head(hidden[:, part]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        parts.append(nats.view(labels.shape))
    return torch.cat(parts, dim=1)


def scored(wide: Wide, skipped: int) -> Tensor:
    """The sum of the weights of a batch's labels, and `skipped`: (2,) fp64 on its device, without synchronising."""
    labelled = wide.labels != -100
    weight = labelled.sum() if wide.weights is None else wide.weights.double().where(labelled, 0.0).sum()
    return torch.stack([weight.double(), torch.full_like(weight, skipped, dtype=torch.float64)])
