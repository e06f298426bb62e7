"""What the ranks send in a step: gradients and weights by ZeRO stage, and positions of shared windows.

Stages 1 and 2 of DeepSpeed 0.19 reduce gradients by all-reduce, stage 2 after each micro batch; stage 3 gathers weights
once for each micro batch, and keeps them between the passes of models of up to a billion parameters. A test counts the
bytes of all collectives on gloo ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megabase.models.config import ReformerConfig
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.plan.memory import MOST_GATHERED
from megabase.pipeline.plan.parameters import small_parameters
from megabase.pipeline.plan.profiles import Profile

PERSISTENT = 10_000
"""In stage 3, tensors of at most so many elements stay gathered: stage3_param_persistence_threshold."""

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step.

    Attributes:
        what: is sent.
        how: ALL_REDUCE, ALL_GATHER or REDUCE_SCATTER.
        bytes: of the full tensors, all calls together.
        calls: in a step.
    """

    what: str
    how: str
    bytes: int
    calls: int

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, with a ring over all ranks."""
        return self.bytes * (2 if self.how == ALL_REDUCE else 1) * (ranks - 1) / ranks


def transfers_of(config: RunConfig, parameters: int, accumulation: int, width: int) -> list[Transfer]:
    """The collectives of ZeRO in a step.

    Args:
        config: of the run; `model.vocab_size` is set.
        parameters: number of parameters.
        accumulation: micro batches of a rank in a step.
        width: bytes of a weight and of a gradient.
    """
    stage, whole = config.zero.stage, parameters * width
    buckets = math.ceil(whole / (config.zero.bucket_mb << 20))
    if stage == 3:
        small = small_parameters(config.model, PERSISTENT) * width
        passes = accumulation * (1 if parameters <= MOST_GATHERED else 2)
        gathered = (whole - small) * passes + small
        layers = 2 * config.model.depth + 2
        return [
            Transfer("gradients", REDUCE_SCATTER, whole * accumulation, accumulation * buckets),
            Transfer("weights", ALL_GATHER, gathered, passes * layers),
        ]
    times = accumulation if stage == 2 else 1
    found = [Transfer("gradients", ALL_REDUCE, whole * times, times * buckets)]
    if stage:
        found.append(Transfer("weights", ALL_GATHER, whole, buckets))
    return found


def exchanged(config: ReformerConfig, kind: str, parts: int) -> float:
    """Numbers that a rank sends in a step for each of its positions, in one layer whose windows `parts` ranks share.

    Both forward passes and the backward pass together. What layers need of their neighbours only is left out: it does
    not grow with the length.
    """
    inner = config.heads * config.width
    if kind == "local" and config.local.attend == "window" and not config.attention_rate("local"):
        return 0.0
    return (9.0 if kind == "lsh" else 12.0) * inner * (parts - 1) / parts


def exchanged_bytes(config: RunConfig, accumulation: int, width: int) -> float:
    """Bytes that a rank sends in a step to the ranks with which it shares windows."""
    parts = config.trainer.sequence_ranks
    positions = config.data.micro_batch * config.data.length // parts * accumulation
    numbers = sum(exchanged(config.model, kind, parts) for kind in config.model.pattern)
    return numbers * positions * width


def seconds_of(transfers: list[Transfer], ranks: int, nodes: int, profile: Profile) -> float:
    """Seconds of the collectives of ZeRO. Over several nodes, the network is what a ring waits for."""
    if ranks == 1:
        return 0.0
    latency = profile.latency_us * 1e-6 * math.log2(ranks)
    rate = bandwidth(profile, across=nodes > 1)
    return sum(each.sent(ranks) / rate + each.calls * latency for each in transfers)


def bandwidth(profile: Profile, *, across: bool) -> float:
    """Bytes a second that a device sends to others of its node, or across nodes."""
    if across:
        return profile.network_gb_s * 1e9 * profile.achieved.network
    return profile.node_gb_s * 1e9 * profile.achieved.node
