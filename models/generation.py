"""Generation token by token, from a state whose size and cost do not grow with the tokens read.

    state = start(model, batch=2)
    logits = read(model, prompt, state)     # (batch, n) tokens at once
    logits = read(model, token, state)      # then (batch, 1), any number of times
    tokens = generate(model, prompt, length=100, temperature=0.8, top_k=50, seed=1)

Reading with a state gives the logits of a pass over all tokens so far. This is possible because what a position
attends to depends on nothing later (with LSH layers: under the rule `window`). So only few entries can matter to a
later token, and every branch keeps them in a cache of its own: `new_cache` and `read` of `AttentionBranch`,
`CrossAttentionBranch` and `FeedForwardBranch`, and of the layers in megabase.models.attention. The reversible stack
itself needs no cache: the two streams of a token follow from its embedding and its branches.

Both ways do the same arithmetic in another order, so they differ by rounding: about 1e-6 in fp32. A query-key that
lies that close to the border of two buckets may fall to either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, random_bits
from megabase.models.encoder_decoder import EncoderDecoder, decoder_seeds
from megabase.models.reformer import Body, Reformer


class ReadingBranch(Protocol):
    """A branch that can read a sequence in blocks. AttentionLayer lists the properties of a cache."""

    def new_cache(self, batch: int, call: Call) -> Any:
        """The cache of `batch` sequences before their first token. Raises ConfigError if the branch has none."""
        ...

    def read(self, x: Tensor, cache: Any, position: int, call: Call) -> Tensor:
        """The branch's output (batch, n, dim) for a block of tokens that starts at `position`."""
        ...


@dataclass
class State:
    """Everything that is kept of the tokens read so far. `copy.deepcopy` makes a fork, an independent state.

    Attributes:
        batch: number of sequences.
        call: the seeds, and the source's mask.
        caches: one for each branch of the stack.
        position: how many tokens were read, the same for all sequences.
    """

    batch: int
    call: Call
    caches: list[Any]
    position: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are kept. They grow with the tokens read in models with full layers only."""
        return sum(x.numel() * x.element_size() for x in _tensors(self.caches))


def start(
    model: Reformer | EncoderDecoder,
    batch: int,
    *,
    seeds: Seeds | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> State:
    """Make the state before the first token.

    An LSH layer keeps 2 · batch · heads · rounds · buckets · chunk_length · head_dim numbers. On a CPU the memory of
    a bucket is taken when the bucket is first used.

    Args:
        model: the model, in any mode: dropout is never used.
        batch: number of sequences.
        seeds: the seeds of the hash rotations, for the whole generation. A pass over all tokens with the same seeds
            gives the same logits.
        source: (batch, source length) int64, what an EncoderDecoder reads; a Reformer takes none.
        source_mask: (batch, source length) bool, True where a source token is real; None = all.

    Raises:
        ConfigError: the model cannot generate.
        ValueError: an EncoderDecoder gets no source or one of another batch, or a Reformer gets a source.
    """
    seeds = Seeds() if seeds is None else seeds
    if isinstance(model, Reformer):
        if source is not None or source_mask is not None:
            raise ValueError("a Reformer reads no source: leave it out, or use an EncoderDecoder")
        return _start(model.body, batch, Call(seeds))
    if source is None or source.shape[0] != batch:
        got = "no source" if source is None else f"a source of shape {tuple(source.shape)}"
        raise ValueError(f"an EncoderDecoder got {got} for {batch} sequences: give one source for each")
    with torch.no_grad():
        # In fp32, as in the stack.
        context = model.encoder.run(source, Call(seeds, mask=source_mask)).float()
    return _start(model.decoder, batch, Call(decoder_seeds(seeds), context=context, context_mask=source_mask))


@torch.no_grad()
def read(model: Reformer | EncoderDecoder, tokens: Tensor, state: State) -> Tensor:
    """Read tokens and add them to the state.

    The first call runs its tokens in parallel, later ones run them one by one.

    Args:
        model: the model that the state was made for.
        tokens: (batch, n) int64, n at least 1.
        state: the state after the tokens before; it is changed.

    Returns:
        The logits (batch, vocab) of the token that comes next.

    Raises:
        ConfigError: the sequence becomes too long for the model. The state is unchanged.
        ValueError: the tokens do not fit the state.
    """
    if tokens.dim() != 2 or tokens.shape[0] != state.batch or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}: they must be (batch, n) with the state's batch of "
            f"{state.batch} and n of at least 1"
        )
    body = model.body if isinstance(model, Reformer) else model.decoder
    body.config.validate(state.position + tokens.shape[1])
    blocks = [tokens] if state.position == 0 else tokens.split(1, dim=1)
    for block in blocks:
        hidden = _read_block(body, block, state)
    return model.head(body.norm(hidden[:, -1]))


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from this many of the likeliest tokens; None = all.
        allowed: the only token ids to draw; None = all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    allowed: Sequence[int] | None = None

    def validate(self, vocab_size: int) -> None:
        """Raise ValueError if a setting cannot work with this many token ids."""
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        allowed = self.allowed
        if allowed is not None and not (allowed and all(0 <= token < vocab_size for token in allowed)):
            raise ValueError(
                f"allowed={list(allowed)} must name at least one token id, each from 0 to {vocab_size - 1}"
            )

    def draw(self, logits: Tensor, keys: Tensor, position: int) -> Tensor:
        """Draw one token for each row, by inverting the distribution function.

        Args:
            logits: (batch, vocab).
            keys: (batch,) int64, the keys of the random numbers (see `Seeds.keys`).
            position: the position of the token to draw.

        Returns:
            (batch,) int64.
        """
        logits = logits.double()
        if self.allowed is not None:
            forbidden = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            forbidden[list(self.allowed)] = False
            logits = logits.masked_fill(forbidden, -torch.inf)
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        if self.top_k is not None:
            best, ids = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, ids, best)
        # The largest becomes 0, so that it can be drawn even if a small temperature makes the other quotients overflow.
        logits = logits - logits.amax(dim=-1, keepdim=True)
        cumulative = (logits / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        counter = torch.tensor(position, dtype=torch.int32, device=logits.device)
        uniform = (random_bits(keys, counter).double() + (2.0**31 + 0.5)) * 2.0**-32
        return (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)


def generate(
    model: Reformer | EncoderDecoder,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    allowed: Sequence[int] | None = None,
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
        temperature, top_k, allowed: see Sampling.
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
    sampling = Sampling(temperature, top_k, allowed)
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


def _start(body: Body, batch: int, call: Call) -> State:
    with torch.no_grad():
        caches = [branch.new_cache(batch, call) for branch in _branches(body)]
    return State(batch, Call(call.seeds, context_mask=call.context_mask), caches)


def _read_block(body: Body, tokens: Tensor, state: State) -> Tensor:
    """The stack's output (batch, n, 2·dim) for tokens (batch, n) that follow those of the state."""
    x = body.embedding(tokens, state.call, state.position)
    branches = (
        partial(branch.read, cache=cache, position=state.position, call=state.call)
        for branch, cache in zip(_branches(body), state.caches, strict=True)
    )
    y = body.stack.run(x, branches)
    state.position += tokens.shape[1]
    return y


def _branches(body: Body) -> list[ReadingBranch]:
    return cast("list[ReadingBranch]", body.stack.branches)


def _tensors(kept: Any) -> Iterator[Tensor]:
    """All tensors in lists and dataclasses, however nested."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, list):
        for each in kept:
            yield from _tensors(each)
    elif hasattr(kept, "__dict__"):
        for each in vars(kept).values():
            yield from _tensors(each)
