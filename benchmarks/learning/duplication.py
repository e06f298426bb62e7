"""The duplication task of the paper (section 5, table 2): sequences 0w0w, and how exactly the second w is predicted.

One layer, |w| = 511 of 127 symbols, width 256, 4 heads. A model that was trained with 4 rounds is evaluated with full
attention (of the same query-keys, to all earlier positions) and with 8, 4, 2 and 1 rounds. The paper trains 150,000
steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning.models import Size, build
from benchmarks.learning.recall import summary
from benchmarks.learning.training import Batch, Budget, train
from megabase.models import Reformer, ReformerConfig, Seeds
from megabase.models.attention.kernels import dispatch
from megabase.models.attention.kernels.inputs import SortedOrder
from megabase.models.attention.lsh import LSHAttention
from megabase.models.call import Call

SYMBOLS = 127
TEST_SEED = 1 << 20
ROUNDS = ("full", 8, 4, 2, 1)
"""What a model is evaluated with."""


@dataclass(frozen=True)
class Task:
    """Sequences 0w0w.

    Attributes:
        word: symbols of w.
        batch: sequences of a step.
    """

    word: int = 511
    batch: int = 8

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * (self.word + 1)

    def sequences(self, step: int, seed: int, count: int) -> Tensor:
        """0w0w of a step: (count, length) int64 in [0, SYMBOLS]."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        word = torch.randint(1, SYMBOLS + 1, (count, self.word), generator=generator)
        half = torch.cat((torch.zeros(count, 1, dtype=torch.int64), word), dim=1)
        return torch.cat((half, half), dim=1)

    def make(self, step: int, seed: int, count: int) -> Batch:
        """Sequences as tokens and labels; only the second w has labels, as in the paper."""
        x = self.sequences(step, seed, count)
        labels = x.roll(-1, 1)
        labels[:, : self.word + 1] = -100
        labels[:, -1] = -100
        return x, labels


def settings(name: str, size: Size, task: Task) -> ReformerConfig:
    """One LSH layer of width 256."""
    config = build(name, replace(size, vocab_size=SYMBOLS + 1), task.length)
    return replace(
        config, layers=["lsh"], depth=1, feedforward=replace(config.feedforward, mult=256 / config.dim)
    )


@contextmanager
def attending(model: Reformer, rounds: str | int) -> Iterator[None]:
    """Meanwhile, every LSH layer attends in so many rounds, or (`full`) to every earlier position."""
    layers = [module for module in model.modules() if isinstance(module, LSHAttention)]
    lsh = model.body.config.lsh
    before = lsh.rounds
    try:
        if isinstance(rounds, int):
            lsh.rounds = rounds
        else:
            for layer in layers:
                layer.attend = partial(_attend_fully, layer)  # type: ignore[method-assign]
        yield
    finally:
        lsh.rounds = before
        for layer in layers:
            vars(layer).pop("attend", None)


def _attend_fully(layer: LSHAttention, qk: Tensor, v: Tensor, order: SortedOrder, call: Call) -> Tensor:
    """Attention of all positions to all earlier ones: one bucket, and a window as long as the sequence."""
    rows, length = qk.shape[0] * qk.shape[1], qk.shape[2]
    everything = SortedOrder.identity(rows, length, qk.device)
    rule = replace(layer.rule, attend="window", reach=length)
    return dispatch.sorted_attention(qk, None, v, everything, rule)


def accuracy(model: Reformer, task: Task, rounds: str | int, count: int = 16) -> float:
    """Share of the symbols of the second w that are predicted, in percent."""
    tokens, labels = task.make(0, TEST_SEED, count)
    device = next(model.parameters()).device
    with attending(model, rounds):
        found = torch.cat(
            [model(part.to(device), seeds=Seeds(1)).argmax(-1).cpu() for part in tokens.split(4)]
        )
    which = labels != -100
    return 100.0 * float((found == labels)[which].float().mean())


def run(name: str, task: Task, size: Size, budget: Budget) -> dict[str, Any]:
    """Train one model, and evaluate it with each of ROUNDS.

    Returns:
        A row of the table: `accuracy` in percent by ROUNDS, and the curve (`accuracy` with the rounds of training).
    """
    config = settings(name, size, task)
    model, curve = train(
        config,
        lambda step: task.make(step, budget.seed, task.batch),
        lambda model: {"accuracy": accuracy(model, task, config.lsh.rounds, 4)},
        budget,
        first_label=1,
    )
    model.eval()
    with torch.no_grad():
        found = {str(rounds): round(accuracy(model, task, rounds), 2) for rounds in ROUNDS}
    return {"model": name, "accuracy": found, **summary(curve)}
