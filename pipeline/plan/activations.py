"""What one forward and backward pass of a rank keeps in memory: the residual streams and the work of one branch.

A reversible stack keeps the two streams and their gradients, whatever its depth. Beside them, the branch that is being
inverted needs the most; branches follow each other, so the largest counts. The figures of `WORK` are what has to change
when the model's use of memory does. Those of CPUs are measured: `python -m benchmarks.memory` has bytes for each
position and channel, and `python -m benchmarks.plan` compares whole trainings. Those of GPUs are the same tensors in
the precision of the GPU, and the kernels' sums in fp32, counted in the code.
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
        fixed: numbers of the computation for each channel of the model (dim): inputs, output.
        heads: numbers of the computation for each channel of the heads that are computed together: queries, keys,
            values, their gradients.
        sums: numbers in fp32 for the same channels.
        rounds: bytes for each of these heads and each round of hashing: the sorted order.
    """

    fixed: float
    heads: float = 0.0
    sums: float = 0.0
    rounds: float = 0.0

    def bytes(self, config: ReformerConfig, width: int, groups: int = 1, *, shared: bool = False) -> float:
        """Bytes of a position.

        Args:
            config: of the model.
            width: bytes of a number in the computation.
            groups: of heads, which are computed one after the other.
            shared: several ranks share the sequence.
        """
        fixed = (
            self.fixed + (IN_GROUPS if groups > 1 else 0.0) + (EXCHANGED if shared and self.heads else 0.0)
        )
        channels = config.heads * config.width / groups
        heads = channels * (self.heads * width + self.sums * 4)
        return fixed * config.dim * width + heads + self.rounds * config.heads * config.lsh.rounds / groups


_REST = {FEEDFORWARD: Work(fixed=2.0), HEAD: Work(fixed=4.0)}
WORK: Mapping[str, Mapping[str, Work]] = {
    "cpu": {
        **dict.fromkeys(("local", "full", "linformer", "performer"), Work(fixed=3.0, heads=8.5)),
        "lsh": Work(fixed=3.0, heads=7.0, rounds=20.0),
        **_REST,
    },
    "cuda": {
        **dict.fromkeys(("local", "full", "linformer", "performer"), Work(fixed=3.0, heads=11.0)),
        "lsh": Work(fixed=3.0, heads=9.0, sums=2.0, rounds=20.0),
        **_REST,
    },
}
"""The work of each kind of branch, and of what follows the stack, by device."""

IN_GROUPS = 2.5
"""Further numbers for each channel of the model, where heads are computed in groups: sums of outputs and gradients."""

EXCHANGED = 1.0
"""The same, where ranks share the sequence: what is received."""

GROUPED = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Numbers of the queries of one group of heads, at most: LIMIT of `models/attention/by_heads.py`."""

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
    parts: int = 1,
    work: Mapping[str, Work] | None = None,
    in_groups: bool = True,
) -> Activations:
    """The activations of a forward and backward pass.

    Args:
        config: of the model.
        positions: of a micro batch that the rank holds.
        width: bytes of a number in the computation: 4, or 2 in half precision.
        device: `cpu` or `cuda`.
        parts: ranks that share each sequence.
        work: the figures of each branch; None: WORK.
        in_groups: heads may be computed in groups.
    """
    work = WORK[device] if work is None else work
    needs = {}
    for kind in dict.fromkeys(config.pattern):
        groups = groups_of(config, kind, positions, device, parts) if in_groups else 1
        needs[kind] = positions * work[kind].bytes(config, width, groups, shared=parts > 1)
    needs[HEAD] = positions * work[HEAD].bytes(config, width)
    needs[FEEDFORWARD] = positions * work[FEEDFORWARD].bytes(config, width)
    needs[FEEDFORWARD] += _chunk_bytes(config, positions, width, device)
    largest = max(needs, key=lambda kind: needs[kind])
    return Activations(round(STREAMS * config.dim * positions), largest, round(needs[largest]))


def groups_of(config: ReformerConfig, kind: str, positions: int, device: str, parts: int = 1) -> int:
    """How many groups of heads a layer computes in turn: `head_groups` of `models/attention/by_heads.py`."""
    if kind == "linformer" or config.heads % parts:
        return 1
    each = config.heads // parts
    least = min(each, -(-positions * config.heads * config.width // GROUPED[device]))
    return next(count for count in range(max(1, least), each + 1) if each % count == 0)


def _chunk_bytes(config: ReformerConfig, positions: int, width: int, device: str) -> float:
    """Bytes of the hidden layers of one chunk of the feed-forward, with their gradients."""
    tokens = min(positions, config.feedforward.chunk or CHUNKS[device])
    wide = 2 if config.feedforward.activation == "swiglu" else 1
    return HIDDEN * wide * config.hidden * tokens * width
