"""Generation token by token, from a state whose size and cost do not grow with what was read.

    state = start(model, batch=2)
    logits = read(model, prompt, state)     # (batch, n) tokens at once
    logits = read(model, token, state)      # and then (batch, 1), as often as wanted
    tokens = generate(model, prompt, length=100, temperature=0.8, top_k=50, seed=1)

Reading with the state gives the logits of a pass over the whole prefix: what a position attends to under the rule
`window` depends on nothing later, so the keys that a later token can still meet are few and known:
- LSH layers keep a ring of the last `chunk_length` entries for every head, round and bucket;
- local layers a ring of the last `window` entries (attend=chunk: two chunks, whose borders are fixed);
- performer layers the sums over everything; full layers everything itself (these alone grow);
- the short convolution its last width - 1 inputs; cross-attention the source's keys and values;
- the reversible stack nothing: the streams of a token follow from its embedding and its branches.

Both ways do the same arithmetic in another order, so they differ by rounding: about 1e-6 in fp32. A query-key that
lies as near as that to the border of two buckets may fall to either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megabase.models.attention.cross import CrossAttentionBranch
from megabase.models.attention.full import FullAttention
from megabase.models.attention.heads import AttentionBranch, merge_heads
from megabase.models.attention.kernels.dispatch import unit_keys
from megabase.models.attention.kernels.inputs import SortedOrder
from megabase.models.attention.kernels.reference import first_occurrences
from megabase.models.attention.local import LocalAttention
from megabase.models.attention.lsh import LSHAttention, rotate_and_hash, sort_by_hash
from megabase.models.attention.performer import PerformerAttention, RunningAttention
from megabase.models.call import Call
from megabase.models.chance import Purpose, Seeds, random_bits
from megabase.models.config import ConfigError
from megabase.models.encoder_decoder import EncoderDecoder, decoder_seeds
from megabase.models.precision import Precision
from megabase.models.reformer import Body, Reformer
from megabase.models.reversible import Branch


@dataclass
class State:
    """All that is remembered of the tokens read so far. `copy.deepcopy` makes a fork that goes its own way.

    call: seeds, and the source's mask. memories: one for each branch of the stack. position: how many tokens
    were read, the same for all sequences.
    """

    batch: int
    call: Call
    memories: list[Memory]
    position: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept. Only full layers make it grow."""
        return sum(x.numel() * x.element_size() for x in _tensors(self.memories))


def start(
    model: Reformer | EncoderDecoder,
    batch: int,
    *,
    seeds: Seeds | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> State:
    """The state before the first token of `batch` sequences.

    seeds: of the hash rotations, which stay for the whole generation; a pass over the prefix gets the same. There
    is no dropout, whatever mode the model is in. source, source_mask: what an EncoderDecoder reads, and needs.
    An LSH layer keeps 2 · batch · heads · rounds · buckets · chunk_length · head_dim numbers; on a CPU they take
    memory as the buckets fill.
    Raises ConfigError for models that cannot generate, ValueError for a source that is missing or too much.
    """
    seeds = Seeds() if seeds is None else seeds
    if isinstance(model, Reformer):
        if source is not None or source_mask is not None:
            raise ValueError("a Reformer reads no source: leave it away, or take an EncoderDecoder")
        return _start(model.body, batch, Call(seeds))
    if source is None or source.shape[0] != batch:
        got = "no source" if source is None else f"a source of shape {tuple(source.shape)}"
        raise ValueError(f"an EncoderDecoder got {got} for {batch} sequences: give one source for each")
    with torch.no_grad():
        # In fp32, as the stack has it.
        context = model.encoder.run(source, Call(seeds, mask=source_mask)).float()
    return _start(model.decoder, batch, Call(decoder_seeds(seeds), context=context, context_mask=source_mask))


@torch.no_grad()
def read(model: Reformer | EncoderDecoder, tokens: Tensor, state: State) -> Tensor:
    """Read tokens (batch, n) int64, n at least 1, which `state` then remembers too.

    Returns the logits (batch, vocab) of the token after them. The first call runs its tokens in parallel, later ones
    one by one. Raises ConfigError if the sequence becomes too long, ValueError if the tokens do not fit the state.
    """
    if tokens.dim() != 2 or tokens.shape[0] != state.batch or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}: they must be (batch, n) with the state's batch of "
            f"{state.batch} and n of at least 1"
        )
    body = model.body if isinstance(model, Reformer) else model.decoder
    body.config.validate(state.position + tokens.shape[1])
    pieces = [tokens] if state.position == 0 else tokens.split(1, dim=1)
    for piece in pieces:
        hidden = _read(body, piece, state)
    return model.head(body.norm(hidden[:, -1]))


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
    """The `length` tokens that follow prompt (batch, n) int64: (batch, length) int64.

    temperature: divides the logits; 0 takes the likeliest token. top_k: draw from so many of the likeliest; None =
    all. allowed: the only token ids to draw. stop: a sequence that has drawn this token repeats it, and the
    result ends early once all have. source, source_mask: for an EncoderDecoder.
    seed: of hashing and drawing. The token of row b at place p (prompt included) is a function of (seed, b, p) and
    of the logits alone, so a generation that is broken off and goes on from its tokens gives the same.
    Raises ConfigError for models that cannot generate, ValueError for arguments that cannot work, RuntimeError if the
    model's logits are not finite.
    """
    if length < 0 or not temperature >= 0.0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"length={length} and temperature={temperature} must be at least 0, top_k={top_k} at least 1"
        )
    vocab = model.head.weight.shape[0]
    if allowed is not None and not (allowed and all(0 <= token < vocab for token in allowed)):
        raise ValueError(
            f"allowed={list(allowed)} must name at least one token id, each from 0 to {vocab - 1}"
        )
    state = start(model, prompt.shape[0], seeds=Seeds(run=seed), source=source, source_mask=source_mask)
    keys = Seeds(run=seed).keys(Purpose.SAMPLING, 0, state.batch, prompt.device)
    tokens = prompt.new_empty(state.batch, length)
    done = torch.zeros(state.batch, dtype=torch.bool, device=prompt.device)
    finite = torch.ones((), dtype=torch.bool, device=prompt.device)
    piece = prompt
    for i in range(length):
        logits = read(model, piece, state)
        finite &= logits.isfinite().all()
        token = _draw(logits, keys, state.position, temperature, top_k, allowed)
        if stop is not None:
            token = token.masked_fill(done, stop)
            done |= token == stop
        tokens[:, i] = token
        piece = token[:, None]
        if stop is not None and done.all():
            tokens = tokens[:, : i + 1]
            break
    if not finite:
        raise RuntimeError("the model's logits are not finite: take a checkpoint from before it diverged")
    return tokens


def _draw(
    logits: Tensor,
    keys: Tensor,
    position: int,
    temperature: float,
    top_k: int | None,
    allowed: Sequence[int] | None,
) -> Tensor:
    """(batch,) token ids from logits (batch, vocab), by inversion of the distribution function."""
    logits = logits.double()
    if allowed is not None:
        others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        others[list(allowed)] = False
        logits = logits.masked_fill(others, -torch.inf)
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        best, ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, ids, best)
    # From the largest down: so small a temperature that the quotients overflow still leaves the largest.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    below = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    counter = torch.tensor(position, dtype=torch.int32, device=logits.device)
    uniform = (random_bits(keys, counter).double() + (2.0**31 + 0.5)) * 2.0**-32
    return (below < uniform[:, None] * below[:, -1:]).sum(dim=-1)


def _start(body: Body, batch: int, call: Call) -> State:
    config = body.config
    for kind in config.pattern:
        if kind not in CACHES:
            raise ConfigError(
                f"model.layers has {kind!r}, which cannot generate token by token: take {', '.join(CACHES)}"
            )
    if not config.causal:
        raise ConfigError(
            "model.causal=False: a model that sees both sides cannot generate; train one with causal=True"
        )
    if "lsh" in config.pattern and config.lsh.attend != "window":
        raise ConfigError(
            f"model.lsh.attend={config.lsh.attend}: later tokens change what earlier ones see, so no state can stand "
            "for a prefix; train with attend=window"
        )
    with torch.no_grad():
        memories = [_remember(body, branch, batch, call) for branch in body.stack.branches]
    return State(batch, Call(call.seeds, context_mask=call.context_mask), memories)


def _remember(body: Body, branch: Branch, batch: int, call: Call) -> Memory:
    if isinstance(branch, CrossAttentionBranch):
        assert call.context is not None
        return SourceMemory(*branch.project_context(call.context))
    if not isinstance(branch, AttentionBranch):
        return NoMemory()
    config, weight = body.config, branch.norm.weight
    dtype = Precision.current(weight.device).compute_dtype(weight.dtype)
    nothing = weight.new_empty(batch, config.heads, 0, config.width, dtype=dtype)
    cache = CACHES[config.pattern[branch.layer]](branch.attention, call.seeds, nothing)
    return AttentionMemory(weight.new_zeros(batch, max(0, config.conv - 1), config.dim), cache)


def _read(body: Body, tokens: Tensor, state: State) -> Tensor:
    """The stack's output for tokens (batch, n) that follow what the state has: (batch, n, 2·dim)."""
    x = body.embedding(tokens, state.call, state.position)
    pairs = zip(body.stack.branches, state.memories, strict=True)
    y = body.stack.run(
        x,
        (partial(memory.read, branch, call=state.call, position=state.position) for branch, memory in pairs),
    )
    state.position += tokens.shape[1]
    return y


class Memory(Protocol):
    """What a branch keeps."""

    def read(self, branch: Any, x: Tensor, call: Call, position: int) -> Tensor:
        """The branch's output (batch, n, dim) for x of the tokens from `position` on, which it keeps from now on
        as far as need be. n is 1, or position is 0."""
        ...


class NoMemory:
    """A feed-forward branch keeps nothing."""

    def read(self, branch: Any, x: Tensor, call: Call, position: int) -> Tensor:
        return branch(x, call)


@dataclass
class SourceMemory:
    """Keys and values of the source, (batch, heads, source length, d)."""

    keys: Tensor
    values: Tensor

    def read(self, branch: CrossAttentionBranch, x: Tensor, call: Call, position: int) -> Tensor:
        return branch.read(x, self.keys, self.values, call)


@dataclass
class AttentionMemory:
    """past: (batch, conv - 1, dim), what the short convolution still sees; cache: what the attention layer keeps."""

    past: Tensor
    cache: Cache

    def read(self, branch: AttentionBranch, x: Tensor, call: Call, position: int) -> Tensor:
        x = near = branch.norm(x)
        if branch.convolution is not None:
            before = self.past.shape[1]
            seen = torch.cat((self.past, x), dim=1)
            near = branch.convolution(seen, None)[:, before:]
            self.past = seen[:, seen.shape[1] - before :].clone()
        attention: Any = branch.attention
        return attention.output(merge_heads(self.cache.attend(attention, x, near, position, call)))


class Cache(Protocol):
    """What an attention layer keeps."""

    def attend(self, layer: Any, x: Tensor, near: Tensor, position: int, call: Call) -> Tensor:
        """The layer's attention (batch, heads, n, d), before its output projection. See Memory.read."""
        ...


class LocalRing:
    """keys, values: (batch, heads, places, d); the entry of position p lies at place p % places."""

    def __init__(self, layer: LocalAttention, seeds: Seeds, nothing: Tensor) -> None:
        local = layer.config.local
        places = local.window * (2 if local.attend == "chunk" else 1)
        batch, heads, _, d = nothing.shape
        self.keys = nothing.new_zeros(batch, heads, places, d)
        self.values = torch.zeros_like(self.keys)

    def attend(self, layer: LocalAttention, x: Tensor, near: Tensor, position: int, call: Call) -> Tensor:
        q, k, v = layer.project(x, near, position)
        end, places = position + q.shape[2], self.keys.shape[2]
        kept = torch.arange(max(position, end - places), end, device=q.device)
        self.keys[:, :, kept % places] = k[:, :, kept - position].to(self.keys.dtype)
        self.values[:, :, kept % places] = v[:, :, kept - position].to(self.values.dtype)
        if q.shape[2] > 1:
            return layer.attend(q, k, v, call)
        age = (position - torch.arange(places, device=q.device)) % places
        local = layer.config.local
        reach = local.window - 1 if local.attend == "window" else local.window + position % local.window
        met = age <= min(reach, position)
        return _attend(q.squeeze(2) * q.shape[-1] ** -0.5, self.keys, self.values, met)[:, :, None]


class Everything:
    """keys, values: (batch, heads, position, d)."""

    def __init__(self, layer: FullAttention, seeds: Seeds, nothing: Tensor) -> None:
        self.keys = self.values = nothing

    def attend(self, layer: FullAttention, x: Tensor, near: Tensor, position: int, call: Call) -> Tensor:
        q, k, v = layer.project(x, near, position)
        self.keys = torch.cat((self.keys, k.to(self.keys.dtype)), dim=2)
        self.values = torch.cat((self.values, v.to(self.values.dtype)), dim=2)
        if q.shape[2] > 1:
            return layer.attend(q, k, v, call)
        return F.scaled_dot_product_attention(q.to(self.keys.dtype), self.keys, self.values)


class BucketRings:
    """keys, values: (rows, rounds, buckets, chunk_length, d), rows = batch × heads; positions: the same without d,
    int64, -1 where nothing is yet. Entries of a ring lie in any order."""

    def __init__(self, layer: LSHAttention, seeds: Seeds, nothing: Tensor) -> None:
        config, (batch, heads, _, d) = layer.config, nothing.shape
        rings = (batch * heads, config.lsh.rounds, config.buckets, config.lsh.chunk_length)
        self.rotations = layer.rotations(seeds, nothing.device)
        self.positions = torch.full(rings, -1, device=nothing.device)
        # Not zeroed: a system that gives memory on first use then gives it to rings that are used.
        self.keys = nothing.new_empty(*rings, d)
        self.values = torch.empty_like(self.keys)

    def attend(self, layer: LSHAttention, x: Tensor, near: Tensor, position: int, call: Call) -> Tensor:
        qk, v = layer.project(x, near)
        if qk.shape[2] > 1:
            order = sort_by_hash(qk, self.rotations, None)
            self.fill(qk.flatten(0, 1), v.flatten(0, 1), order)
            return layer.attend(qk, v, order, call)
        buckets = rotate_and_hash(qk, self.rotations)
        one = (qk.flatten(0, 2), v.flatten(0, 2), buckets.flatten(0, 1).squeeze(-1))
        y = self.step(*one, position, once=layer.rule.once)
        return y.view(v.shape)

    def step(self, qk: Tensor, v: Tensor, buckets: Tensor, position: int, *, once: bool) -> Tensor:
        """Attention (rows, d) of one query-key (rows, d) in buckets (rows, rounds), which is then kept with v."""
        qk, v = qk.to(self.keys.dtype), v.to(self.values.dtype)
        row = torch.arange(buckets.shape[0], device=qk.device)[:, None]
        this = torch.arange(buckets.shape[1], device=qk.device)
        rings = (row, this, buckets)
        positions = self.positions[rings]
        met = positions >= 0
        values = self.values[rings].masked_fill(~met[..., None], 0.0).flatten(1, 2)
        oldest = positions.argmin(dim=-1)
        met = met.flatten(1)
        if once:
            met = first_occurrences(positions.flatten(1), met)
        lonely = ~met.any(dim=-1, keepdim=True)
        y = _attend(qk, self.keys[rings].flatten(1, 2), values, met | lonely)
        place = (*rings, oldest)
        self.positions[place] = position
        self.keys[place] = unit_keys(qk)[:, None]
        self.values[place] = v[:, None]
        return torch.where(lonely, v, y)

    def fill(self, qk: Tensor, v: Tensor, order: SortedOrder) -> None:
        """Keep the last entries of every bucket of a sequence from position 0: qk, v (rows, length, d)."""
        reach = self.keys.shape[3]
        last = torch.ones_like(order.buckets, dtype=torch.bool)
        last[..., :-reach] = order.buckets[..., reach:] != order.buckets[..., :-reach]
        row, this, seat = last.nonzero(as_tuple=True)
        position = order.positions[row, this, seat].long()
        # Those of one bucket sit side by side and are at most `reach`: no two get the same place.
        place = (row, this, order.buckets[row, this, seat], seat % reach)
        self.positions[place] = position
        self.keys[place] = unit_keys(qk)[row, position].to(self.keys.dtype)
        self.values[place] = v[row, position].to(self.values.dtype)


class RunningSums:
    """What megabase.models.attention.performer.RunningAttention keeps."""

    def __init__(self, layer: PerformerAttention, seeds: Seeds, nothing: Tensor) -> None:
        self.running = RunningAttention(layer.directions(seeds, nothing.device), nothing)

    def attend(self, layer: PerformerAttention, x: Tensor, near: Tensor, position: int, call: Call) -> Tensor:
        return self.running.extend(*layer.project(x, near, position))


CACHES: dict[str, Callable[[Any, Seeds, Tensor], Cache]] = {
    "local": LocalRing,
    "lsh": BucketRings,
    "full": Everything,
    "performer": RunningSums,
}
"""Kinds of layers that can generate. Called with the layer, the seeds, and keys of no tokens: (batch, heads, 0, d), of
the dtype and on the device that those of the tokens will have."""


def _attend(q: Tensor, keys: Tensor, values: Tensor, met: Tensor) -> Tensor:
    """softmax(keys · q) values over what is met: q (..., d), keys and values (..., places, d), met (..., places)."""
    scores = (keys @ q.to(keys.dtype)[..., None]).squeeze(-1)
    weights = (
        scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~met, -torch.inf).softmax(-1)
    )
    return (weights.to(values.dtype)[..., None, :] @ values).squeeze(-2)


def _tensors(kept: Any) -> Iterator[Tensor]:
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, list):
        for each in kept:
            yield from _tensors(each)
    elif hasattr(kept, "__dict__"):
        for each in vars(kept).values():
            yield from _tensors(each)
