"""Reading a sequence in blocks, from a state whose size and cost do not grow with the tokens read.

    state = start(model, batch=2)
    block = read_block(model, tokens, state)     # (batch, n) tokens, any n, any number of times
    block.log_probs                              # (batch, n): of each token, given all tokens before it
    logits = read(model, tokens, state)          # the same, for generation: logits of the token that comes next
    many = state.fork([0, 0, 1])                 # three independent states, two of them of the first sequence

The numbers are those of one pass over all tokens, whatever the blocks. This is possible because what a position
attends to depends on nothing later (with LSH layers: under the rule `window`). So only few entries can matter to a
later token, and every branch keeps them in a cache of its own: `new_cache` and `read` of `AttentionBranch`,
`CrossAttentionBranch` and `FeedForwardBranch`, and of the layers in megabase.models.attention. The reversible stack
itself needs no cache: the two streams of a token follow from its embedding and its branches.

A block runs in parallel, in the kernels of training. Both ways do the same arithmetic in another order, so they differ
by rounding: about 1e-6 in fp32. A query-key that lies that close to the border of two buckets may fall to either side;
`near_borders` counts such query-keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models.attention import LSHAttention
from megabase.models.attention.heads import split_heads
from megabase.models.attention.lsh import border_distances
from megabase.models.call import Call
from megabase.models.chance import Seeds
from megabase.models.config import ConfigError
from megabase.models.encoder_decoder import EncoderDecoder, decoder_seeds
from megabase.models.reformer import Body, Reformer

LONGEST_WITH_FULL_LAYERS = 1 << 17
"""Tokens that `read_block` reads with a model that has full attention, whose state and cost grow with every token."""


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
    """Everything that is kept of the tokens read so far.

    Attributes:
        batch: number of sequences.
        call: the seeds, and the source's mask.
        caches: one for each branch of the stack.
        position: how many tokens were read, the same for all sequences.
        last: (batch, 2·dim), the hidden state of the last token, which predicts the next one; None before the first.
    """

    batch: int
    call: Call
    caches: list[Any]
    position: int = 0
    last: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are kept.

        Their bound does not depend on the tokens read, except in models with full layers: there they grow with them.
        """
        return sum(x.numel() * x.element_size() for x in _tensors(self.caches))

    def fork(self, sequences: Sequence[int] | Tensor) -> State:
        """A state of its own for some of the sequences. Reading with either changes nothing in the other.

        Args:
            sequences: their numbers, from 0 to batch − 1, in any order; a number that comes twice gives two copies.

        Raises:
            ValueError: a number is not that of a sequence, or there is none.
        """
        numbers = torch.as_tensor(sequences).flatten().tolist()
        if not numbers or not all(isinstance(n, int) and 0 <= n < self.batch for n in numbers):
            raise ValueError(f"fork({numbers}): give numbers of sequences from 0 to {self.batch - 1}")
        device = next(_tensors(self.caches)).device
        chosen = torch.tensor(numbers, device=device)
        mask = self.call.context_mask
        return State(
            len(numbers),
            Call(self.call.seeds, context_mask=None if mask is None else mask.index_select(0, chosen)),
            [None if cache is None else cache.fork(chosen) for cache in self.caches],
            self.position,
            None if self.last is None else self.last.index_select(0, chosen),
        )


def start(
    model: Reformer | EncoderDecoder,
    batch: int,
    *,
    seeds: Seeds | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> State:
    """Make the state before the first token.

    Args:
        model: the model, in any mode: dropout is never used.
        batch: number of sequences.
        seeds: the seeds of the hash rotations, for all blocks. A pass over all tokens with the same seeds gives the
            same logits.
        source: (batch, source length) int64, what an EncoderDecoder reads; a Reformer takes none.
        source_mask: (batch, source length) bool, True where a source token is real; None = all.

    Raises:
        ConfigError: the model cannot read in blocks.
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


def check_length(model: Reformer | EncoderDecoder, length: int) -> None:
    """Raise ConfigError if a sequence of `length` tokens is longer than `read_block` reads."""
    config = _body(model).config
    config.validate(length)
    if "full" in config.pattern and length > LONGEST_WITH_FULL_LAYERS:
        raise ConfigError(
            f"model.layers has 'full', whose state grows with every token: at most {LONGEST_WITH_FULL_LAYERS:,} tokens "
            f"can be read in blocks, and {length:,} are asked for; take a model with local, lsh or performer layers, "
            "or start a new state"
        )


@dataclass(frozen=True)
class Reading:
    """What `read_block` found in a block of n tokens. All log-probabilities are natural logarithms, fp32 (fp64 for
    models in fp64).

    Attributes:
        log_probs: (batch, n), of each token given all tokens before it. NaN for the first token of a sequence, which
            nothing predicts.
        every_token: (batch, n, vocab_size), of every token of the vocabulary in each place, given all tokens before
            it: `log_probs` is taken from it. None if it was not asked for.
        hidden: hidden states (batch, n, 2·dim) of the layers that were asked for, by their number.
    """

    log_probs: Tensor
    every_token: Tensor | None
    hidden: dict[int, Tensor]


@torch.no_grad()
def read_block(
    model: Reformer | EncoderDecoder,
    tokens: Tensor,
    state: State,
    *,
    every_token: bool = False,
    layers: Collection[int] = (),
) -> Reading:
    """Read a block of tokens in parallel, add them to the state, and score them.

    The sizes of blocks change nothing but the rounding. Memory beyond the state grows with the block: take a few
    thousand tokens at a time, or as many as in training.

    Args:
        model: the model that the state was made for.
        tokens: (batch, n) int64, n at least 1.
        state: the state after the tokens before; it is changed.
        every_token: score every token of the vocabulary in each place too.
        layers: numbers of the layers whose hidden states are wanted: from 0 to depth − 1 both streams after this
            block, fp32; depth: after the last norm, what `model.body` returns.

    Raises:
        ConfigError: the sequence becomes too long for the model. The state is unchanged.
        ValueError: the tokens do not fit the state, or the model has no such layer. The state is unchanged.
    """
    body = _body(model)
    _check(body, tokens, state)
    wrong = [layer for layer in layers if not 0 <= layer <= body.config.depth]
    if wrong:
        raise ValueError(f"layers={wrong}: the model has the layers 0 to {body.config.depth}")
    check_length(model, state.position + tokens.shape[1])
    before = state.last
    hidden, outputs = _read(body, tokens, state, layers)
    if body.config.depth in layers:
        outputs[body.config.depth] = hidden
    predicting = hidden[:, :-1] if before is None else torch.cat((before[:, None], hidden[:, :-1]), dim=1)
    first = tokens.shape[1] - predicting.shape[1]
    if every_token:
        every = F.pad(model.head.log_probs(predicting), (0, 0, first, 0), value=torch.nan)
        return Reading(every.gather(2, tokens[..., None]).squeeze(2), every, outputs)
    log_probs = model.head.token_log_probs(predicting, tokens[:, first:])
    return Reading(F.pad(log_probs, (first, 0), value=torch.nan), None, outputs)


@torch.no_grad()
def read(model: Reformer | EncoderDecoder, tokens: Tensor, state: State) -> Tensor:
    """Read tokens in parallel and add them to the state.

    Args:
        model: the model that the state was made for.
        tokens: (batch, n) int64, n at least 1.
        state: the state after the tokens before; it is changed.

    Returns:
        The logits (batch, vocab_size) of the token that comes next.

    Raises:
        ConfigError: the sequence becomes too long for the model. The state is unchanged.
        ValueError: the tokens do not fit the state. The state is unchanged.
    """
    body = _body(model)
    _check(body, tokens, state)
    _read(body, tokens, state)
    return model.head(state.last)


@dataclass(frozen=True)
class NearBorders:
    """How many query-keys lie so close to the border of two buckets that rounding can move them into the other one.

    Attributes:
        near: their number, by layer.
        hashed: how many query-keys were hashed: tokens · heads · rounds of all LSH layers.
    """

    near: dict[int, int]
    hashed: int


@torch.no_grad()
def near_borders(
    model: Reformer,
    tokens: Tensor,
    *,
    seeds: Seeds | None = None,
    tolerance: float = 1e-5,
    block: int = 1 << 14,
) -> NearBorders:
    """Count the query-keys near a border between buckets: where two ways to read the same tokens may differ by more
    than rounding.

    Args:
        model: a causal model.
        tokens: (batch, length) int64.
        seeds: of the hash rotations.
        tolerance: the distance from a border, as `border_distances` gives it, up to which a query-key counts. The
            default suits fp32; take 1e-2 for bf16.
        block: tokens that are read at a time.

    Raises:
        ConfigError, ValueError: see `start` and `read_block`.
    """
    state = start(model, tokens.shape[0], seeds=seeds)
    found: dict[int, int] = {}
    hashed, hooks = 0, []

    def counter(attention: LSHAttention) -> Callable[[nn.Module, Any, Tensor], None]:
        rotations = attention.rotations(state.call.seeds, tokens.device)

        def count(module: nn.Module, inputs: Any, query_keys: Tensor) -> None:
            nonlocal hashed
            distances = border_distances(split_heads(query_keys, attention.config.heads), rotations)
            found[attention.layer] += int((distances <= tolerance).sum())
            hashed += distances.numel()

        return count

    for attention in (module for module in model.modules() if isinstance(module, LSHAttention)):
        found[attention.layer] = 0
        hooks.append(attention.query_key.register_forward_hook(counter(attention)))
    try:
        for part in tokens.split(block, dim=1):
            read_block(model, part, state)
    finally:
        for hook in hooks:
            hook.remove()
    return NearBorders(found, hashed)


def _body(model: Reformer | EncoderDecoder) -> Body:
    return model.body if isinstance(model, Reformer) else model.decoder


def _check(body: Body, tokens: Tensor, state: State) -> None:
    """Raise ConfigError or ValueError if the tokens cannot follow those of the state."""
    if tokens.dim() != 2 or tokens.shape[0] != state.batch or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}: they must be (batch, n) with the state's batch of "
            f"{state.batch} and n of at least 1"
        )
    body.config.validate(state.position + tokens.shape[1])


def _start(body: Body, batch: int, call: Call) -> State:
    with torch.no_grad():
        caches = [branch.new_cache(batch, call) for branch in _branches(body)]
    return State(batch, Call(call.seeds, context_mask=call.context_mask), caches)


def _read(
    body: Body, tokens: Tensor, state: State, layers: Collection[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Read tokens (batch, n) that follow those of the state: hidden states, and the outputs of `layers`."""
    x = body.embedding(tokens, state.call, state.position)
    branches = (
        partial(branch.read, cache=cache, position=state.position, call=state.call)
        for branch, cache in zip(_branches(body), state.caches, strict=True)
    )
    streams, outputs = body.stack.run(x, branches, layers)
    hidden = body.norm(streams)
    state.position += tokens.shape[1]
    state.last = hidden[:, -1].clone()
    return hidden, outputs


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
