"""Sequence to sequence: a bidirectional reversible encoder, and a causal reversible decoder that reads its output.

Every block of the decoder has cross-attention between its attention and its feed-forward branch (as in trax). It reads
both streams of the encoder's output. Nothing else passes between the two stacks. So at any depth the activations take
the memory of one block of each stack and of the two stacks' outputs.
"""

from __future__ import annotations

from torch import Tensor, nn

from megabase.models.chance import Purpose, Seeds
from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.reformer import Body, LanguageHead


class EncoderDecoder(nn.Module):
    """Predicts the next token of a target from the target so far and a whole source.

    Weights are drawn from torch's default generator. In all methods `source` is (batch, source length) int64 in
    [0, encoder.vocab_size), and `tokens`, the target so far, (batch, length) int64 in [0, decoder.vocab_size).
    `source_mask` and `mask` are bool of these shapes, True where a token is real; None = all are. If no token of a
    source is real, the decoder runs as if cross-attention returned zeros.

    Args:
        encoder: settings of the encoder, with causal=False.
        decoder: settings of the decoder, with causal=True. The two may differ in everything.

    Raises:
        ConfigError: a setting cannot work.
    """

    def __init__(self, encoder: ReformerConfig, decoder: ReformerConfig) -> None:
        super().__init__()
        if encoder.causal:
            raise ConfigError(
                "the encoder has causal=True, so that a token would not see those after it: set it to False"
            )
        if not decoder.causal:
            raise ConfigError(
                "the decoder has causal=False, so that it would see the tokens that it predicts: set it to True"
            )
        self.encoder = Body(encoder)
        self.decoder = Body(decoder, context_width=2 * encoder.dim)
        self.head = LanguageHead(decoder, self.decoder.embedding.tokens)

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        seeds: Seeds | None = None,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, length, decoder.vocab_size)."""
        return self.head(self.decode(source, tokens, seeds=seeds, source_mask=source_mask, mask=mask))

    def loss(
        self,
        source: Tensor,
        tokens: Tensor,
        labels: Tensor,
        *,
        seeds: Seeds | None = None,
        weights: Tensor | None = None,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The sum over labels of weights · nats, as in Reformer.

        Args:
            source, tokens: see the class.
            labels: (batch, length) int64; labels[:, i] is what position i must predict (the caller shifts them). A
                label of −100 has no loss.
            seeds: the random numbers of dropout and hashing; None = Seeds().
            weights: (batch, length) float, None = 1.
            source_mask, mask: see the class.

        Returns:
            An fp32 scalar.
        """
        hidden = self.decode(source, tokens, seeds=seeds, source_mask=source_mask, mask=mask)
        return self.head(hidden, labels, weights)

    def encode(
        self, source: Tensor, *, seeds: Seeds | None = None, mask: Tensor | None = None, reverse: bool = True
    ) -> Tensor:
        """The encoder's output, which the decoder reads: (batch, source length, 2 · encoder.dim)."""
        return self.encoder(source, seeds=seeds, mask=mask, reverse=reverse)

    def decode(
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        seeds: Seeds | None = None,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        reverse: bool = True,
    ) -> Tensor:
        """The decoder's hidden states, (batch, length, 2 · decoder.dim). reverse: see ReversibleStack."""
        if source.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"source holds {source.shape[0]} sequences, tokens {tokens.shape[0]}: give one source for each target"
            )
        context = self.encode(source, seeds=seeds, mask=source_mask, reverse=reverse)
        return self.decoder(
            tokens,
            seeds=decoder_seeds(seeds),
            mask=mask,
            context=context,
            context_mask=source_mask,
            reverse=reverse,
        )


def decoder_seeds(seeds: Seeds | None) -> Seeds:
    """The decoder's seeds: its layers have the numbers of the encoder's, but other random numbers."""
    return (Seeds() if seeds is None else seeds).apart(Purpose.DECODER)
