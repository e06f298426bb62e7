"""One rank of test_zero.py: trains the same small Reformer under every ZeRO stage, and once without DeepSpeed.

Writes to the file of its argument, as JSON, for each case the losses of all steps (mean over ranks) and the
weights after them. SGD, because Adam's first steps turn a rounding of a gradient near zero into a whole step.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models import FeedForwardConfig, LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from pipeline import distributed
from pipeline.errors import rank_zero

STEPS, BATCH, LENGTH = 3, 4, 48
LR, MOMENTUM = 0.1, 0.9
STAGES = (0, 1, 2, 3)
ACCUMULATIONS = (1, 2)
PRECISIONS = ("fp32", "bf16")


def build() -> Reformer:
    """The model of all cases: both kinds of layer, dropout, chunked feed-forward and loss, tied embeddings."""
    torch.manual_seed(7)
    return Reformer(
        ReformerConfig(
            vocab_size=9,
            dim=16,
            depth=4,
            heads=2,
            dropout=0.1,
            tie_embeddings=True,
            loss_chunk=32,
            lsh=LSHConfig(rounds=2, chunk_length=8, n_buckets=4),
            local=LocalConfig(window=8),
            feedforward=FeedForwardConfig(mult=2, chunk=32),
        )
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and sample ids of the global batch of a step: the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(5, 9, (BATCH, LENGTH), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    return tokens, labels, torch.arange(BATCH) + step * BATCH


class Trained(nn.Module):
    """The Reformer with the loss as its forward, as DeepSpeed's engine wants to call it."""

    def __init__(self) -> None:
        super().__init__()
        self.reformer = build()

    def forward(self, step: int, rows: slice, reverse: bool = True) -> torch.Tensor:
        """Nats of some rows of a step's global batch, as a share of its mean."""
        tokens, labels, samples = (part[rows] for part in batch(step))
        hidden = self.reformer.body(tokens, seeds=Seeds(run=3, step=step, samples=samples), reverse=reverse)
        return self.reformer.head(hidden, labels) / (BATCH * (LENGTH - 1))


def alone(precision: str) -> dict[str, Any]:
    """The twin: one process, ordinary autograd, plain SGD on fp32 weights; forward and backward in `precision`."""
    model = Trained().train()
    if precision == "bf16":
        model = model.bfloat16()
    # As DeepSpeed does: the fp32 weights start from the rounded ones.
    master = [p.detach().float().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in master]
    losses = []
    for step in range(STEPS):
        model.zero_grad()
        loss = model(step, slice(0, BATCH), reverse=False)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p, weight, buffer in zip(model.parameters(), master, buffers, strict=True):
                assert p.grad is not None
                buffer.mul_(MOMENTUM).add_(p.grad.float())
                weight.add_(buffer, alpha=-LR)
                p.copy_(weight)
    names = [name for name, _ in model.named_parameters()]
    return {"losses": losses, "weights": {n: w.tolist() for n, w in zip(names, master, strict=True)}}


def sharded(stage: int, accumulation: int, precision: str) -> dict[str, Any]:
    """The same training on two ranks under DeepSpeed."""
    import deepspeed

    ranks = dist.get_world_size()
    model = Trained().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": BATCH // ranks // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 1000},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
        },
        dist_init_required=False,
    )
    micro = BATCH // ranks // accumulation
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for turn in range(accumulation):
            first = (turn * ranks + dist.get_rank()) * micro
            loss = engine(step, slice(first, first + micro))
            total += loss.detach()
            engine.backward(loss * ranks * accumulation)
            engine.step()
        dist.all_reduce(total)
        losses.append(total.item())
    # Not the bf16 weights but the fp32 ones that the optimizer steps; stage 0 does not show them.
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = deepspeed.utils.safe_get_full_fp32_param(parameter)
        weights[name] = (parameter.detach().float() if full is None else full).tolist()
    return {"losses": losses, "weights": weights}


def main(output: str) -> None:
    """Run all cases; rank 0 writes them."""
    from pipeline import strategy  # sets DeepSpeed up for CPUs

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    distributed.start()
    strategy.start_deepspeed()
    results = {f"alone-{precision}": alone(precision) for precision in PRECISIONS}
    for case in itertools.product(STAGES, ACCUMULATIONS, PRECISIONS):
        results["-".join(map(str, case))] = sharded(*case)
    if rank_zero():
        Path(output).write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
