"""What a rank keeps in memory of a model's states, by ZeRO stage, and what is known of its activations.

States as in ZeRO (Rajbhandari et al. 2020, section 3), with DeepSpeed's fp32 copy of the weights also where the model
computes in fp32. Activations: of a reversible stack only the two streams are kept, whatever its depth.
"""

from __future__ import annotations

from dataclasses import dataclass

from megabase.pipeline.config.schema import CPU, NONE, NVME, RunConfig

DEVICE, HOST, DISK = "device", "host", "disk"
_PLACES = {NONE: DEVICE, CPU: HOST, NVME: DISK}
_FP32 = 4
_MOMENTS = 8


@dataclass(frozen=True)
class Part:
    """One kind of state of a rank.

    Attributes:
        name: what it is.
        bytes: that a rank keeps.
        place: DEVICE, HOST or DISK.
    """

    name: str
    bytes: int
    place: str


@dataclass(frozen=True)
class Memory:
    """Memory of a rank.

    Attributes:
        states: weights, gradients and states of the optimizer.
        streams: bytes of the two residual streams of a micro batch, with their gradients.
    """

    states: list[Part]
    streams: int

    def total(self, place: str) -> int:
        """Bytes of the states that are kept in a place."""
        return sum(part.bytes for part in self.states if part.place == place)


def memory_of(config: RunConfig, parameters: int, ranks: int, precision: str) -> Memory:
    """The memory of a rank, as far as it follows from settings.

    Not included: what one layer computes with, the buckets of communication, copies for a checkpoint in the background,
    and the libraries.

    Args:
        config: of the run.
        parameters: number of parameters.
        ranks: that share the states.
        precision: '32', 'bf16' or '16'.
    """
    zero, width = config.zero, _FP32 if precision == "32" else 2
    share = -(-parameters // ranks)
    weights = width * (share if zero.stage == 3 else parameters)
    gradients = width * (share if zero.stage >= 2 else parameters)
    # Without sharding and in fp32, torch's AdamW updates the weights themselves.
    copy = 0 if zero.stage == 0 and precision == "32" else _FP32
    optimizer = (copy + _MOMENTS) * (share if zero.stage else parameters)
    offload, offload_parameters = _PLACES[zero.offload], _PLACES[zero.offload_parameters]
    states = [
        Part("weights", weights, offload_parameters),
        Part("gradients", gradients, DEVICE),
        Part(f"AdamW's moments{' and fp32 weights' * bool(copy)}", optimizer, offload),
    ]
    if offload != DEVICE:
        states.append(Part("fp32 gradients", _FP32 * share, offload))
    tokens = config.data.micro_batch * config.data.length // config.trainer.sequence_ranks
    return Memory(states, streams=2 * 2 * _FP32 * config.model.dim * tokens)
