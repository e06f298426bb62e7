"""The work of `megabase bench model`, and the contestants that do it.

A call is what a training step does on one device: forward pass, loss of the next token, backward pass, AdamW. The model
is new and its optimizer has made its states, so every call is a step like any other. Every contestant has its weights
and computation in the same dtype, and the same width, depth, heads, feed-forward, rounds and chunk; parameters are
counted and printed. Peak memory includes weights, gradients, optimizer states and activations.

With several ranks that share each sequence, the call is that of one of them, with all weights and states. It exchanges
with itself, so it computes wrong numbers in the same time and memory, without the time of communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models import LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.models.sequence import Loopback, Part
from megabase.pipeline.bench import peers
from megabase.pipeline.bench.contest import OURS, Call, Entry, LeftOut
from megabase.pipeline.bench.options import DTYPES

VOCABULARY = 16
"""Number of token ids: few, as for a genome."""

LEARNING_RATE = 1e-4

ORDINARY = f"{OURS}-ordinary"


@dataclass(frozen=True)
class ModelTask:
    """The work: everything but the contestant and the size.

    along: the field that a size sets, length or depth. dtype: a key of DTYPES. device: cpu or cuda. sequence_ranks: how
    many share each sequence of `length` tokens.
    """

    dim: int
    depth: int
    heads: int
    chunk: int
    rounds: int
    length: int
    dtype: str
    device: str
    along: str = "length"
    vocab_size: int = VOCABULARY
    sequence_ranks: int = 1

    def prepare(self, name: str, size: int, seed: int) -> Call:
        """One training step of a contestant at `size`. Raises LeftOut."""
        task = self.at(size)
        part = one_part(task.sequence_ranks, task.length)
        if part is not None and name not in (OURS, ORDINARY):
            raise LeftOut("trains whole sequences only")
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (1, task.length // task.sequence_ranks + 1)
        tokens = torch.randint(task.vocab_size, shape, generator=generator, device=self.device)
        model = CONTESTANTS[name].build(task).to(self.device, DTYPES[self.dtype]).train()
        optimizer = with_states(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
        loss_of = CONTESTANTS[name].loss

        def step() -> None:
            loss_of(model, tokens[:, :-1], tokens[:, 1:], seed, part).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def at(self, size: int) -> ModelTask:
        """The task in which the field `along` is `size`."""
        varied: dict[str, Any] = {self.along: size}
        return replace(self, **varied)

    def tiny(self, name: str) -> Call:
        """A step of one local and one LSH layer at a few chunks."""
        length = 4 * self.chunk * self.sequence_ranks
        return replace(self, depth=2, length=length, along="length").prepare(name, length, 0)

    def parameters(self, name: str) -> int:
        """How many parameters a contestant's model has. Raises LeftOut."""
        return sum(p.numel() for p in CONTESTANTS[name].build(self).parameters())


def one_part(ranks: int, length: int) -> Part | None:
    """The part of a sequence that the middle one of `ranks` holds, exchanging with itself; None: the whole.

    Raises ValueError if the length is not a multiple of `ranks`.
    """
    return None if ranks == 1 else Part(ranks // 2, ranks, length, Loopback())


def with_states(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer after a step with zero gradients, so that its states exist."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


Loss = Callable[[nn.Module, Tensor, Tensor, int, Part | None], Tensor]


@dataclass(frozen=True)
class Contestant:
    """build: the model of a task. loss: (model, tokens, labels, seed, part) -> nats, a scalar; tokens and labels (1, n)
    int64, of the part of the sequence if there is one."""

    entry: Entry
    build: Callable[[ModelTask], nn.Module]
    loss: Loss


def our_model(task: ModelTask) -> Reformer:
    """Local and LSH layers in turns; a local layer's window is what a chunk and the one before reach. The short
    convolution and values that look ahead are off, since the peers have none."""
    return Reformer(
        ReformerConfig(
            vocab_size=task.vocab_size,
            dim=task.dim,
            depth=task.depth,
            heads=task.heads,
            max_length=task.length,
            conv=0,
            values_ahead=False,
            lsh=LSHConfig(rounds=task.rounds, chunk_length=task.chunk),
            local=LocalConfig(window=2 * task.chunk),
        )
    )


def our_loss(reverse: bool) -> Loss:
    """The chunked loss, per token; reverse=False keeps every activation instead of rebuilding it."""

    def loss(model: nn.Module, tokens: Tensor, labels: Tensor, seed: int, part: Part | None) -> Tensor:
        assert isinstance(model, Reformer)
        hidden = model.body(tokens, seeds=Seeds(seed), part=part, reverse=reverse)
        return model.head(hidden, labels) / labels.numel()

    return loss


def peer_loss(model: nn.Module, tokens: Tensor, labels: Tensor, seed: int, part: Part | None) -> Tensor:
    """Cross-entropy of the logits."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())


CONTESTANTS = {
    contestant.entry.name: contestant
    for contestant in (
        Contestant(Entry(OURS, "megabase"), our_model, our_loss(reverse=True)),
        Contestant(Entry(ORDINARY, "megabase, not reversible"), our_model, our_loss(reverse=False)),
        Contestant(Entry("transformers", "transformers"), peers.transformers_model, peer_loss),
        Contestant(Entry("reformer-pytorch", "reformer-pytorch"), peers.reformer_pytorch_model, peer_loss),
    )
}


def states_bytes(task: ModelTask) -> int:
    """Bytes of our model's weights, gradients and AdamW's two states."""
    return 4 * task.parameters(OURS) * DTYPES[task.dtype].itemsize


def count_parameters(task: ModelTask, names: Sequence[str]) -> dict[str, int]:
    """Parameters of every contestant's model that can be built."""
    counts = {}
    for name in names:
        try:
            counts[name] = task.parameters(name)
        except LeftOut:
            continue  # the table says why
    return counts
