"""Generation: tokens that follow a prompt, drawn one by one from a state of bounded size (see `reading`).

    tokens = generate(model, prompt, length=100, temperature=0.8, top_k=50, seed=1)

`start`, `read`, `read_block` and what they return can be imported from here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megabase.models.chance import Purpose, Seeds, random_bits
from megabase.models.encoder_decoder import EncoderDecoder
from megabase.models.reading import (
    NearBorders,
    Reading,
    State,
    check_length,
    near_borders,
    read,
    read_block,
    start,
)
from megabase.models.reformer import Reformer

__all__ = [
    "NearBorders",
    "Reading",
    "Sampling",
    "State",
    "check_length",
    "generate",
    "near_borders",
    "read",
    "read_block",
    "start",
]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from this many of the likeliest tokens; None = all.
        allowed: the only token ids to draw; None = all.
        top_p: draw from the fewest of the likeliest tokens whose probabilities add up to this; None = all
            (nucleus sampling, Holtzman et al., arXiv 1904.09751). It acts on what temperature and top_k leave.
    """

    temperature: float = 1.0
    top_k: int | None = None
    allowed: Sequence[int] | None = None
    top_p: float | None = None

    def validate(self, vocab_size: int) -> None:
        """Raise ValueError if a setting cannot work with this many token ids."""
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        allowed = self.allowed
        if allowed is not None and not (allowed and all(0 <= token < vocab_size for token in allowed)):
            raise ValueError(
                f"allowed={list(allowed)} must name at least one token id, each from 0 to {vocab_size - 1}"
            )

    def draw(self, logits: Tensor, keys: Tensor, position: int, allowed: Tensor | None = None) -> Tensor:
        """Draw one token for each row, by inverting the distribution function.

        Args:
            logits: (batch, vocab).
            keys: (batch,) int64, the keys of the random numbers (see `Seeds.keys`).
            position: the position of the token to draw.
            allowed: (batch, vocab) bool, the tokens to draw in each row, at least one that `self.allowed` has too;
                None = all.

        Returns:
            (batch,) int64.
        """
        logits = logits.double()
        if self.allowed is not None:
            forbidden = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            forbidden[list(self.allowed)] = False
            logits = logits.masked_fill(forbidden, -torch.inf)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        if self.top_k is not None:
            best, ids = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, ids, best)
        # The largest becomes 0, so that it can be drawn even if a small temperature makes the other quotients overflow.
        logits = logits - logits.amax(dim=-1, keepdim=True)
        probabilities = (logits / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            probabilities = _nucleus(probabilities, self.top_p)
        cumulative = probabilities.cumsum(dim=-1)
        counter = torch.tensor(position, dtype=torch.int32, device=logits.device)
        uniform = (random_bits(keys, counter).double() + (2.0**31 + 0.5)) * 2.0**-32
        return (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)


def _nucleus(probabilities: Tensor, share: float) -> Tensor:
    """The probabilities (batch, n) of the likeliest tokens that add up to `share`, 0 for all others."""
    likeliest, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = likeliest.cumsum(dim=-1) - likeliest
    return torch.zeros_like(probabilities).scatter_(-1, ids, likeliest.where(before < share, 0.0))


def generate(
    model: Reformer | EncoderDecoder,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    allowed: Sequence[int] | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> Tensor:
    """Draw the tokens that follow a prompt.

    The token of row b at position p (prompt included) is a function of (seed, b, p) and of the logits alone. So a
    generation that is interrupted and continued from its tokens draws the same tokens.

    Args:
        model: the model, in any mode: dropout is never used.
        prompt: (batch, n) int64, n at least 1.
        length: how many tokens to draw.
        temperature, top_k, allowed, top_p: see Sampling.
        seed: the seed of hashing and drawing.
        stop: a token id. A sequence that has drawn it repeats it, and the result ends early once all sequences have.
        source: see `start`.
        source_mask: see `start`.

    Returns:
        (batch, length) int64, or fewer columns if all sequences have drawn `stop`.

    Raises:
        ConfigError: the model cannot generate.
        ValueError: an argument cannot work.
        RuntimeError: the model's logits are not finite.
    """
    if length < 0:
        raise ValueError(f"length={length} must be at least 0")
    sampling = Sampling(temperature, top_k, allowed, top_p)
    sampling.validate(vocab_size=model.head.weight.shape[0])
    state = start(model, prompt.shape[0], seeds=Seeds(run=seed), source=source, source_mask=source_mask)
    keys = Seeds(run=seed).keys(Purpose.SAMPLING, 0, state.batch, prompt.device)
    tokens = prompt.new_empty(state.batch, length)
    done = torch.zeros(state.batch, dtype=torch.bool, device=prompt.device)
    finite = torch.ones((), dtype=torch.bool, device=prompt.device)
    block = prompt
    for i in range(length):
        logits = read(model, block, state)
        finite &= logits.isfinite().all()
        token = sampling.draw(logits, keys, state.position)
        if stop is not None:
            token = token.masked_fill(done, stop)
            done |= token == stop
        tokens[:, i] = token
        block = token[:, None]
        if stop is not None and done.all():
            tokens = tokens[:, : i + 1]
            break
    if not finite:
        raise RuntimeError("the model's logits are not finite: take a checkpoint from before it diverged")
    return tokens
