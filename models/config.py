"""The settings of a Reformer: plain dataclasses, so that OmegaConf (or anything else) can fill them in.

`ReformerConfig.validate` is the one gate: it says what is wrong, with which value, and the way out, before
anything expensive is built.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

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

SINGLE_ROTATION = 128
"""Up to so many buckets one rotation makes a hash; beyond, two rotations make a factor each (paper, section 2)."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: what, where, which value, and the way out."""


@dataclass
class LSHConfig:
    """Attention among positions whose shared query-keys hash to the same bucket (Kitaev et al. 2020, section
    2).

    Attributes:
        rounds: Independent rounds of hashing. Time grows with their number, memory does not.
        chunk_length: With `attend: window`, the number of keys of its own bucket that a position attends to in one
            round. With `attend: chunk`, the length of a chunk in sorted order. In positions.
        n_buckets: Buckets of a round: even, and a multiple of 4 above 128. null: `max_length / chunk_length`
            rounded down to a power of two, or 64 if `max_length` is not set. It never depends on the length of the
            current sequence, because then later tokens would change what earlier positions attend to.
        attend: `window`: a position attends to the last `chunk_length` positions of its own bucket, which is
            strictly causal (not causal: as many on both sides). `chunk`: the paper's rule, own and previous chunk
            in sorted order; there, later tokens can change what earlier positions attend to.
        duplicates: A key met in several rounds counts as often as it was met (`average`) or `once`.
        dropout: Dropout of attention weights in these layers, in [0, 1). null: the model's `attention_dropout`.
    """

    rounds: int = 4
    chunk_length: int = 64
    n_buckets: int | None = None
    attend: str = "window"
    duplicates: str = "average"
    dropout: float | None = None


@dataclass
class LocalConfig:
    """Attention among neighbours.

    Attributes:
        window: With `attend: window`, position i attends to i - window + 1 ... i (not causal: as far on both
            sides). With `attend: chunk`, the length of a chunk. In positions.
        attend: `window`, or `chunk`: own and previous chunk of `window` positions, as in trax.
        dropout: Dropout of attention weights in these layers, in [0, 1). null: the model's `attention_dropout`.
    """

    window: int = 128
    attend: str = "window"
    dropout: float | None = None


@dataclass
class LinformerConfig:
    """Attention to learned mixtures of all positions (Wang et al. 2020). Not causal, and only for sequences of
    exactly `max_length` tokens.

    Attributes:
        size: Number of mixtures that a query attends to instead of positions.
        share: Which projections of the length are shared. `none`: one for the keys and one for the values of every
            head. `heads`: one for all keys, one for all values. `keyvalue`: one for everything.
    """

    size: int = 256
    share: str = "heads"


@dataclass
class PerformerConfig:
    """Attention estimated with random features of queries and keys (Choromanski et al. 2021).

    Attributes:
        features: Random features of a head. The error falls with their square root; time grows with their number.
        redraw_every: Optimizer steps after which the features are drawn anew. 0: never.
    """

    features: int = 256
    redraw_every: int = 1000


@dataclass
class FeedForwardConfig:
    """The feed-forward branch of a block.

    Attributes:
        mult: Width of the hidden layer, as a multiple of `dim`.
        activation: `gelu`, `relu` or `swiglu` (gated: a third matrix of the same size).
        chunk: Tokens of a micro batch (batch × length) whose hidden layer is in memory at once. 0: 1,024 on a CPU,
            16,384 on a GPU.
    """

    mult: float = 4.0
    activation: str = "gelu"
    chunk: int = 0


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
        axial_shape: Rows and columns of axial positions; their product is at least `max_length`. Empty: nearly
            square.
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
        """Buckets of one hash round."""
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
        """Dropout of attention weights in layers of this kind."""
        own = {"lsh": self.lsh.dropout, "local": self.local.dropout}.get(kind)
        return self.attention_dropout if own is None else own

    def validate(self, length: int | None = None) -> None:
        """Check every setting and, if given, that sequences of `length` tokens fit. Raises ConfigError."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is not set: give the number of token ids, e.g. 9 for DNA")
        for name in ("vocab_size", "dim", "depth", "heads", "loss_chunk"):
            _at_least(1, f"model.{name}", getattr(self, name))
        _at_least(0, "model.conv", self.conv)
        self._validate_names()
        self._validate_widths()
        _rate("model.dropout", self.dropout)
        _rate("model.attention_dropout", self.attention_dropout)
        _rate("model.lsh.dropout", self.attention_rate("lsh"))
        _rate("model.local.dropout", self.attention_rate("local"))
        if not self.norm_eps > 0.0:
            raise ConfigError(f"model.norm_eps={self.norm_eps} must be above 0: take 1e-6")
        _at_least(1, "model.lsh.rounds", self.lsh.rounds)
        _at_least(1, "model.lsh.chunk_length", self.lsh.chunk_length)
        check_buckets(self.buckets, "model.lsh.n_buckets")
        _at_least(1, "model.local.window", self.local.window)
        _at_least(1, "model.linformer.size", self.linformer.size)
        _at_least(1, "model.performer.features", self.performer.features)
        _at_least(0, "model.performer.redraw_every", self.performer.redraw_every)
        self._validate_kinds()
        self._validate_length(length)

    def _validate_names(self) -> None:
        if not self.layers:
            raise ConfigError(f"model.layers is empty: name at least one of {', '.join(LAYERS)}")
        for layer in self.layers:
            check_name("model.layers", layer, LAYERS)
        check_name("model.norm", self.norm, NORMS)
        check_name("model.residual", self.residual, RESIDUALS)
        check_name("model.positions", self.positions, POSITIONS)
        check_name("model.feedforward.activation", self.feedforward.activation, ACTIVATIONS)
        check_name("model.lsh.attend", self.lsh.attend, ATTENDS)
        check_name("model.lsh.duplicates", self.lsh.duplicates, DUPLICATES)
        check_name("model.local.attend", self.local.attend, ATTENDS)
        check_name("model.linformer.share", self.linformer.share, SHARES)
        check_name("model.classifier", self.classifier, CLASSIFIERS)

    def _validate_widths(self) -> None:
        if self.head_dim is None and self.dim % self.heads:
            raise ConfigError(
                f"model.dim={self.dim} is not a multiple of model.heads={self.heads}: "
                f"take dim={round_up(self.dim, self.heads)} or set model.head_dim"
            )
        _at_least(1, "model.head_dim", self.width)
        if self.positions == "rotary" and self.width % 2:
            raise ConfigError(
                f"model.positions=rotary turns pairs of channels, but heads are {self.width} wide: "
                "take an even model.head_dim, or other positions"
            )
        turned = {"local", "full", "performer"} & set(self.layers)
        if self.positions == "rotary" and self.conv == 0 and not turned:
            raise ConfigError(
                f"model.positions=rotary does nothing in layers {self.layers} without model.conv: "
                "take axial or learned positions, or conv=4, or say positions=none"
            )
        if self.positions == "axial" and self.dim < 2:
            raise ConfigError("model.positions=axial needs model.dim of at least 2")
        if self.hidden < 1:
            raise ConfigError(
                f"model.feedforward.mult={self.feedforward.mult} leaves no hidden layer: take 4"
            )
        _at_least(0, "model.feedforward.chunk", self.feedforward.chunk)

    def _validate_kinds(self) -> None:
        if "linformer" in self.layers and self.causal:
            raise ConfigError(
                "model.layers names linformer, whose slots mix all positions, but model.causal=True: "
                "set model.causal=False, or take performer, lsh or local layers"
            )
        if "linformer" in self.layers and self.max_length is None:
            raise ConfigError(
                "model.layers names linformer, which is made for one length, but model.max_length is not set: "
                "set it to the length of every sequence, or take performer, lsh or local layers"
            )
        if "performer" in self.layers and self.attention_rate("performer"):
            raise ConfigError(
                f"model.attention_dropout={self.attention_dropout} cannot drop weights in performer layers, "
                "where they never exist: set it to 0, and model.local.dropout or model.lsh.dropout instead"
            )

    def _validate_length(self, length: int | None) -> None:
        if length is not None:
            _at_least(1, "the length of a sequence", length)
        if self.max_length is not None:
            _at_least(1, "model.max_length", self.max_length)
        if self.positions in ("axial", "learned"):
            if self.max_length is None:
                raise ConfigError(
                    f"model.positions={self.positions} needs model.max_length: set it to the longest sequence, "
                    "or take model.positions=rotary"
                )
            if length is not None and length > self.max_length:
                raise ConfigError(
                    f"sequences of {length} tokens do not fit model.max_length={self.max_length} "
                    f"with model.positions={self.positions}: raise max_length, or take rotary"
                )
        if "linformer" in self.layers and length is not None and length != self.max_length:
            raise ConfigError(
                f"sequences of {length} tokens do not fit linformer layers made for model.max_length="
                f"{self.max_length}: they must have that length, so change it, or pad and mask"
            )
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


def check_name(key: str, value: str, valid: Iterable[str]) -> None:
    """Raise ConfigError if `value` is none of `valid`, naming the closest one."""
    valid = tuple(valid)
    if value in valid:
        return
    close = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"{key}={value!r} is unknown: {hint}valid: {', '.join(valid)}")


def check_buckets(n: int, key: str) -> None:
    """Raise ConfigError unless `n` buckets can be hashed into: even, and a multiple of 4 above SINGLE_ROTATION."""
    step = 2 if n <= SINGLE_ROTATION else 4
    if n < 2 or n % step:
        raise ConfigError(
            f"{key}={n} must be a positive multiple of {step}: take {max(step, round_up(max(n, 1), step))}"
        )


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def _rate(key: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{key}={value} must be at least 0 and below 1")


def _at_least(least: int, key: str, value: int) -> None:
    if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}")
