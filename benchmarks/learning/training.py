"""A small training loop in plain torch, the same for every model of a table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.models import Reformer, ReformerConfig, Seeds

Batch = tuple[Tensor, Tensor]
"""Tokens and labels, (windows, length) int64 each. A label of −100 has no loss."""


@dataclass(frozen=True)
class Budget:
    """How long and how a model is trained.

    Attributes:
        steps: optimizer steps at most.
        lr: learning rate after the warm-up.
        warmup: steps over which it rises.
        least: share of the learning rate that is left at the last step; it falls as a cosine. 1: it stays.
        every: steps between two evaluations.
        seed: of the weights, the hashing and the data.
        device: cpu or cuda, which computes in bf16.
    """

    steps: int
    lr: float = 3e-3
    warmup: int = 20
    least: float = 1.0
    every: int = 25
    seed: int = 0
    device: str = "cpu"

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1 on."""
        fall = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, step / self.warmup) * (self.least + (1.0 - self.least) * fall)


@dataclass
class Curve:
    """The evaluations of one training.

    Attributes:
        rows: each with the `step` and what the evaluation returned.
        parameters: number of weights.
        tokens: read in one step.
        seconds: of the training steps alone, evaluations aside.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    parameters: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def first(self, key: str, below: float) -> int | None:
        """The first evaluated step at which `key` was at most `below`; None if it never was."""
        return next((int(row["step"]) for row in self.rows if row[key] <= below), None)


def train(
    config: ReformerConfig,
    batch: Callable[[int], Batch],
    evaluate: Callable[[Reformer], dict[str, float]],
    budget: Budget,
    done: Callable[[dict[str, float]], bool] = lambda row: False,
    first_label: int = FIRST_LETTER,
) -> tuple[Reformer, Curve]:
    """Train a model from random weights.

    Args:
        config: of the model.
        batch: the batch of a step, from 1 on.
        evaluate: called every `budget.every` steps with the model in evaluation mode, without gradients.
        budget: how long and how.
        done: given a row of the curve, whether training may end.
        first_label: see Reformer.

    Returns:
        The model and its curve.
    """
    torch.manual_seed(budget.seed)
    model = Reformer(config, first_label).to(budget.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    curve = Curve(parameters=sum(p.numel() for p in model.parameters()))
    for step in range(1, budget.steps + 1):
        began = time.perf_counter()
        tokens, labels = (x.to(budget.device) for x in batch(step))
        curve.tokens = tokens.numel()
        with autocast(budget.device):
            loss = model.loss(tokens, labels, seeds=Seeds(budget.seed, step)) / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        curve.seconds += time.perf_counter() - began
        if step % budget.every == 0 or step == budget.steps:
            model.eval()
            with torch.no_grad(), autocast(budget.device):
                curve.rows.append({"step": step} | evaluate(model))
            model.train()
            if done(curve.rows[-1]):
                break
    return model, curve


def autocast(device: str) -> torch.autocast:
    """Computes in bf16 on a GPU, and in fp32 on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def bits(model: Reformer, tokens: Tensor, labels: Tensor, at_once: int = 1) -> Tensor:
    """Bits of every label, (windows, length) fp32 on the CPU; windows are computed `at_once` at a time."""
    device = next(model.parameters()).device
    parts = []
    for part, wanted in zip(tokens.split(at_once), labels.split(at_once), strict=True):
        logits = model(part.to(device), seeds=Seeds(1)).float()
        nats = torch.nn.functional.cross_entropy(logits.mT, wanted.to(device), reduction="none")
        parts.append(nats.cpu() / math.log(2))
    return torch.cat(parts)
