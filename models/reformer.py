"""The Reformer: embedding, reversible stack, norm, head.

    model = Reformer(ReformerConfig(vocab_size=9, max_length=1 << 16))
    logits = model(tokens)                            # (batch, length) int64 -> (batch, length, vocab)
    loss = model.loss(tokens, labels, seeds=Seeds(run=0, step=7))
    loss.backward()

What is special, and where to read on:
- Two residual streams, both equal to the embedding at the start, are int32. So the backward pass can rebuild all
  activations exactly, and memory does not grow with depth (reversible.py).
- A position attends to neighbours or to its hash buckets (attention/), never to the whole sequence.
- The hidden layers of the feed-forward and the logits exist for a chunk of tokens at a time (feedforward.py, loss.py).
- No module keeps a generator or any other state of a pass: all random numbers follow from `Seeds` (chance.py), and
  everything a pass depends on travels in one `Call` (call.py).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention import build_attention
from megabase.models.attention.cross import CrossAttentionBranch
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, dropout
from megabase.models.config import ReformerConfig
from megabase.models.feedforward import FeedForwardBranch
from megabase.models.loss import linear_cross_entropy, log_probabilities
from megabase.models.norm import Norm
from megabase.models.positions import build_positions
from megabase.models.reversible import Block, ReversibleStack
from megabase.models.sequence import Part

NEVER = -20.0
"""The bias at the start of tokens that are never labels: e^-20 of the probability of the others."""


class Reformer(nn.Module):
    """A language model. It predicts the next token (config.causal) or masked tokens (otherwise).

    Args:
        config: the settings. Weights are drawn from torch's default generator.
        first_label: token ids below this are never labels (in megabase's alphabets the five special tokens). With
            `head_bias`, their probability starts near zero. Otherwise the model would learn this first, by a vector
            that it adds to the streams of all positions; then all query-keys are alike, and hashing tells nothing
            apart.

    Raises:
        ConfigError: a setting cannot work.
    """

    def __init__(self, config: ReformerConfig, first_label: int = 0) -> None:
        super().__init__()
        self.body = Body(config)
        self.head = LanguageHead(config, self.body.embedding.tokens, first_label)

    def forward(
        self,
        tokens: Tensor,
        *,
        seeds: Seeds | None = None,
        mask: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Compute logits.

        Args:
            tokens: (batch, length) int64 in [0, vocab_size).
            seeds: the random numbers of dropout and hashing; None = Seeds().
            mask: (batch, length) bool, True where a token is real; None = all are.
            part: what part of every sequence the tokens are, if several processes share the sequences (sequence.py);
                None: the tokens are whole sequences.

        Returns:
            (batch, length, vocab_size).

        Raises:
            ConfigError: the sequences do not fit the config.
            ValueError: the mask does not fit the tokens.
        """
        return self.head(self.body(tokens, seeds=seeds, mask=mask, part=part))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        seeds: Seeds | None = None,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Compute the sum over labels of weights · nats, without all logits in memory.

        Args:
            tokens, seeds, mask, part: see `forward`. The sum is over the labels of the part.
            labels: (batch, length) int64; labels[:, i] is what position i must predict (the caller shifts them). A
                label of −100 has no loss.
            weights: (batch, length) float; None = 1.

        Returns:
            An fp32 scalar.
        """
        return self.head(self.body(tokens, seeds=seeds, mask=mask, part=part), labels, weights)


class Body(nn.Module):
    """Embedding, reversible stack, norm: tokens (batch, length) -> hidden states (batch, length, 2·dim).

    Args:
        config: the settings.
        context_width: channels of the context that cross-attention reads in every block; None = no cross-attention.
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
        part: Part | None = None,
        reverse: bool = True,
    ) -> Tensor:
        """Compute hidden states.

        Args:
            tokens, seeds, mask, part: see Reformer.
            context: (batch, source length, context_width), what cross-attention reads.
            context_mask: (batch, source length) bool, like `mask`.
            reverse: False keeps every activation: the same numbers, more memory (see ReversibleStack).

        Returns:
            (batch, length, 2·dim), both streams side by side.

        Raises:
            ConfigError: the sequences do not fit the config.
            ValueError: the mask does not fit the tokens.
        """
        call = Call(Seeds() if seeds is None else seeds, self.training, mask, context, context_mask, part)
        return self.run(tokens, call, reverse=reverse)

    def run(self, tokens: Tensor, call: Call, *, reverse: bool = True) -> Tensor:
        """Do the same as `forward`, with everything but the tokens in one Call."""
        part = call.part
        self.config.validate(tokens.shape[1] if part is None else part.length)
        if part is not None and tokens.shape[1] * part.size != part.length:
            raise ValueError(
                f"{tokens.shape[1]:,} tokens are not part {part.rank} of {part.size} of a sequence of {part.length:,}"
            )
        if call.mask is not None and (call.mask.shape != tokens.shape or call.mask.dtype != torch.bool):
            raise ValueError(
                f"mask is {call.mask.dtype} of shape {tuple(call.mask.shape)}: it must be bool, of the tokens' "
                f"shape {tuple(tokens.shape)}"
            )
        x = self.embedding(tokens, call, call.start)
        if not reverse:
            return self.norm(self.stack(x, call, reverse=False))
        link, source = self.stack.streams(x, call)
        return self.norm(link, source=source)

    @torch.no_grad()
    def outputs(self, tokens: Tensor, call: Call, layers: Collection[int]) -> dict[int, Tensor]:
        """Hidden states of some layers in one pass, of any kind of model (`read_block` gives those of causal ones).

        Args:
            tokens: (batch, length) int64.
            call: the arguments of the pass.
            layers: from 0 to depth − 1 both streams after this block; depth: after the last norm, as `forward` returns.

        Returns:
            (batch, length, 2·dim) fp32 by layer.

        Raises:
            ConfigError: the sequences do not fit the config.
        """
        self.config.validate(tokens.shape[1])
        branches = (partial(branch, call=call) for branch in self.stack.branches)
        streams, found = self.stack.run(self.embedding(tokens, call), branches, layers)
        if self.config.depth in layers:
            found[self.config.depth] = self.norm(streams)
        return found


def build_block(config: ReformerConfig, layer: int, context_width: int | None) -> Block:
    """Build block number `layer`: attention, cross-attention if there is a context, feed-forward."""
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
        """Embed the tokens. start: the position of the first one."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(tokens.shape[1], start)
        if not (call.training and self.rate):
            return x
        return dropout(x, self.rate, call.seeds.keys(Purpose.EMBEDDING, 0, x.shape[0], x.device), start)


class TokenEmbedding(nn.Embedding):
    """Vectors of unit variance. If the output head uses them too, they are smaller, so that logits start small."""

    def __init__(self, vocab_size: int, dim: int, *, tied: bool) -> None:
        super().__init__(vocab_size, dim)
        nn.init.normal_(self.weight, std=(2 * dim) ** -0.5 if tied else 1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors (..., dim) of tokens (...). Raises ValueError for a token outside the vocabulary, on CPUs."""
        try:
            return super().forward(tokens)
        except IndexError:  # a GPU reports it by itself, later; to check there would make the host wait
            raise ValueError(
                f"tokens from {tokens.min()} to {tokens.max()}: the model has the ids 0 to {self.num_embeddings - 1}"
                " (megabase.datamodules.alphabet.Alphabet.encode makes them)"
            ) from None


class LanguageHead(nn.Module):
    """Hidden states (batch, length, 2·dim) -> logits, or with labels -> the loss.

    A tied head multiplies the sum of both streams with the embedding's weights. first_label: see Reformer.
    """

    def __init__(self, config: ReformerConfig, tokens: TokenEmbedding, first_label: int = 0) -> None:
        super().__init__()
        self.tied = config.tie_embeddings
        self.chunk = config.loss_chunk
        if self.tied:
            self.weight = tokens.weight
        else:
            self.weight = nn.Parameter(torch.randn(tokens.num_embeddings, 2 * config.dim) * 0.02)
        self.bias: nn.Parameter | None = None
        if config.head_bias:
            bias = torch.zeros(tokens.num_embeddings)
            bias[:first_label] = NEVER
            self.bias = nn.Parameter(bias)

    def forward(self, hidden: Tensor, labels: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocab_size); with labels, their loss, an fp32 scalar (see Reformer.loss)."""
        hidden = self._summed(hidden)
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return linear_cross_entropy(
            hidden, self.weight, labels, bias=self.bias, weights=weights, chunk=self.chunk
        )

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of every token, (..., vocab_size) fp32, from hidden states (..., 2·dim)."""
        return log_probabilities(self._summed(hidden), self.weight, self.bias)

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one token for each hidden state, without all logits in memory.

        Args:
            hidden: (batch, n, 2·dim).
            tokens: (batch, n) int64.

        Returns:
            (batch, n) fp32 (fp64 for fp64).
        """
        flat, tokens = hidden.flatten(0, 1), tokens.flatten()
        found = [
            self.log_probs(part).gather(1, token[:, None])
            for part, token in zip(flat.split(self.chunk), tokens.split(self.chunk), strict=True)
        ]
        return torch.cat(found).view(hidden.shape[:2])

    def _summed(self, hidden: Tensor) -> Tensor:
        """What is multiplied with the weights: for tied weights the sum of both streams."""
        return hidden.unflatten(-1, (2, -1)).sum(dim=-2) if self.tied else hidden
