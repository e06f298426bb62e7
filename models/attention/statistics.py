"""How well the hashing of LSH layers works, measured while a model computes something else.

    with lsh_statistics(model) as found:
        model.loss(tokens, labels)
    found[3].balance        # of the LSH layer with number 3

What to look for: a layer whose `balance` falls puts most positions into few buckets. Then `truncated` rises: buckets
have more positions than a query can reach, and the right key may not be among them. `unmatched` positions find no key
at all; with values that look ahead, the layer outputs zero there. A round with a small share of `mass` adds little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megabase.models.attention.kernels.dispatch import unit_keys
from megabase.models.attention.kernels.inputs import Rule, SortedOrder
from megabase.models.attention.kernels.reference import first_occurrences
from megabase.models.attention.lsh import LSHAttention

QUERIES = 128
"""Positions of a sequence, evenly spread, whose attention weights are computed for `mass`."""


@dataclass(frozen=True)
class LSHStatistics:
    """The hashing of one layer in one pass, over all sequences and heads.

    Attributes:
        balance: n² / (buckets · Σ count²), with the counts of the n positions of a sequence by bucket; the mean over
            rounds. 1: all buckets are equally full; 1 / buckets: all positions are in one.
        unmatched: share of the positions that find no key in any round.
        truncated: share of (position, round) whose bucket has more positions than the rule reaches.
        mass: share of the attention's weights that each round has. If a key counts once, it is in the first round that
            finds it.

    The last three are None under the rule `chunk`, by which positions find keys of other buckets, too.
    """

    balance: float
    unmatched: float | None = None
    truncated: float | None = None
    mass: tuple[float, ...] | None = None


@contextmanager
def lsh_statistics(model: nn.Module) -> Iterator[dict[int, LSHStatistics]]:
    """Measure every LSH layer of a model while it computes.

    The model's results do not change. Nothing is communicated, and no parameter is read, so ranks under ZeRO stage 3
    may measure different passes. Reads the device.

    Args:
        model: any module with LSHAttention layers in it; there may be none.

    Yields:
        What is found, by the number of the layer; of several passes, the last one.
    """
    found: dict[int, LSHStatistics] = {}
    layers = [module for module in model.modules() if isinstance(module, LSHAttention)]
    handles = [layer.sort.register_forward_hook(partial(_measure, found, layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    found: dict[int, LSHStatistics],
    layer: LSHAttention,
    module: nn.Module,
    arguments: tuple[Any, ...],
    order: SortedOrder,
) -> None:
    qk, rotations, _ = arguments
    with torch.no_grad():
        found[layer.layer] = measure(qk.detach(), order, rotations.n_buckets, layer.rule)


def measure(qk: Tensor, order: SortedOrder, n_buckets: int, rule: Rule) -> LSHStatistics:
    """The statistics of one layer.

    Args:
        qk: (batch, heads, length, d).
        order: in which they are sorted.
        n_buckets: number of buckets of a round.
        rule: which keys a position finds.
    """
    length = order.buckets.shape[-1]
    slot = torch.arange(length, device=qk.device)
    real = slot < order.real_lengths[:, None, None]  # (rows, 1, length), by slot
    counts = torch.zeros(*order.buckets.shape[:2], n_buckets, device=qk.device, dtype=torch.float64)
    # Slots of positions that are not real have no bucket of their own; they count 0 in any.
    buckets = order.buckets.long().clamp(max=n_buckets - 1)
    counts.scatter_add_(-1, buckets, real.expand_as(buckets).double())
    lengths = order.real_lengths.double()
    balance = (lengths[:, None] ** 2 / (n_buckets * counts.square().sum(-1)).clamp(min=1)).mean()
    if rule.attend != "window":
        return LSHStatistics(float(balance))
    finds = _shares_bucket(order, real, 1, rule) & real
    matched = finds.gather(-1, order.slots.long()).any(dim=1)
    total = lengths.sum().clamp(min=1)
    truncated = (_shares_bucket(order, real, rule.reach + 1, rule) & real).sum() / finds.shape[1]
    return LSHStatistics(
        balance=float(balance),
        unmatched=1.0 - float(matched.sum() / total),
        truncated=float(truncated / total),
        mass=tuple(_mass(qk.flatten(0, 1).float(), order, rule).tolist()),
    )


def _shares_bucket(order: SortedOrder, real: Tensor, distance: int, rule: Rule) -> Tensor:
    """Whether the slot `distance` before (not causal: or after) each slot holds a position of its bucket."""
    same = (
        (order.buckets[..., distance:] == order.buckets[..., :-distance])
        & real[..., distance:]
        & real[..., :-distance]
    )
    shares = torch.zeros_like(order.buckets, dtype=torch.bool)
    shares[..., distance:] = same
    if not rule.causal:
        shares[..., :-distance] |= same
    return shares


def _mass(qk: Tensor, order: SortedOrder, rule: Rule) -> Tensor:
    """The mean share of each round (rounds,) in the weights of QUERIES positions; qk (rows, length, d) fp32."""
    rows, rounds, length = order.buckets.shape
    share = torch.linspace(0, 1, min(QUERIES, length), device=qk.device)
    queries = (share * (order.real_lengths[:, None] - 1).clamp(min=0)).long()  # (rows, queries)
    back = torch.arange(1, rule.reach + 1, device=qk.device)
    distances = back if rule.causal else torch.cat((back, -back))
    row = torch.arange(rows, device=qk.device)[:, None, None]
    own, keys = qk[row[..., 0], queries], unit_keys(qk)
    scores, positions, found = [], [], []
    for number in range(rounds):
        buckets = order.buckets[:, number]
        slots = order.slots[:, number].long().gather(-1, queries)
        at = slots[..., None] - distances
        inside = (at >= 0) & (at < order.real_lengths[:, None, None])
        at = at.clamp(0, length - 1)
        found.append(inside & (buckets[row, at] == buckets.gather(-1, slots)[..., None]))
        positions.append(order.positions[:, number].long()[row, at])
        scores.append(torch.einsum("rqd,rqkd->rqk", own, keys[row, positions[-1]]))
    counts = torch.cat(found, dim=-1)
    if rule.once:
        counts = first_occurrences(torch.cat(positions, dim=-1), counts)
    weights = torch.cat(scores, dim=-1).masked_fill(~counts, -torch.inf).softmax(dim=-1)
    of_rounds = weights.unflatten(-1, (rounds, -1)).sum(dim=-1)
    matched = counts.any(dim=-1)  # the weights of other positions are NaN
    return of_rounds[matched].double().mean(dim=0)
