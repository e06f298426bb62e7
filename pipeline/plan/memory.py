"""The memory of a rank by kind: states by ZeRO stage, buckets, activations, the optimizer's step, copies, libraries.

States as in ZeRO (Rajbhandari et al. 2020, section 3), with DeepSpeed's fp32 copy of the weights also where the model
computes in fp32. A rank needs the most either in the backward pass (activations, buckets) or in the optimizer's step
(fp32 gradients), never both at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megabase.pipeline.config.schema import CPU, NONE, NVME, RunConfig
from megabase.pipeline.config.trainer import HOST as STREAMS_ON_HOST
from megabase.pipeline.plan.activations import Activations, activations_of
from megabase.pipeline.zero.reserved import HPZ, ZERO

DEVICE, HOST, DISK = "device", "host", "disk"
_PLACES = {NONE: DEVICE, CPU: HOST, NVME: DISK}
KEPT, PASS, UPDATE = "kept", "pass", "update"
_FP32 = 4
_MOMENTS = 8

LIBRARIES = 700 << 20
"""Resident memory of a rank on CPUs before it has a model: Python, torch, Lightning, DeepSpeed. On GPUs it is in host
memory, and what CUDA and NCCL take of the device is `reserved_gib` of the profile."""

TRACKING = 60 << 20
"""What MLflow adds to it on rank 0."""

MOST_GATHERED = 10**9
"""Parameters that DeepSpeed keeps gathered in stage 3 for their next use (stage3_max_live_parameters and
stage3_max_reuse_distance)."""


@dataclass(frozen=True)
class Part:
    """One part of a rank's memory.

    Attributes:
        name: what it is.
        bytes: that a rank keeps.
        place: DEVICE, HOST or DISK.
        when: KEPT: always. PASS: in a forward and backward pass only. UPDATE: in the optimizer's step only.
    """

    name: str
    bytes: int
    place: str
    when: str = KEPT


@dataclass(frozen=True)
class Memory:
    """Memory of a rank.

    Attributes:
        states: weights, gradients and states of the optimizer.
        work: everything else.
    """

    states: list[Part]
    work: list[Part]

    def total(self, place: str) -> int:
        """Bytes of the states that are kept in a place."""
        return sum(part.bytes for part in self.states if part.place == place)

    def peak(self, place: str) -> int:
        """The most bytes that a rank needs in a place at once."""
        parts = [part for part in [*self.states, *self.work] if part.place == place]
        kept, in_pass, in_update = (
            sum(part.bytes for part in parts if part.when == when) for when in (KEPT, PASS, UPDATE)
        )
        return kept + max(in_pass, in_update)


def memory_of(config: RunConfig, parameters: int, ranks: int, precision: str, device: str) -> Memory:
    """The memory of a rank.

    Args:
        config: of the run; `model.vocab_size` may be missing.
        parameters: number of parameters.
        ranks: that share the states.
        precision: '32', 'bf16' or '16'.
        device: `cpu` or `cuda`.
    """
    width = _FP32 if precision == "32" else 2
    positions = config.data.micro_batch * config.data.length // config.trainer.sequence_ranks
    # CPUs without units for half precision compute in fp32 (`models/layers.linear`).
    computed = width if device != "cpu" else _FP32
    parts = config.trainer.sequence_ranks
    activations = activations_of(config.model, positions, computed, device, parts=parts)
    work = [
        *_activations(activations, HOST if config.trainer.offload_streams == STREAMS_ON_HOST else DEVICE),
        *_buffers(config, parameters, width, device),
        *_update(config, parameters, ranks, precision),
        *_copies(config, parameters, ranks),
        Part("Python and libraries", LIBRARIES + TRACKING * config.tracking.enabled, HOST),
    ]
    if device == "cpu":  # the device is the host
        work = [Part(part.name, part.bytes, DEVICE, part.when) for part in work]
    return Memory(_states(config, parameters, ranks, precision, device), work)


def _states(config: RunConfig, parameters: int, ranks: int, precision: str, device: str) -> list[Part]:
    """Weights, gradients and states of the optimizer."""
    zero, width = config.zero, _FP32 if precision == "32" else 2
    share = -(-parameters // ranks)
    weights = width * (share if zero.stage == 3 else parameters)
    gradients = width * (share if zero.stage >= 2 else parameters)
    # Without sharding and in fp32, torch's AdamW updates the weights themselves.
    copy = 0 if zero.stage == 0 and precision == "32" else _FP32
    optimizer = (copy + _MOMENTS) * (share if zero.stage else parameters)
    places = {**_PLACES, CPU: DEVICE} if device == "cpu" else _PLACES
    offload, offload_parameters = places[zero.offload], places[zero.offload_parameters]
    states = [
        Part("weights", weights, offload_parameters),
        Part("gradients", gradients, DEVICE),
        Part(f"AdamW's moments{' and fp32 weights' * bool(copy)}", optimizer, offload),
    ]
    if zero.offload != NONE:
        states.append(Part("fp32 gradients", _FP32 * share, offload))
    return states


def _activations(found: Activations, streams: str) -> list[Part]:
    return [
        Part("streams and their gradients", found.streams, streams, PASS),
        Part(f"work of one branch: {found.largest}", found.work, DEVICE, PASS),
    ]


def _buffers(config: RunConfig, parameters: int, width: int, device: str) -> list[Part]:
    """DeepSpeed's buckets, and the weights that stage 3 has gathered."""
    zero, parts = config.zero, []
    bucket = zero.bucket_mb << 20
    if device == "cpu":  # pages that are not written take no memory
        bucket = min(bucket, width * parameters)
    if zero.stage:
        second = zero.overlap_comm and zero.stage < 3
        parts.append(Part("bucket of gradients", bucket * (2 if second else 1), DEVICE, PASS))
    if (group := zero.deepspeed.get(ZERO, {}).get(HPZ, 1)) > 1:
        parts.append(Part("second copy of the weights (hpZ)", -(-width * parameters // group), DEVICE))
    if zero.stage == 3:
        parts.append(Part("gathered weights", width * min(parameters, MOST_GATHERED), DEVICE, PASS))
    return parts


def _update(config: RunConfig, parameters: int, ranks: int, precision: str) -> list[Part]:
    """Gradients in fp32 and AdamW's denominator, of what a rank updates."""
    zero = config.zero
    if zero.offload != NONE or (zero.stage == 0 and precision == "32"):
        return []
    updated = -(-parameters // ranks) if zero.stage else parameters
    return [Part("fp32 gradients and AdamW's work", 2 * _FP32 * updated, DEVICE, UPDATE)]


def _copies(config: RunConfig, parameters: int, ranks: int) -> list[Part]:
    """The copy of a rank's states that a checkpoint in the background is written from."""
    if not config.checkpoint.background:
        return []
    share = -(-parameters // (ranks if config.zero.stage else 1))
    return [Part("copy for a checkpoint in the background", (_FP32 + _MOMENTS) * share, HOST)]
