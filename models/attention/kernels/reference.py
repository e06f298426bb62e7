"""The readable truth: list the keys every position meets, then softmax over the list.

Memory is O(length · rounds · reach · d), never O(length²). Differentiable by ordinary autograd, any float dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder


def sorted_attention(
    q: Tensor, k: Tensor, v: Tensor, order: SortedOrder, rule: Rule, dropout: PairDropout | None = None
) -> Tensor:
    """See megabase.models.attention.kernels. Computes in the inputs' dtype."""
    rows, length, _ = q.shape
    keys, met = keys_in_reach(order, rule)
    row = torch.arange(rows, device=q.device)[:, None, None]
    position = torch.arange(length, device=q.device)[None, :, None]
    scores = torch.einsum("nid,niwd->niw", q, k[row, keys]).masked_fill(~met, -torch.inf)
    # A position that meets nothing takes its own value: the one element of its list.
    lonely = ~met.any(-1, keepdim=True)
    weights = scores.masked_fill(lonely, 0.0).softmax(dim=-1)
    if dropout is not None:
        weights = weights * dropout.scale(row, position, keys).to(weights.dtype)
    out = torch.einsum("niw,niwd->nid", weights, v[row, keys])
    alone = v * 1.0
    if dropout is not None:
        alone = v * dropout.scale(row, position, position).to(v.dtype)
    out = torch.where(lonely, alone, out)
    real = torch.zeros_like(lonely).scatter(
        1, order.positions[:, 0, :, None].long(), _seated(order)[..., None]
    )
    return torch.where(real, out, 0.0)


def keys_in_reach(order: SortedOrder, rule: Rule) -> tuple[Tensor, Tensor]:
    """The positions each position may meet, round after round: keys (rows, length, places) int64, and which of
    these places hold a key that is met, bool of the same shape."""
    rows, rounds, length = order.positions.shape
    row = torch.arange(rows, device=order.positions.device)[:, None, None]
    position = torch.arange(length, device=order.positions.device)[None, :, None]
    keys, met = [], []
    for this in range(rounds):
        rank = order.slots[:, this, :, None].long()
        is_real = rank < order.real_lengths[:, None, None]
        places = (
            _window(this, rank, rule) if rule.attend == "window" else _chunks(this, rank, order, rule.reach)
        )
        for other, seats, there in places:
            found = there & (seats >= 0) & (seats < order.real_lengths[:, None, None]) & is_real
            seats = seats.clamp(0, length - 1)
            key = order.positions[:, other][row, seats].long()
            if rule.attend == "window":
                found &= order.buckets[:, this][row, seats] == order.buckets[:, this][row, rank]
            if rule.causal:
                found &= key <= position
            if rule.shared:
                found &= key != position
            keys.append(key)
            met.append(found)
    all_keys, all_met = torch.cat(keys, dim=-1), torch.cat(met, dim=-1)
    return all_keys, first_occurrences(all_keys, all_met) if rule.once else all_met


def _window(this: int, rank: Tensor, rule: Rule) -> list[tuple[int, Tensor, Tensor]]:
    """(round, seats, whether the seat is offered): `reach` seats before the own one to it, or as far behind it."""
    offsets = torch.arange(-rule.reach, 1 if rule.causal else rule.reach + 1, device=rank.device)
    seats = rank + offsets
    return [(this, seats, torch.ones_like(seats, dtype=torch.bool))]


def _chunks(this: int, rank: Tensor, order: SortedOrder, reach: int) -> list[tuple[int, Tensor, Tensor]]:
    """(round, seats, whether the seat is offered) of the own chunk, the one before, and the ring's."""
    within = torch.arange(reach, device=rank.device)
    chunk = rank // reach
    last = (order.real_lengths[:, None, None].long() - 1).clamp_min(0) // reach
    own = chunk * reach + within
    before = own - reach
    ring = (last * reach + within).expand_as(own)
    first = (chunk == 0).expand_as(own)
    rounds = order.positions.shape[1]
    return [(this, own, torch.ones_like(first)), (this, before, ~first), ((this - 1) % rounds, ring, first)]


def first_occurrences(keys: Tensor, met: Tensor) -> Tensor:
    """Of the places whose keys are met, the first for every key."""
    nobody = torch.iinfo(torch.int64).max
    ordered, places = keys.masked_fill(~met, nobody).sort(dim=-1, stable=True)
    again = torch.zeros_like(met)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return met & ~torch.zeros_like(met).scatter(-1, places, again)


def _seated(order: SortedOrder) -> Tensor:
    """(rows, length) bool: whether a seat holds a real position."""
    seats = torch.arange(order.positions.shape[-1], device=order.positions.device)
    return seats < order.real_lengths[:, None]


@torch.no_grad()
def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """See megabase.models.attention.kernels.dispatch. Computes in fp32."""
    buckets = torch.empty(*x.shape[:2], rotations.rounds, x.shape[2], dtype=torch.int32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        for number in range(rotations.rounds):
            bucket, weight = torch.zeros((), dtype=torch.int64, device=x.device), 1
            for rotation in rotations.factors(number):
                half = rotation.shape[-1]
                rotated = x @ rotation.to(x.device)
                most, place = rotated.max(dim=-1)
                least, opposite = rotated.min(dim=-1)
                bucket = bucket + weight * torch.where(most >= -least, place, opposite + half)
                weight *= 2 * half
            buckets[:, :, number] = bucket
    return buckets
