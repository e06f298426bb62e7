"""Text to text: a reversible encoder that sees both sides, a reversible causal decoder that reads it.

Every block of the decoder has cross-attention between its attention and its feed-forward branch (as in trax); it
reads the encoder's output, both streams of it. That output is all that goes from one to the other, so
activations take the memory of one block of each and of the two stacks' ends, whatever their depths.
"""

from __future__ import annotations

from torch import Tensor, nn

from megabase.models.chance import Purpose, Seeds
from megabase.models.config import ConfigError, ReformerConfig
from megabase.models.reformer import Body, LanguageHead


class EncoderDecoder(nn.Module):
    """Predicts the next token of a target from the target so far and a whole source.

    encoder, decoder: their settings. They need not agree in anything; `causal` is False for the encoder and True
    for the decoder. Raises ConfigError. Weights are drawn from torch's default generator.

    In all methods: source (batch, source length) int64 in [0, encoder.vocab_size), tokens (batch, length) int64
    in [0, decoder.vocab_size), the target as far as it is read; source_mask, mask: bool of their shapes, True
    where a token is real, None = all. Where nothing of a source is real, the decoder runs as if it read zeros.
    """

    def __init__(self, encoder: ReformerConfig, decoder: ReformerConfig) -> None:
        super().__init__()
        if encoder.causal:
            raise ConfigError(
                "the encoder has causal=True, so that no token would see what follows: set it to False"
            )
        if not decoder.causal:
            raise ConfigError(
                "the decoder has causal=False, so that it would see what it predicts: set it to True"
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
        """Sum over labels of weights · nats: an fp32 scalar, like that of models.Reformer.

        labels: (batch, length) int64: labels[:, i] is what position i must predict (the shift is the caller's);
        -100 has no loss. weights: (batch, length) float, None = 1.
        """
        hidden = self.decode(source, tokens, seeds=seeds, source_mask=source_mask, mask=mask)
        return self.head(hidden, labels, weights)

    def encode(
        self, source: Tensor, *, seeds: Seeds | None = None, mask: Tensor | None = None, reverse: bool = True
    ) -> Tensor:
        """What the decoder reads: (batch, source length, 2 · encoder.dim)."""
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
        """The decoder's hidden states (batch, length, 2 · decoder.dim). reverse: see megabase.models.reformer.Body."""
        if source.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"source holds {source.shape[0]} sequences, tokens {tokens.shape[0]}: one source for each target"
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
    """Those of the decoder, whose layers are numbered like the encoder's."""
    return (Seeds() if seeds is None else seeds).apart(Purpose.DECODER)
