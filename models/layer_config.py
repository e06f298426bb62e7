"""The settings of each kind of layer: plain dataclasses, fields of `ReformerConfig`. This module needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megabase.models.checks import SINGLE_ROTATION, check_at_least, check_buckets, check_name, check_rate

ACTIVATIONS = ("gelu", "relu", "swiglu")
ATTENDS = ("window", "chunk")
DUPLICATES = ("average", "once")
SHARES = ("none", "heads", "keyvalue")


@dataclass
class LSHConfig:
    """Attention among positions whose query-keys hash to the same bucket (Kitaev et al. 2020, section 2).

    Attributes:
        rounds: Independent rounds of hashing. Time grows with their number, memory does not.
        chunk_length: With `attend: window`, the number of keys of its own bucket that a position attends to in one
            round. With `attend: chunk`, the length of a chunk in sorted order. In positions.
        n_buckets: Buckets of a round: even, and a multiple of 4 above 128. null: 4 · `max_length / chunk_length` if
            values look ahead, else `max_length / chunk_length`, rounded down to a power of two; 64 if `max_length` is
            not set. It does not depend on the length of the current sequence: otherwise later tokens would change what
            earlier positions attend to.
        attend: `window`: a position attends to the last `chunk_length` positions of its own bucket, so the layer is
            strictly causal (in a bidirectional model: to as many on each side). `chunk`: the paper's rule, own and
            previous chunk in sorted order; with it, later tokens can change what earlier positions attend to.
        duplicates: `average`: a key that is found in several rounds counts once for each of them. `once`: it counts
            once.
        dropout: Dropout of attention weights in these layers, in [0, 1). null: the model's `attention_dropout`.
    """

    rounds: int = 4
    chunk_length: int = 64
    n_buckets: int | None = None
    attend: str = "window"
    duplicates: str = "average"
    dropout: float | None = None

    def validate(self) -> None:
        """Check these settings. Raises ConfigError."""
        check_at_least(1, "model.lsh.rounds", self.rounds)
        check_at_least(1, "model.lsh.chunk_length", self.chunk_length)
        if self.n_buckets is not None:
            check_buckets(self.n_buckets, "model.lsh.n_buckets")
        check_name("model.lsh.attend", self.attend, ATTENDS)
        check_name("model.lsh.duplicates", self.duplicates, DUPLICATES)
        check_rate("model.lsh.dropout", self.dropout)


@dataclass
class LocalConfig:
    """Attention among neighbours.

    Attributes:
        window: With `attend: window`, position i attends to i - window + 1 ... i (in a bidirectional model: as far
            on both sides). With `attend: chunk`, the length of a chunk. In positions.
        attend: `window`, or `chunk`: own and previous chunk of `window` positions, as in trax.
        dropout: Dropout of attention weights in these layers, in [0, 1). null: the model's `attention_dropout`.
    """

    window: int = 128
    attend: str = "window"
    dropout: float | None = None

    def validate(self) -> None:
        """Check these settings. Raises ConfigError."""
        check_at_least(1, "model.local.window", self.window)
        check_name("model.local.attend", self.attend, ATTENDS)
        check_rate("model.local.dropout", self.dropout)


@dataclass
class LinformerConfig:
    """Attention to learned mixtures of all positions (Wang et al. 2020). Not causal; every sequence has `max_length`.

    Attributes:
        size: Number of mixtures that a query attends to instead of positions.
        share: Which projections of the length are shared. `none`: every head has one for keys and one for values.
            `heads`: all heads share one for keys and one for values. `keyvalue`: one serves all.
    """

    size: int = 256
    share: str = "heads"

    def validate(self) -> None:
        """Check these settings. Raises ConfigError."""
        check_at_least(1, "model.linformer.size", self.size)
        check_name("model.linformer.share", self.share, SHARES)


@dataclass
class PerformerConfig:
    """Attention estimated with random features of queries and keys (Choromanski et al. 2021).

    Attributes:
        features: Random features of a head. The error falls with their square root; time grows with their number.
        redraw_every: Optimizer steps after which the features are drawn anew. 0: never.
    """

    features: int = 256
    redraw_every: int = 1000

    def validate(self) -> None:
        """Check these settings. Raises ConfigError."""
        check_at_least(1, "model.performer.features", self.features)
        check_at_least(0, "model.performer.redraw_every", self.redraw_every)


@dataclass
class FeedForwardConfig:
    """The feed-forward branch of a block.

    Attributes:
        mult: Width of the hidden layer, as a multiple of `dim`.
        activation: `gelu`, `relu` or `swiglu` (gated: a third matrix of the same size).
        chunk: Tokens (batch × length) whose hidden layer is in memory at once. 0: 1,024 on a CPU, 16,384 on a GPU.
    """

    mult: float = 4.0
    activation: str = "gelu"
    chunk: int = 0

    def validate(self) -> None:
        """Check these settings. Raises ConfigError."""
        check_name("model.feedforward.activation", self.activation, ACTIVATIONS)
        check_at_least(0, "model.feedforward.chunk", self.chunk)


def bucket_factors(n_buckets: int) -> list[int]:
    """[n_buckets], or if one rotation would be too wide, the two even factors that are closest to each other."""
    if n_buckets <= SINGLE_ROTATION:
        return [n_buckets]
    half = next(f for f in range(math.isqrt(n_buckets // 4), 0, -1) if n_buckets // 4 % f == 0)
    return [2 * half, n_buckets // (2 * half)]
