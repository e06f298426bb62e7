"""The settings of a Reformer: plain dataclasses that OmegaConf, or anything else, can fill in.

`ReformerConfig.validate` checks all settings before anything expensive is built. Its messages name the setting, the
value and what to do instead. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megabase.models.checks import (
    ConfigError,
    build,
    check_at_least,
    check_buckets,
    check_name,
    check_rate,
    round_up,
)

LAYERS = ("local", "lsh", "full", "linformer", "performer")
NORMS = ("layer", "rms")
RESIDUALS = ("fixed", "float")
POSITIONS = ("rotary", "axial", "learned", "none")
ACTIVATIONS = ("gelu", "relu", "swiglu")
ATTENDS = ("window", "chunk")
DUPLICATES = ("average", "once")
SHARES = ("none", "heads", "keyvalue")
CLASSIFIERS = ("mean", "first")

DEFAULT_BUCKETS = 64
"""Buckets of a hash round where neither `n_buckets` nor `max_length` is set."""


@dataclass
class LSHConfig:
    """Attention among positions whose query-keys hash to the same bucket (Kitaev et al. 2020, section 2).

    Attributes:
        rounds: Independent rounds of hashing. Time grows with their number, memory does not.
        chunk_length: With `attend: window`, the number of keys of its own bucket that a position attends to in one
            round. With `attend: chunk`, the length of a chunk in sorted order. In positions.
        n_buckets: Buckets of a round: even, and a multiple of 4 above 128. null: `max_length / chunk_length`
            rounded down to a power of two, or 64 if `max_length` is not set. It does not depend on the length of the
            current sequence: otherwise later tokens would change what earlier positions attend to.
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


@dataclass
class ReformerConfig:
    """The architecture of a Reformer.

    Attributes:
        vocab_size: Number of token ids. null: not known yet; training takes it from the alphabet of the shards.
        dim: Width of each of the two residual streams.
        depth: Number of blocks. A block is one attention branch and one feed-forward branch.
        heads: Attention heads.
        head_dim: Width of a head. null: dim / heads.
        layers: Kinds of attention (`local`, `lsh`, `full`, `linformer`, `performer`), repeated to `depth`.
        causal: true: predict the next token. false: attend to both sides.
        max_length: The longest sequence that `axial` and `learned` positions hold, and the only length of linformer
            layers. The number of hash buckets follows from it. null: no limit. In tokens.
        positions: `rotary` (in local, full and performer layers; LSH layers compare content alone), `axial`,
            `learned` or `none`.
        axial_shape: Rows and columns of axial positions; their product is at least `max_length`. Empty: nearly square.
        axial_dims: Widths of the vectors of a row and of a column; their sum is `dim`. Empty: half each.
        norm: `layer` or `rms`; before every branch and after the last block.
        norm_eps: Added to the variance in a norm.
        residual: `fixed`: int32 streams in units of 2^-16, which the backward pass inverts exactly. `float`:
            floating-point streams, for comparison; the inverse drifts.
        dropout: Dropout of the embedding and of every branch's output, in [0, 1).
        attention_dropout: Dropout of attention weights, in [0, 1).
        conv: Width in tokens of a depthwise convolution before query and key, causal if the model is. 0: none.
            Equal letters of a small alphabet hash alike; the convolution adds their neighbourhood.
        tie_embeddings: The output head uses the embedding's weights.
        head_bias: The output head adds a bias to the logits.
        classifier: Head of a ReformerClassifier. `mean`: a linear map of the mean over real tokens. `first`: dense
            layer, tanh and linear map of the first token, as in BERT and in the Reformer of transformers.
        loss_chunk: Tokens whose logits are in memory at once in the loss.
        lsh: Settings of `lsh` layers.
        local: Settings of `local` layers.
        linformer: Settings of `linformer` layers.
        performer: Settings of `performer` layers.
        feedforward: Settings of the feed-forward branches.
    """

    vocab_size: int | None = None
    dim: int = 256
    depth: int = 6
    heads: int = 4
    head_dim: int | None = None
    layers: list[str] = field(default_factory=lambda: ["local", "lsh"])
    causal: bool = True
    max_length: int | None = None
    positions: str = "rotary"
    axial_shape: list[int] = field(default_factory=list)
    axial_dims: list[int] = field(default_factory=list)
    norm: str = "layer"
    norm_eps: float = 1e-6
    residual: str = "fixed"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    conv: int = 4
    tie_embeddings: bool = False
    head_bias: bool = False
    classifier: str = "mean"
    loss_chunk: int = 4096
    lsh: LSHConfig = field(default_factory=LSHConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    linformer: LinformerConfig = field(default_factory=LinformerConfig)
    performer: PerformerConfig = field(default_factory=PerformerConfig)
    feedforward: FeedForwardConfig = field(default_factory=FeedForwardConfig)

    @property
    def width(self) -> int:
        """Width of one head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def hidden(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return round(self.feedforward.mult * self.dim)

    @property
    def buckets(self) -> int:
        """Buckets of one hash round of the lsh layers."""
        if self.lsh.n_buckets is not None:
            return self.lsh.n_buckets
        if self.max_length is None:
            return DEFAULT_BUCKETS
        return max(2, 1 << (max(1, self.max_length // self.lsh.chunk_length).bit_length() - 1))

    @property
    def pattern(self) -> list[str]:
        """The kind of attention of each of the `depth` blocks."""
        return [self.layers[i % len(self.layers)] for i in range(self.depth)]

    @property
    def axial(self) -> tuple[int, int]:
        """Rows and columns of the axial position table."""
        if self.axial_shape:
            return self.axial_shape[0], self.axial_shape[1]
        assert self.max_length is not None
        rows = 1 << ((self.max_length - 1).bit_length() + 1) // 2
        return rows, -(-self.max_length // rows)

    @property
    def axial_widths(self) -> tuple[int, int]:
        """Widths of the vectors of a row and of a column of axial positions."""
        if self.axial_dims:
            return self.axial_dims[0], self.axial_dims[1]
        return self.dim // 2, self.dim - self.dim // 2

    def attention_rate(self, kind: str) -> float:
        """The dropout rate of attention weights in layers of this kind (one of LAYERS)."""
        own = {"lsh": self.lsh.dropout, "local": self.local.dropout}.get(kind)
        return self.attention_dropout if own is None else own

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReformerConfig:
        """Build a config from settings by name and validate it. A setting that is missing has its default.

        Args:
            values: nested, as `dataclasses.asdict` returns them (`{"lsh": {"rounds": 4}}`), or flat with dotted keys
                (`{"lsh.rounds": 4}`).

        Raises:
            ConfigError: a setting is unknown (a newer version may have written it), or its value cannot work.
        """
        config: ReformerConfig = build(cls(), values, "model")
        try:
            config.validate()
        except TypeError as error:
            raise ConfigError(f"a setting of the model has a value of the wrong type: {error}") from None
        return config

    def validate(self, length: int | None = None) -> None:
        """Check every setting.

        Args:
            length: tokens; if given, check also that sequences of this length fit.

        Raises:
            ConfigError: a setting cannot work, or the sequences do not fit.
        """
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is not set: give the number of token ids, e.g. 9 for DNA")
        for name in ("vocab_size", "dim", "depth", "heads", "loss_chunk"):
            check_at_least(1, f"model.{name}", getattr(self, name))
        check_at_least(0, "model.conv", self.conv)
        check_rate("model.dropout", self.dropout)
        check_rate("model.attention_dropout", self.attention_dropout)
        if not self.norm_eps > 0.0:
            raise ConfigError(f"model.norm_eps={self.norm_eps} must be above 0: take 1e-6")
        for part in (self.lsh, self.local, self.linformer, self.performer, self.feedforward):
            part.validate()
        self._check_names()
        self._check_widths()
        self._check_layers()
        self._check_positions()
        if length is not None:
            self._check_length(length)

    def _check_names(self) -> None:
        if not self.layers:
            raise ConfigError(f"model.layers is empty: name at least one of {', '.join(LAYERS)}")
        for layer in self.layers:
            check_name("model.layers", layer, LAYERS)
        check_name("model.norm", self.norm, NORMS)
        check_name("model.residual", self.residual, RESIDUALS)
        check_name("model.positions", self.positions, POSITIONS)
        check_name("model.classifier", self.classifier, CLASSIFIERS)

    def _check_widths(self) -> None:
        if self.head_dim is None and self.dim % self.heads:
            raise ConfigError(
                f"model.dim={self.dim} is not a multiple of model.heads={self.heads}: "
                f"take dim={round_up(self.dim, self.heads)} or set model.head_dim"
            )
        check_at_least(1, "model.head_dim", self.width)
        if self.hidden < 1:
            raise ConfigError(
                f"model.feedforward.mult={self.feedforward.mult} leaves no hidden layer: take 4"
            )

    def _check_layers(self) -> None:
        if "linformer" in self.layers and self.causal:
            raise ConfigError(
                "model.layers names linformer, whose slots mix all positions, but model.causal=True: "
                "set model.causal=False, or take performer, lsh or local layers"
            )
        if "linformer" in self.layers and self.max_length is None:
            raise ConfigError(
                "model.layers names linformer, which takes sequences of one length only, but model.max_length is not "
                "set: set it to the length of every sequence, or take performer, lsh or local layers"
            )
        if "performer" in self.layers and self.attention_rate("performer"):
            raise ConfigError(
                f"model.attention_dropout={self.attention_dropout} cannot drop weights in performer layers, "
                "which never compute them: set it to 0, and model.local.dropout or model.lsh.dropout instead"
            )

    def _check_positions(self) -> None:
        if self.max_length is not None:
            check_at_least(1, "model.max_length", self.max_length)
        elif self.positions in ("axial", "learned"):
            raise ConfigError(
                f"model.positions={self.positions} needs model.max_length: set it to the longest sequence, "
                "or take model.positions=rotary"
            )
        if self.positions == "rotary":
            self._check_rotary()
        if self.positions == "axial" and self.dim < 2:
            raise ConfigError("model.positions=axial needs model.dim of at least 2")
        if self.axial_shape:
            if len(self.axial_shape) != 2 or min(self.axial_shape) < 1:
                raise ConfigError(f"model.axial_shape={self.axial_shape} must be two positive numbers")
            rows, columns = self.axial_shape
            if self.max_length is not None and rows * columns < self.max_length:
                raise ConfigError(
                    f"model.axial_shape={self.axial_shape} holds {rows * columns} positions, fewer than "
                    f"model.max_length={self.max_length}: enlarge it, or leave it empty"
                )
        if self.axial_dims and (
            len(self.axial_dims) != 2 or min(self.axial_dims) < 1 or sum(self.axial_dims) != self.dim
        ):
            raise ConfigError(
                f"model.axial_dims={self.axial_dims} must be two positive numbers whose sum is "
                f"model.dim={self.dim}: change them, or leave it empty"
            )

    def _check_rotary(self) -> None:
        if self.width % 2:
            raise ConfigError(
                f"model.positions=rotary rotates pairs of channels, but heads are {self.width} wide: "
                "take an even model.head_dim, or other positions"
            )
        if self.conv == 0 and not {"local", "full", "performer"} & set(self.layers):
            raise ConfigError(
                f"model.positions=rotary does nothing in layers {self.layers} without model.conv: "
                "set model.positions to axial, learned or none, or set model.conv=4"
            )

    def _check_length(self, length: int) -> None:
        check_at_least(1, "the length of a sequence", length)
        table = self.positions in ("axial", "learned")
        if table and self.max_length is not None and length > self.max_length:
            raise ConfigError(
                f"sequences of {length} tokens do not fit model.max_length={self.max_length} "
                f"with model.positions={self.positions}: raise max_length, or take rotary"
            )
        if "linformer" in self.layers and length != self.max_length:
            raise ConfigError(
                f"sequences of {length} tokens do not fit linformer layers made for model.max_length="
                f"{self.max_length}: change max_length, or pad the sequences to that length and mask the padding"
            )
