"""The settings of a Reformer: plain dataclasses that OmegaConf, or anything else, can fill in.

`ReformerConfig.validate` checks all settings before anything expensive is built. Its messages name the setting, the
value and what to do instead. This module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megabase.models.checks import ConfigError, build, check_at_least, check_name, check_rate, round_up
from megabase.models.layer_config import (
    FeedForwardConfig,
    LinformerConfig,
    LocalConfig,
    LSHConfig,
    PerformerConfig,
)

LAYERS = ("local", "lsh", "full", "linformer", "performer")
NORMS = ("layer", "rms")
RESIDUALS = ("fixed", "float")
POSITIONS = ("rotary", "axial", "learned", "none")
CLASSIFIERS = ("mean", "first")

DEFAULT_LENGTH = 4096
"""Keys that a position of a full or performer layer is expected to meet where `max_length` is not set."""

MARGIN = 3.0
"""How far, in nats, an equal stretch is to outweigh all other keys at the start: its weight is then 95 %."""

BEFORE_THE_SETTING = {"values_ahead": False}
"""What models had before a setting existed, by its key: for settings that an earlier version saved."""

BUCKETS_PER_CHUNK = 4
"""Buckets for every `chunk_length` positions of `max_length`, where values look ahead. The k-mers of a genome are not
spread evenly: with fewer buckets, a crowded one's last `chunk_length` positions end before the match (docs/model.md).
More buckets cost no time."""

DEFAULT_BUCKETS = 64
"""Buckets of a hash round where neither `n_buckets` nor `max_length` is set."""


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
            Its taps start random, so that it is a code of the last `conv` tokens: equal letters of a small alphabet
            hash alike, equal stretches of `conv` letters hash alike and differ from others (docs/model.md).
        query_gain: Standard deviation of the queries' entries at the start (of query-keys in lsh layers). null: it
            follows from the number of keys that a position attends to and the width of a head, so that equal stretches
            outweigh all other keys from the first step on (`gain`).
        values_ahead: A position's value is a learned mix of its own and the next position's, and a position attends
            to earlier positions only: what it finds is what came next. null: true in causal layers, unless they have
            `attend: chunk`. true is refused where it would show a position its own next token.
        tie_embeddings: The output head uses the embedding's weights.
        head_bias: The output head adds a bias to the logits. With it, tokens that are never labels start with
            probability zero.
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
    conv: int = 12
    query_gain: float | None = None
    values_ahead: bool | None = None
    tie_embeddings: bool = False
    head_bias: bool = True
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
        chunks = max(1, self.max_length // self.lsh.chunk_length)
        wanted = chunks * (BUCKETS_PER_CHUNK if self.looks_ahead("lsh") else 1)
        return max(2, 1 << (wanted.bit_length() - 1))

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

    def gain(self, kind: str) -> float:
        """Standard deviation g of the queries' entries at the start, in layers of this kind (one of LAYERS).

        An equal stretch should outweigh the n other keys that a position meets, or no gradient says that it was the
        right one. Its key is the query's own direction: a score of |q| = g √d. The scores of the others are about
        N(0, g²), so log Σ exp of them is ln n + g² / 2. Their difference is MARGIN for g = √d − √(d − 2 (ln n +
        MARGIN)); heads too narrow for that margin have the largest difference for g = √d.
        """
        if self.query_gain is not None:
            return self.query_gain
        d, needed = self.width, math.log(self.keys_met(kind)) + MARGIN
        return float(d**0.5 - max(0.0, d - 2.0 * needed) ** 0.5)

    def keys_met(self, kind: str) -> int:
        """How many keys a position attends to, at most, in layers of this kind (one of LAYERS)."""
        most = self.max_length or DEFAULT_LENGTH
        met = {
            "lsh": self.lsh.rounds * self.lsh.chunk_length,
            "local": self.local.window,
            "linformer": self.linformer.size,
        }.get(kind, most)
        return max(1, min(met, most))

    def looks_ahead(self, kind: str) -> bool:
        """Whether the values of layers of this kind (one of LAYERS) look ahead."""
        return self.values_ahead is not False and self._can_look_ahead(kind)

    def _can_look_ahead(self, kind: str) -> bool:
        """Whether a position of such a layer can attend to earlier positions alone."""
        attend = {"lsh": self.lsh.attend, "local": self.local.attend}.get(kind, "window")
        return self.causal and attend == "window"

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
        if self.query_gain is not None and not self.query_gain > 0.0:
            raise ConfigError(f"model.query_gain={self.query_gain} must be above 0: take null, or 1")
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
        for kind in self.layers:
            if self.values_ahead and not self._can_look_ahead(kind):
                why = f"model.{kind}.attend=chunk" if self.causal else "model.causal=False"
                raise ConfigError(
                    f"model.values_ahead=True is not for {kind} layers with {why}: positions attend to later ones "
                    "there; set model.values_ahead to null or False"
                )
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
