"""`megabase bench model`: one training step of a whole model, batch 1, and its memory against length and depth.

A call is what a training step does on one device: forward pass, loss of the next token, backward pass, AdamW. The
model is new and its optimizer has made its states, so every call is a step like any other. Weights and computation are
in the dtype asked for, for everybody. Models have the same width, depth, heads, feed-forward, rounds and chunk;
their parameters are counted and printed. Peak memory is of all of it: weights, gradients,
optimizer states, activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.models import LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.pipeline.bench import contest, draw, peers, report
from megabase.pipeline.bench.contest import Budget, Entry
from megabase.pipeline.bench.lab import Call, open_lab
from megabase.pipeline.bench.options import DTYPES, depths_of, device_of, lengths_of, names_of, positive
from megabase.pipeline.errors import UserError

VOCABULARY = 16
"""Token ids: few, as a genome's."""

LEARNING_RATE = 1e-4

ORDINARY = f"{report.OURS}-ordinary"


@dataclass(frozen=True)
class ModelTask:
    """The work: everything but the contestant and what varies. along: the field that a size stands for.

    dtype: a key of DTYPES; device: cpu or cuda.
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

    def prepare(self, name: str, size: int, seed: int) -> Call:
        """One training step of a contestant, `along` being `size`. Raises LeftOut."""
        task = self.at(size)
        generator = torch.Generator(self.device).manual_seed(seed)
        tokens = torch.randint(task.vocab_size, (1, task.length + 1), generator=generator, device=self.device)
        model = CONTESTANTS[name].build(task).to(self.device, DTYPES[self.dtype]).train()
        optimizer = with_states(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
        loss_of = CONTESTANTS[name].loss

        def step() -> None:
            loss_of(model, tokens[:, :-1], tokens[:, 1:], seed).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def at(self, size: int) -> ModelTask:
        """The task whose `along` is `size`."""
        varied: dict[str, Any] = {self.along: size}
        return replace(self, **varied)

    def tiny(self, name: str) -> Call:
        """A step of one local and one LSH layer at a few chunks."""
        return replace(self, depth=2, length=4 * self.chunk, along="length").prepare(name, 4 * self.chunk, 0)

    def parameters(self, name: str) -> int:
        """How many parameters a contestant's model has. Raises LeftOut."""
        return sum(p.numel() for p in CONTESTANTS[name].build(self).parameters())


def with_states(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer after a step with zero gradients: its states exist."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Contestant:
    """build: the model of a task. loss: (model, tokens, labels, seed) -> nats, a scalar; both (1, length) int64."""

    entry: Entry
    build: Callable[[ModelTask], nn.Module]
    loss: Loss


def our_model(task: ModelTask) -> Reformer:
    """Local and LSH layers in turns; a local layer's window is what a chunk and the one before reach. The short
    convolution is off, since the peers have none."""
    return Reformer(
        ReformerConfig(
            vocab_size=task.vocab_size,
            dim=task.dim,
            depth=task.depth,
            heads=task.heads,
            max_length=task.length,
            conv=0,
            lsh=LSHConfig(rounds=task.rounds, chunk_length=task.chunk),
            local=LocalConfig(window=2 * task.chunk),
        )
    )


def our_loss(reverse: bool) -> Loss:
    """The chunked loss, per token; reverse=False keeps every activation instead of rebuilding it."""

    def loss(model: nn.Module, tokens: Tensor, labels: Tensor, seed: int) -> Tensor:
        assert isinstance(model, Reformer)
        hidden = model.body(tokens, seeds=Seeds(seed), reverse=reverse)
        return model.head(hidden, labels) / labels.numel()

    return loss


def peer_loss(model: nn.Module, tokens: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Cross-entropy of the logits."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())


CONTESTANTS = {
    contestant.entry.name: contestant
    for contestant in (
        Contestant(Entry(report.OURS, "megabase"), our_model, our_loss(reverse=True)),
        Contestant(Entry(ORDINARY, "megabase, not reversible"), our_model, our_loss(reverse=False)),
        Contestant(Entry("transformers", "transformers"), peers.transformers_model, peer_loss),
        Contestant(Entry("reformer-pytorch", "reformer-pytorch"), peers.reformer_pytorch_model, peer_loss),
    )
}


@dataclass(frozen=True)
class ModelOptions:
    """What was typed; None: the default."""

    lengths: str
    depths: str
    contestants: str | None
    dtype: str
    dim: int
    depth: int
    heads: int
    chunk: int
    rounds: int
    repeat: int
    seconds: float | None
    longest: bool
    device: str
    json: Path | None
    picture: Path | None


def task_of(options: ModelOptions, length: int) -> ModelTask:
    """The work asked for. Raises UserError, and ConfigError for a model that cannot be."""
    for name in ("dim", "depth", "heads", "chunk", "rounds"):
        positive(f"--{name}", getattr(options, name))
    if options.dim % options.heads:
        raise UserError(f"--dim {options.dim} is not a multiple of --heads {options.heads}")
    task = ModelTask(
        dim=options.dim,
        depth=options.depth,
        heads=options.heads,
        chunk=options.chunk,
        rounds=options.rounds,
        length=length,
        dtype=options.dtype,
        device=device_of(options.device),
    )
    our_model(replace(task, depth=1))  # a ConfigError now, not in the middle
    return task


def run(options: ModelOptions) -> int:
    """Hold the contest over lengths, then over depths at the shortest; print the tables, write what was asked for.

    Returns the exit code. Raises UserError, ConfigError.
    """
    lengths = lengths_of("--lengths", options.lengths)
    depths = depths_of("--depths", options.depths)
    names = names_of("--contestants", options.contestants, CONTESTANTS, list(CONTESTANTS))
    task = task_of(options, lengths[0])
    positive("--repeat", options.repeat)
    seconds = options.seconds if options.seconds is not None else (5.0 if task.device == "cuda" else 60.0)
    positive("--seconds", seconds)
    files = report.Files.of(options.json, options.picture)

    entries = [CONTESTANTS[name].entry for name in names]
    settings = {
        **asdict(task),
        "batch": 1,
        "optimizer": "AdamW",
        "seconds": seconds,
        "repeat": options.repeat,
    }
    result = report.Result("model", settings, {entry.name: entry.label for entry in entries})
    result.parameters = count_parameters(task, names)

    collect = partial(files.collect, result)
    lab = open_lab(task, task.device)
    contest.hold(entries, lengths, lab, Budget(seconds, options.repeat), collect("length"))
    deep = replace(task, along="depth")
    result.states_bytes = {depth: states_bytes(deep.at(depth)) for depth in depths}
    contest.hold(entries, depths, open_lab(deep, task.device), Budget(seconds, repeats=0), collect("depth"))
    if options.longest:
        for entry in entries:
            contest.climb(entry, lengths[-1], lab, Budget(seconds, repeats=0), collect("longest"))
    report.model_tables(result)
    files.write_picture(result, draw.model)
    return result.exit_code()


def states_bytes(task: ModelTask) -> int:
    """Bytes of our model's weights, gradients and AdamW's two states."""
    return 4 * task.parameters(report.OURS) * DTYPES[task.dtype].itemsize


def count_parameters(task: ModelTask, names: Sequence[str]) -> dict[str, int]:
    """Parameters of every contestant's model that can be built."""
    counts = {}
    for name in names:
        try:
            counts[name] = task.parameters(name)
        except contest.LeftOut:
            continue  # the table says why
    return counts
