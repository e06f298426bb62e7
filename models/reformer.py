"""The Reformer: embeddings, reversible stack, norm, head. One screen.

What is special: both residual streams start as the embedding and are int32 (models/reversible.py); positions
within attention see neighbours or hash buckets (models/attention/); hidden layers and logits exist in chunks
(models/feedforward.py, models/loss.py); all chance comes in with the call (models/chance.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import build_attention
from models.chance import Purpose, Seeds, dropout
from models.config import ReformerConfig
from models.feedforward import FeedForwardBranch
from models.layers import Linear, Norm
from models.loss import linear_cross_entropy
from models.positions import build_positions
from models.reversible import Block, Call, ReversibleStack


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
    """A class for each sequence: the stack's output, averaged over real tokens, through a linear layer."""

    def __init__(self, config: ReformerConfig, classes: int) -> None:
        super().__init__()
        self.body = Body(config)
        self.head = Linear(2 * config.dim, classes, bias=True)

    def forward(self, tokens: Tensor, *, seeds: Seeds | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, classes)."""
        hidden = self.body(tokens, seeds=seeds, mask=mask)
        if mask is None:
            return self.head(hidden.mean(dim=1))
        real = mask[..., None].to(hidden.dtype)
        return self.head((hidden * real).sum(dim=1) / real.sum(dim=1).clamp_min(1.0))


class Body(nn.Module):
    """Embedding, reversible stack, norm: tokens (batch, length) -> hidden states (batch, length, 2·dim)."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.embedding = Embedding(config)
        blocks = (
            Block(build_attention(config, i), FeedForwardBranch(config, i)) for i in range(config.depth)
        )
        self.stack = ReversibleStack(blocks, config.residual)
        self.norm = Norm(2 * config.dim, config.norm)

    def forward(
        self,
        tokens: Tensor,
        *,
        seeds: Seeds | None = None,
        mask: Tensor | None = None,
        reverse: bool = True,
    ) -> Tensor:
        """reverse=False keeps every activation (models/reversible.py): the same numbers, more memory.

        Raises ConfigError if the sequences do not fit the config, ValueError if the mask does not fit the tokens.
        """
        self.config.validate(tokens.shape[1])
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}: it must be bool, of the tokens' "
                f"shape {tuple(tokens.shape)}"
            )
        call = Call(Seeds() if seeds is None else seeds, self.training, mask)
        return self.norm(self.stack(self.embedding(tokens, call), call, reverse=reverse))


class Embedding(nn.Module):
    """Token vectors plus positions: (batch, length) -> (batch, length, dim)."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.rate = config.dropout
        self.tokens = TokenEmbedding(config.vocab_size, config.dim, tied=config.tie_embeddings)
        self.positions = build_positions(config)

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(tokens.shape[1])
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

    def forward(self, hidden: Tensor, labels: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if self.tied:
            hidden = hidden.unflatten(-1, (2, -1)).sum(dim=-2)
        if labels is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, labels, weights=weights, chunk=self.chunk)
