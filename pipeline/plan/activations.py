"""What one forward and backward pass of a rank keeps in memory: the residual streams and the work of one branch.

A reversible stack keeps the two streams and their gradients, whatever its depth. Beside them, the branch that is being
inverted needs the most; branches follow each other, so the largest counts. The figures of `WORK` are what has to change
when the model's use of memory does: `python -m benchmarks.plan` compares them with measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megabase.models.config import ReformerConfig

STREAMS = 16.0
"""Bytes for each position and channel: two streams of int32, and their gradients in fp32."""

FEEDFORWARD, HEAD = "feed-forward", "norm, head and loss"


@dataclass(frozen=True)
class Work:
    """What a branch has in memory at once beside the streams and their gradients, for each position.

    Attributes:
        wide: numbers of 4 bytes for each channel of the model (dim).
        narrow: numbers of the precision of the computation for each channel of its heads (heads x head_dim).
        rounds: bytes for each head and round of hashing.
    """

    wide: float
    narrow: float
    rounds: float = 0.0

    def bytes(self, config: ReformerConfig, width: int) -> float:
        """Bytes of a position, with numbers of `width` bytes in the computation."""
        narrow = self.narrow * config.heads * config.width * width
        return self.wide * 4 * config.dim + narrow + self.rounds * config.heads * config.lsh.rounds


WORK: Mapping[str, Work] = {
    "local": Work(wide=4.0, narrow=12.0),
    "lsh": Work(wide=4.0, narrow=14.0, rounds=8.0),
    "full": Work(wide=4.0, narrow=12.0),
    "linformer": Work(wide=4.0, narrow=12.0),
    "performer": Work(wide=4.0, narrow=12.0),
    FEEDFORWARD: Work(wide=3.0, narrow=3.0),
    HEAD: Work(wide=4.0, narrow=4.0),
}
"""The work of each kind of branch, and of what follows the stack."""

HIDDEN = 4.0
"""Numbers of the computation for each channel of a feed-forward's hidden layer, for the tokens of one chunk."""

CHUNKS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a chunk where `model.feedforward.chunk` is 0: CPU_CHUNK and GPU_CHUNK of `models/feedforward.py`."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a rank's activations.

    Attributes:
        streams: the residual streams and their gradients.
        largest: the branch that needs the most beside them.
        work: what that branch needs.
    """

    streams: int
    largest: str
    work: int


def activations_of(
    config: ReformerConfig,
    positions: int,
    width: int,
    device: str,
    *,
    work: Mapping[str, Work] = WORK,
    streams: float = STREAMS,
) -> Activations:
    """The activations of a forward and backward pass.

    Args:
        config: of the model.
        positions: of a micro batch that the rank holds.
        width: bytes of a number in the computation: 4, or 2 in half precision.
        device: `cpu` or `cuda`.
        work: the figures of each branch.
        streams: bytes of the streams for each position and channel.
    """
    kinds = [*dict.fromkeys(config.pattern), FEEDFORWARD, HEAD]
    needs = {kind: positions * work[kind].bytes(config, width) for kind in kinds}
    needs[FEEDFORWARD] += _chunk_bytes(config, positions, width, device)
    largest = max(needs, key=lambda kind: needs[kind])
    return Activations(round(streams * config.dim * positions), largest, round(needs[largest]))


def _chunk_bytes(config: ReformerConfig, positions: int, width: int, device: str) -> float:
    """Bytes of the hidden layers of one chunk of the feed-forward, with their gradients."""
    tokens = min(positions, config.feedforward.chunk or CHUNKS[device])
    wide = 2 if config.feedforward.activation == "swiglu" else 1
    return HIDDEN * wide * config.hidden * tokens * width
