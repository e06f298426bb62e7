"""The Reformer: embeddings, reversible stack, norm, head. One screen.

What is special: both residual streams start as the embedding and are int32 (models/reversible.py); positions
within attention see neighbours or hash buckets (models/attention/); hidden layers and logits exist in chunks
(models/feedforward.py, models/loss.py); all chance comes in with the call (models/chance.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention import build_attention
from megabase.models.attention.cross import CrossAttentionBranch
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, dropout
from megabase.models.config import ReformerConfig
from megabase.models.feedforward import FeedForwardBranch
from megabase.models.layers import Linear, Norm
from megabase.models.loss import linear_cross_entropy
from megabase.models.positions import build_positions
from megabase.models.reversible import Block, ReversibleStack


class Reformer(nn.Module):
    """A language model: next token (config.causal) or masked token (else). Raises ConfigError.

    Weights are drawn from torch's default generator. `tokens` are (batch, length) int64 in [0, vocab_size).
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.body = Body(config)
        self.head = LanguageHead(config, self.body.embedding.tokens)

    def forward(self, tokens: Tensor, *, seeds: Seeds | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocab). mask: (batch, length) bool, True where a token is real; None = all."""
        return self.head(self.body(tokens, seeds=seeds, mask=mask))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        seeds: Seeds | None = None,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Sum over labels of weights · nats: an fp32 scalar. Logits never exist whole.

        labels: (batch, length) int64: labels[:, i] is what position i must predict (the shift is the caller's);
        -100 has no loss. weights: (batch, length) float, None = 1.
        """
        return self.head(self.body(tokens, seeds=seeds, mask=mask), labels, weights)


class ReformerClassifier(nn.Module):
    """A class for each sequence, from the stack's output: by its mean over real tokens or by its first token
    (config.classifier). Raises ConfigError."""

    def __init__(self, config: ReformerConfig, classes: int) -> None:
        super().__init__()
        self.body = Body(config)
        first = config.classifier == "first"
        self.head = FirstTokenHead(config, classes) if first else Linear(2 * config.dim, classes, bias=True)

    def forward(self, tokens: Tensor, *, seeds: Seeds | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, classes)."""
        hidden = self.body(tokens, seeds=seeds, mask=mask)
        if isinstance(self.head, FirstTokenHead):
            return self.head(hidden[:, 0], Seeds() if seeds is None else seeds)
        if mask is None:
            return self.head(hidden.mean(dim=1))
        real = mask[..., None].to(hidden.dtype)
        return self.head((hidden * real).sum(dim=1) / real.sum(dim=1).clamp_min(1.0))


class Body(nn.Module):
    """Embedding, reversible stack, norm: tokens (batch, length) -> hidden states (batch, length, 2·dim).

    context_width: channels of the context that every block's cross-attention reads; None: there is none.
    """

    def __init__(self, config: ReformerConfig, context_width: int | None = None) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.embedding = Embedding(config)
        self.stack = ReversibleStack(
            (build_block(config, i, context_width) for i in range(config.depth)), config.residual
        )
        self.norm = Norm(2 * config.dim, config.norm, config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        *,
        seeds: Seeds | None = None,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        reverse: bool = True,
    ) -> Tensor:
        """context: (batch, source length, context_width), context_mask: (batch, source length) bool, like mask.

        reverse=False keeps every activation (models/reversible.py): the same numbers, more memory.
        Raises ConfigError if the sequences do not fit the config, ValueError if the mask does not fit the tokens.
        """
        call = Call(Seeds() if seeds is None else seeds, self.training, mask, context, context_mask)
        return self.run(tokens, call, reverse=reverse)

    def run(self, tokens: Tensor, call: Call, *, reverse: bool = True) -> Tensor:
        """The same, for a given call."""
        self.config.validate(tokens.shape[1])
        if call.mask is not None and (call.mask.shape != tokens.shape or call.mask.dtype != torch.bool):
            raise ValueError(
                f"mask is {call.mask.dtype} of shape {tuple(call.mask.shape)}: it must be bool, of the tokens' "
                f"shape {tuple(tokens.shape)}"
            )
        return self.norm(self.stack(self.embedding(tokens, call), call, reverse=reverse))


def build_block(config: ReformerConfig, layer: int, context_width: int | None) -> Block:
    """Block number `layer`, of a decoder if there is a context."""
    cross = None if context_width is None else CrossAttentionBranch(config, layer, context_width)
    return Block(build_attention(config, layer), FeedForwardBranch(config, layer), cross)


class Embedding(nn.Module):
    """Token vectors plus positions: (batch, length) -> (batch, length, dim)."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.rate = config.dropout
        self.tokens = TokenEmbedding(config.vocab_size, config.dim, tied=config.tie_embeddings)
        self.positions = build_positions(config)

    def forward(self, tokens: Tensor, call: Call, start: int = 0) -> Tensor:
        """start: the position of the first token."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(tokens.shape[1], start)
        if not (call.training and self.rate):
            return x
        return dropout(x, self.rate, call.seeds.keys(Purpose.EMBEDDING, 0, x.shape[0], x.device))


class TokenEmbedding(nn.Embedding):
    """Vectors of unit variance; smaller where they are the output head too, so that logits start moderate."""

    def __init__(self, vocab_size: int, dim: int, *, tied: bool) -> None:
        super().__init__(vocab_size, dim)
        nn.init.normal_(self.weight, std=(2 * dim) ** -0.5 if tied else 1.0)


class LanguageHead(nn.Module):
    """Logits of the vocabulary, or straight their loss. Tied, both streams meet the embedding's weights."""

    def __init__(self, config: ReformerConfig, tokens: TokenEmbedding) -> None:
        super().__init__()
        self.tied = config.tie_embeddings
        self.chunk = config.loss_chunk
        if self.tied:
            self.weight = tokens.weight
        else:
            self.weight = nn.Parameter(torch.randn(tokens.num_embeddings, 2 * config.dim) * 0.02)
        self.bias = nn.Parameter(torch.zeros(tokens.num_embeddings)) if config.head_bias else None

    def forward(self, hidden: Tensor, labels: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if self.tied:
            hidden = hidden.unflatten(-1, (2, -1)).sum(dim=-2)
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return linear_cross_entropy(
            hidden, self.weight, labels, bias=self.bias, weights=weights, chunk=self.chunk
        )


class FirstTokenHead(nn.Module):
    """Classes from the first token, which must be real: dropout, dense, tanh, dropout, linear.
    hidden (batch, 2·dim) -> logits (batch, classes)."""

    def __init__(self, config: ReformerConfig, classes: int) -> None:
        super().__init__()
        self.rate = config.dropout
        self.dense = Linear(2 * config.dim, config.dim, bias=True)
        self.output = Linear(config.dim, classes, bias=True)

    def forward(self, hidden: Tensor, seeds: Seeds) -> Tensor:
        return self.output(self._dropped(self.dense(self._dropped(hidden, 0, seeds)).tanh(), 1, seeds))

    def _dropped(self, x: Tensor, place: int, seeds: Seeds) -> Tensor:
        if not (self.training and self.rate):
            return x
        return dropout(x, self.rate, seeds.keys(Purpose.CLASSIFIER, place, x.shape[0], x.device))
