"""One rank of test_traffic.py: counts the bytes of all collectives of a training step.

Writes to the file of its argument, as JSON: of each ZeRO stage the bytes of the tensors of each collective, and of each
kind of layer the bytes that this rank sends to those with which it shares a sequence.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabase.models import FeedForwardConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.models.sequence import Group, Part
from megabase.pipeline.ranks import rendezvous
from megabase.pipeline.ranks.environment import is_rank_zero

LENGTH, ACCUMULATION, STEPS = 32, 2, 2
STAGES = (0, 1, 2, 3)
KINDS = ("lsh", "full")
# DeepSpeed's collectives, and the number of the argument that is the full tensor.
FULL_TENSOR = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}
SMALL = 8
"""Bytes of norms and flags, which do not count."""


def model(kind: str) -> ReformerConfig:
    """A model whose every tensor stays gathered in stage 3, and that needs nothing of its neighbours."""
    return ReformerConfig(
        vocab_size=9,
        dim=16,
        depth=2,
        heads=4,
        layers=[kind],
        conv=0,
        values_ahead=False,
        positions="none",
        lsh=LSHConfig(rounds=2, chunk_length=8, n_buckets=4),
        feedforward=FeedForwardConfig(mult=2),
    )


@dataclass
class Counted:
    """An exchange that counts the bytes that it sends to others."""

    group: Group
    rank: int
    sent: int = 0

    def __call__(self, sent: Tensor, counts_sent: Sequence[int], counts: Sequence[int]) -> Tensor:
        others = sum(counts_sent) - counts_sent[self.rank]
        self.sent += others * sent[:1].numel() * sent.element_size()
        return self.group(sent, counts_sent, counts)


@dataclass
class Collectives:
    """Counts the bytes of the collectives of torch.distributed while it is `on`."""

    bytes: Counter[str] = field(default_factory=Counter)
    on: bool = False

    def watch(self, name: str, place: int) -> None:
        """Replace a function of torch.distributed by one that counts."""
        real = getattr(dist, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            tensor = arguments[place] if len(arguments) > place else None
            tensor = (
                next((t for t in more.values() if isinstance(t, Tensor)), None) if tensor is None else tensor
            )
            if self.on and tensor is not None and (size := tensor.numel() * tensor.element_size()) > SMALL:
                self.bytes[name] += size
            return real(*arguments, **more)

        setattr(dist, name, counted)


class Trained(torch.nn.Module):
    """The Reformer with the loss as its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.reformer = Reformer(model("full"))

    def forward(self, tokens: Tensor) -> Tensor:
        """The nats of a batch."""
        return self.reformer.loss(tokens, tokens, seeds=Seeds(1))


def step_bytes(stage: int, collectives: Collectives) -> dict[str, int]:
    """The bytes of a step after the first, of all micro batches."""
    import deepspeed

    from megabase.pipeline.plan.traffic import PERSISTENT
    from megabase.pipeline.zero.construction import Sharded

    zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage == 3:
        with Sharded(config):
            trained = Trained()
    else:
        trained = Trained()
    optimizer = torch.optim.AdamW(trained.train().parameters())
    engine, *_ = deepspeed.initialize(
        model=trained, optimizer=optimizer, config=config, dist_init_required=False
    )
    tokens = torch.arange(LENGTH)[None] % 9
    for _ in range(STEPS):
        collectives.bytes.clear()
        collectives.on = True
        for _ in range(ACCUMULATION):
            engine.backward(engine(tokens))
            engine.step()
        collectives.on = False
    return dict(collectives.bytes)


def exchanged_bytes(kind: str) -> int:
    """The bytes that this rank sends to the others in a forward and backward pass, which share the sequence."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    exchange = Counted(Group(dist.group.WORLD), rank)
    part = Part(rank, ranks, LENGTH, exchange)
    tokens = torch.arange(LENGTH)[None, part.rows] % 9
    Reformer(model(kind)).loss(tokens, tokens, seeds=Seeds(1), part=part).backward()
    return exchange.sent


def main(output: str) -> None:
    """Count; rank 0 writes."""
    collectives = Collectives()
    for name, place in FULL_TENSOR.items():
        collectives.watch(name, place)  # before DeepSpeed looks them up
    from megabase.pipeline.zero import strategy

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rendezvous.start()
    strategy.start_deepspeed()
    found: dict[str, Any] = {f"stage {stage}": step_bytes(stage, collectives) for stage in STAGES}
    found |= {kind: exchanged_bytes(kind) for kind in KINDS}
    if is_rank_zero():
        Path(output).write_text(json.dumps(found))
    dist.barrier()
