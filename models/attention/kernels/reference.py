"""The kernel to read first: list the keys that every position attends to, then take the softmax over the list.

Every other kernel is tested against this one. Memory is O(length · rounds · reach · d), never O(length²). It is
differentiable by ordinary autograd, in any float dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megabase.models.attention.kernels.inputs import PairDropout, Rotations, Rule, SortedOrder


def sorted_attention(
    q: Tensor, k: Tensor, v: Tensor, order: SortedOrder, rule: Rule, dropout: PairDropout | None = None
) -> Tensor:
    """softmax(q · k) v over the keys that `rule` gives to every query (paper, section 2).

    Args:
        q: (rows, length, d).
        k: (rows, length, d), scaled already.
        v: (rows, length, d_v).
        order: The sorted order of the rows.
        rule: Which keys a query attends to.
        dropout: Dropout of attention weights.

    Returns:
        (rows, length, d_v), computed in the inputs' dtype. A position that attends to nothing takes its own value, or
        zeros (`rule.own`). A position that is not real gets zeros.
    """
    rows, length, _ = q.shape
    row = torch.arange(rows, device=q.device)[:, None, None]
    position = torch.arange(length, device=q.device)[None, :, None]
    keys, counts = keys_in_reach(order, rule)

    scores = torch.einsum("nid,niwd->niw", q, k[row, keys]).masked_fill(~counts, -torch.inf)
    empty = ~counts.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1)  # without 0.0, rows without keys would be NaN
    own_value = v if rule.own == "alone" else torch.zeros_like(v)
    if dropout is not None:
        weights = weights * dropout.scale(row, position, keys).to(weights.dtype)
        own_value = own_value * dropout.scale(row, position, position).to(v.dtype)
    out = torch.einsum("niw,niwd->nid", weights, v[row, keys])
    out = torch.where(empty, own_value, out)
    return torch.where(_is_real(order)[..., None], out, 0.0)


def keys_in_reach(order: SortedOrder, rule: Rule) -> tuple[Tensor, Tensor]:
    """List the keys of every position, round after round.

    Returns:
        keys: (rows, length, candidates) int64, positions that may be keys.
        counts: bool of the same shape, which candidates are keys. With `rule.once` a key counts once only.
    """
    rows, rounds, length = order.positions.shape
    device = order.positions.device
    row = torch.arange(rows, device=device)[:, None, None]
    position = torch.arange(length, device=device)[None, :, None]
    real = order.real_lengths[:, None, None]
    keys, counts = [], []
    for number in range(rounds):
        own_slot = order.slots[:, number, :, None].long()
        buckets = order.buckets[:, number]
        for other, slot, exists in _candidates(order, rule, number, own_slot):
            count = exists & (slot >= 0) & (slot < real) & (own_slot < real)
            slot = slot.clamp(0, length - 1)
            key = order.positions[:, other][row, slot].long()
            if rule.attend == "window":
                count &= buckets[row, slot] == buckets[row, own_slot]
            if rule.causal:
                count &= key <= position
            if rule.excludes_own:
                count &= key != position
            keys.append(key)
            counts.append(count)
    all_keys, all_counts = torch.cat(keys, dim=-1), torch.cat(counts, dim=-1)
    return all_keys, first_occurrences(all_keys, all_counts) if rule.once else all_counts


def _candidates(
    order: SortedOrder, rule: Rule, number: int, own_slot: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The slots in reach of every position in round `number`, whatever is in them.

    Args:
        order: The sorted order.
        rule: Which slots are in reach.
        number: Of the round.
        own_slot: (rows, length, 1), the slot of every position.

    Yields:
        A round, slots of this round (rows, length, n), and whether each exists, bool of the same shape.
    """
    device = own_slot.device
    if rule.attend == "window":
        offsets = torch.arange(-rule.reach, 1 if rule.causal else rule.reach + 1, device=device)
        slots = own_slot + offsets
        yield number, slots, torch.ones_like(slots, dtype=torch.bool)
        return
    within = torch.arange(rule.reach, device=device)
    own_chunk = own_slot // rule.reach * rule.reach + within
    in_first_chunk = (own_slot < rule.reach).expand_as(own_chunk)
    yield number, own_chunk, torch.ones_like(in_first_chunk)
    yield number, own_chunk - rule.reach, ~in_first_chunk
    # The first chunk of a round follows the last chunk of the round before.
    rounds = order.positions.shape[1]
    last_chunk = (order.real_lengths[:, None, None].long() - 1).clamp_min(0) // rule.reach
    yield (number - 1) % rounds, (last_chunk * rule.reach + within).expand_as(own_chunk), in_first_chunk


def first_occurrences(keys: Tensor, counts: Tensor) -> Tensor:
    """Let every key count once: of the candidates that count, the first one of each key.

    Args:
        keys: (..., candidates) int64.
        counts: bool of the same shape.

    Returns:
        bool of the same shape.
    """
    ignored = torch.iinfo(torch.int64).max
    sorted_keys, places = keys.masked_fill(~counts, ignored).sort(dim=-1, stable=True)
    repeated = torch.zeros_like(counts)
    repeated[..., 1:] = sorted_keys[..., 1:] == sorted_keys[..., :-1]
    return counts & ~torch.zeros_like(counts).scatter(-1, places, repeated)


def _is_real(order: SortedOrder) -> Tensor:
    """(rows, length) bool, whether a position is real: those in the first `real_lengths` slots are."""
    slot = order.slots[:, 0]
    return slot < order.real_lengths[:, None]


@torch.no_grad()
def rotate_and_hash(x: Tensor, rotations: Rotations) -> Tensor:
    """Angular hash h(x) = argmax([xR, −xR]) (paper, section 2), computed in fp32.

    Args:
        x: (batch, heads, length, d), any float dtype.
        rotations: R of every round and head, on any device.

    Returns:
        (batch, heads, rounds, length) int32 buckets.
    """
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
