"""The time of an optimizer step by kind: products, attention, streams, launches, update, communication.

Each kind is its work divided by what the hardware's profile reaches of its peak. A reversible stack runs the forward
pass twice and a backward pass of twice its work: four times the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from megabase.models.config import ReformerConfig
from megabase.models.flops import attention_flops, feedforward_flops, head_flops, keys_per_query
from megabase.pipeline.config.schema import NONE, RunConfig
from megabase.pipeline.config.trainer import HOST
from megabase.pipeline.plan.batches import Batches
from megabase.pipeline.plan.profiles import CPU, Profile, cores_of_a_rank
from megabase.pipeline.plan.traffic import ALL_GATHER, bandwidth, exchanged_bytes, seconds_of, transfers_of

PASSES = 4.0
"""Forward passes that a reversible forward and backward pass costs."""

MOVED_BYTES = 42.0
"""Bytes that move between host memory and device for each position, channel and branch, where streams are on the host:
12 in the forward pass, where one stream is read and one updated, and about 30 in the backward pass. An estimate."""

BACKWARD = 0.75
"""Share of them during which gradients are ready to be sent, with zero.overlap_comm."""

STREAM_BYTES = 130.0
"""Bytes that move to and from memory for each position, channel and branch: streams, norms, convolutions, gradients."""

UPDATE_BYTES = 40.0
"""Bytes that move to and from memory for each parameter in AdamW's step."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by kind.

    Attributes:
        products: matrix products of projections, feed-forward and head.
        attention: scores and their sums, hashing, sorting.
        streams: what memory's bandwidth limits.
        moving: of the streams between host memory and device (trainer.offload_streams).
        launches: time in which the device waits for the host.
        update: AdamW.
        reduction: gradients and weights between ranks.
        exchange: positions of shared windows between ranks.
    """

    products: float
    attention: float
    streams: float
    moving: float
    launches: float
    update: float
    reduction: float
    exchange: float

    @property
    def total(self) -> float:
        """Seconds of the step. What is communicated during computation is left out of `reduction`."""
        return sum(vars(self).values())

    @property
    def limit(self) -> str:
        """What takes the longest: compute, memory bandwidth, launches or communication."""
        return max(self.shares, key=lambda kind: self.shares[kind])

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the step by what limits them."""
        seconds = {
            "compute": self.products + self.attention,
            "memory bandwidth": self.streams + self.update,
            "moving streams": self.moving,
            "launches": self.launches,
            "communication": self.reduction + self.exchange,
        }
        return {kind: each / self.total for kind, each in seconds.items()}


def step_time(
    config: RunConfig, parameters: int, batches: Batches, precision: str, profile: Profile
) -> StepTime:
    """The time of an optimizer step.

    Args:
        config: of the run; `model.vocab_size` is set.
        parameters: number of parameters.
        batches: of the run.
        precision: '32', 'bf16' or '16'.
        profile: of the hardware.
    """
    micro = batches.accumulation
    positions = batches.micro_batch * batches.length // batches.sequence_ranks
    width = 4 if precision == "32" else 2
    nodes, devices = config.trainer.nodes, config.trainer.devices or 1
    cores = cores_of_a_rank(config, devices) if profile.device == CPU else 1.0
    peak, memory = profile.peak_flops(precision) * cores, profile.memory_gb_s * 1e9 * cores
    memory *= profile.achieved.memory
    computed = pass_seconds(config.model, batches.length, peak, memory, profile)
    products, attention, streams = (positions * each for each in computed)
    launch = launch_seconds(config.model, profile)
    # A GPU computes while the host launches; a CPU does one after the other.
    moving = 0.0
    if config.trainer.offload_streams == HOST:
        share = profile.host_gb_s * 1e9 * profile.achieved.memory
        moving = MOVED_BYTES * config.model.dim * 2 * config.model.depth * positions / share
    waits = launch if profile.device == CPU else max(0.0, launch - products - attention - streams)
    updated = parameters if not config.zero.stage else -(-parameters // batches.ranks)
    across = batches.sequence_ranks > devices
    exchange = exchanged_bytes(config, micro, width) / bandwidth(profile, across=across)
    transfers = transfers_of(config, parameters, micro, width)
    reduction = seconds_of(transfers, batches.ranks, nodes, profile)
    if config.zero.overlap_comm and profile.device != CPU:
        gathered = [each for each in transfers if each.how == ALL_GATHER and config.zero.stage < 3]
        hidden = (micro if config.zero.stage > 1 else 1) * (products + attention + streams) * BACKWARD
        after = seconds_of(gathered, batches.ranks, nodes, profile)
        reduction = after + max(0.0, reduction - after - hidden)
    return StepTime(
        products=micro * products,
        attention=micro * attention,
        streams=micro * streams,
        moving=micro * moving,
        launches=micro * waits,
        update=UPDATE_BYTES * updated / memory * (1.0 if config.zero.offload == NONE else OFFLOADED),
        reduction=reduction,
        exchange=exchange,
    )


OFFLOADED = 20.0
"""How many times longer AdamW takes with states in host memory: an estimate."""


def launch_seconds(config: ReformerConfig, profile: Profile) -> float:
    """Seconds in which the host launches the kernels of a forward and backward pass."""
    return 2 * config.depth * profile.launch_ms * 1e-3


def pass_seconds(
    config: ReformerConfig, length: int, peak: float, memory: float, profile: Profile
) -> tuple[float, float, float]:
    """Seconds of a forward and backward pass for one position: matrix products, attention, streams.

    Args:
        config: of the model; `vocab_size` is set.
        length: of a window.
        peak: FLOP/s of a rank at its peak.
        memory: bytes a second that it reaches.
        profile: of the hardware.
    """
    products = config.depth * feedforward_flops(config) * PASSES + head_flops(config) * (PASSES - 1)
    attention = 0.0
    for kind in config.pattern:
        pairs = 4.0 * config.heads * config.width * keys_per_query(config, kind, length)
        products += PASSES * (attention_flops(config, kind, length) - pairs)
        share = profile.achieved.lsh if kind == "lsh" else profile.achieved.attention
        attention += PASSES * pairs / (peak * share)
    streams = STREAM_BYTES * config.dim * 2 * config.depth / memory
    return products / (peak * profile.achieved.products), attention, streams
