"""One rank of test_zero.py: trains the same small Reformer under every ZeRO stage, and once without DeepSpeed.

Writes to the file of its argument, as JSON, for each case the losses of all steps (mean over ranks) and the
weights after them. SGD, because Adam's first steps would turn the rounding error of a gradient near zero into a full
step.

Then, with AdamW: states that are offloaded and resumed from a checkpoint, fp16 with an overflow, and the construction
of a model under stage 3.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from megabase.models import FeedForwardConfig, LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.models.attention import by_heads
from megabase.models.sequence import Group, Part
from megabase.pipeline.ranks import rendezvous
from megabase.pipeline.ranks.environment import is_rank_zero
from megabase.pipeline.zero.construction import gather_whole_branches

STEPS, BATCH, LENGTH = 3, 4, 48
LR, MOMENTUM = 0.1, 0.9
STAGES = (0, 1, 2, 3)
ACCUMULATIONS = (1, 2)
PRECISIONS = ("fp32", "bf16")
# Values of gradient clipping: 0 is none; 1 is below the gradient norm of every step.
CLIPS = (0.0, 1.0)
# Stage and precision with which communication overlaps computation, with accumulation.
OVERLAPS = list(itertools.product((1, 2, 3), PRECISIONS))
# Stage, precision, and what is offloaded to host memory.
OFFLOADS = [
    (stage, precision, offload)
    for precision in PRECISIONS
    for stage, offload in [(1, "states"), (2, "states"), (3, "states"), (3, "states+parameters")]
]
# Parameters of this model are 190 MB in fp32.
DEEP = {"dim": 384, "depth": 30, "heads": 6}


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
        gather_whole_branches(self.reformer)

    def forward(self, step: int, rows: slice, reverse: bool = True, part: Part | None = None) -> torch.Tensor:
        """The nats of some rows of a step's global batch, divided by the number of labels in the full batch."""
        tokens, labels, samples = (each[rows] for each in batch(step))
        if part is not None:
            tokens, labels = tokens[:, part.rows], labels[:, part.rows]
        seeds = Seeds(run=3, step=step, samples=samples)
        hidden = self.reformer.body(tokens, seeds=seeds, reverse=reverse, part=part)
        return self.reformer.head(hidden, labels) / (BATCH * (LENGTH - 1))


def alone(precision: str, clip: float) -> dict[str, Any]:
    """The reference: one process, ordinary autograd, SGD on fp32 weights, forward and backward in `precision`."""
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
            gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
            scale = min(1.0, clip / norm) if clip else 1.0
            assert not clip or scale < 0.9, norm
            for p, gradient, weight, buffer in zip(
                model.parameters(), gradients, master, buffers, strict=True
            ):
                buffer.mul_(MOMENTUM).add_(gradient, alpha=scale)
                weight.add_(buffer, alpha=-LR)
                p.copy_(weight)
    names = [name for name, _ in model.named_parameters()]
    return {"losses": losses, "weights": {n: w.tolist() for n, w in zip(names, master, strict=True)}}


def sharded(
    stage: int, accumulation: int, precision: str, clip: float, *, shared: bool = False, **zero: Any
) -> dict[str, Any]:
    """The same training on two ranks under DeepSpeed. shared: both ranks share each sequence. zero: more settings."""
    import deepspeed

    ranks = dist.get_world_size()
    part, turns = None, ranks
    if shared:
        part, turns = Part(dist.get_rank(), ranks, LENGTH, Group(dist.group.WORLD)), 1
    # In fp32 without accumulation one head at a time, as in very long sequences; otherwise both heads at once. (In bf16
    # the two round differently, and the reference computes both heads at once.)
    by_heads.LIMIT["cpu"] = 1 if (accumulation, precision) == (1, "fp32") else 1 << 22
    model = Trained().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": BATCH // turns // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": False,
                "reduce_bucket_size": 1000,
                **zero,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
        },
        dist_init_required=False,
    )
    micro = BATCH // turns // accumulation
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for turn in range(accumulation):
            first = (turn * turns + dist.get_rank() % turns) * micro
            loss = engine(step, slice(first, first + micro), part=part)
            total += loss.detach()
            engine.backward(loss * ranks * accumulation)
            engine.step()
        dist.all_reduce(total)
        losses.append(total.item())
    # The fp32 weights that the optimizer steps; stage 0 gives no access to them, so there the model's own.
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = deepspeed.utils.safe_get_full_fp32_param(parameter)
        weights[name] = (parameter.detach().float() if full is None else full).tolist()
    return {"losses": losses, "weights": weights}


@dataclass
class Started:
    """An engine with AdamW. In each step every rank trains on two sequences."""

    engine: Any

    @classmethod
    def of(cls, stage: int, precision: str, **zero: Any) -> Started:
        """Build the engine. Under stage 3 its model is sharded while it is built, as in the pipeline."""
        import deepspeed

        from megabase.pipeline.zero.construction import Sharded

        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 1000, **zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if precision == "bf16":
            config["bf16"] = {"enabled": True}
        if precision == "fp16":
            # The second good step in a row doubles the scale; one overflow halves it.
            config["fp16"] = {
                "enabled": True,
                "initial_scale_power": 10,
                "loss_scale_window": 2,
                "hysteresis": 1,
            }
        if stage == 3:
            with Sharded(config):
                model = Trained()
        else:
            model = Trained()
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        return cls(
            deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        )

    def train(self, steps: range, overflow_at: int = -1) -> list[float]:
        """Train `steps` and return their losses. In step `overflow_at` the last rank's gradients are made infinite."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        share = BATCH // ranks
        losses = []
        for step in steps:
            loss = self.engine(step, slice(rank * share, (rank + 1) * share))
            poisoned = step == overflow_at and rank == ranks - 1
            self.engine.backward(loss * (float("inf") if poisoned else ranks))
            self.engine.step()
            total = loss.detach().float()
            dist.all_reduce(total)
            losses.append(total.item())
        return losses

    @property
    def scale(self) -> float:
        """The scale of the loss in fp16."""
        optimizer = self.engine.optimizer
        held = getattr(optimizer, "loss_scale_config", optimizer)
        return float(getattr(held, "cur_scale", 0) or optimizer.loss_scale)


def shared_directory() -> str:
    """The same new directory for every rank."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    assert made[0]
    return made[0]


def offloaded(stage: int, precision: str, offload: str) -> dict[str, Any]:
    """Losses of five steps: without offload, with offload, and with offload resumed after step 3 in a new engine."""
    cpu = {"device": "cpu", "pin_memory": False}
    zero: dict[str, Any] = {"offload_optimizer": cpu}
    if "parameters" in offload:
        # By default these parameters are too small to be sharded at all.
        zero |= {"offload_param": cpu, "stage3_param_persistence_threshold": 0}
    directory = shared_directory()
    plain = Started.of(stage, precision).train(range(5))
    first = Started.of(stage, precision, **zero)
    whole = first.train(range(3))
    first.engine.save_checkpoint(directory, tag="t")
    whole += first.train(range(3, 5))
    second = Started.of(stage, precision, **zero)
    second.engine.load_checkpoint(directory, tag="t")
    return {"plain": plain, "offloaded": whole, "resumed": whole[:3] + second.train(range(3, 5))}


def second_copies() -> dict[str, Any]:
    """Stage 3 without and with hpZ in bf16: losses of five steps, and of the last two after resuming.

    A run with hpZ is resumed from the checkpoints of both. `gathers` counts how often weights were gathered from second
    copies so far. Call it last: DeepSpeed keeps hpZ's groups for every model that follows.
    """
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle

    gathers = 0
    original = AllGatherCoalescedHandle.wait

    def wait(handle: Any, *arguments: Any, **options: Any) -> None:
        nonlocal gathers
        gathers += handle.use_secondary_tensor and not handle.complete
        original(handle, *arguments, **options)

    found: dict[str, Any] = {}
    hpz: dict[str, Any] = {"zero_hpz_partition_size": 2}
    with mock.patch.object(AllGatherCoalescedHandle, "wait", wait):
        for name, zero in {"plain": {}, "hpz": hpz}.items():
            first = Started.of(3, "bf16", stage3_param_persistence_threshold=0, **zero)
            losses, directory = first.train(range(3)), shared_directory()
            first.engine.save_checkpoint(directory, tag="t")
            found[name] = {
                "losses": losses + first.train(range(3, 5)),
                "gathers": gathers,
                "saved": directory,
            }
    for values in found.values():
        second = Started.of(3, "bf16", stage3_param_persistence_threshold=0, **hpz)
        second.engine.load_checkpoint(values["saved"], tag="t")
        values["resumed"] = second.train(range(3, 5))
    return found


def updated(stage: int, precision: str) -> float:
    """`update_ratio` after two steps, the second of which it is of."""
    from megabase.pipeline.zero.updates import update_ratio

    started = Started.of(stage, precision)
    started.train(range(2))
    return update_ratio(started.engine.basic_optimizer)


def update_alone() -> float:
    """The same from the weights before and after the step, in one process without DeepSpeed."""
    model = Trained().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(step, slice(0, BATCH), reverse=False).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    decay = 1 - 1e-2 * optimizer.param_groups[0]["weight_decay"]
    pairs = list(zip(before, (p.detach() for p in model.parameters()), strict=True))
    moved = sum((new - decay * old).double().square().sum() for old, new in pairs)
    return float((moved / sum(new.double().square().sum() for _, new in pairs)) ** 0.5)


def half(stage: int) -> dict[str, Any]:
    """Losses and loss scales of fp16: six steps, the fourth of which overflows, and the sixth from a checkpoint.

    Then twelve steps that all overflow, more than the scale can be halved. `lost` counts those that were skipped.
    """
    from megabase.pipeline.zero.strategy import skip_steps_at_least_scale

    directory = shared_directory()
    first = Started.of(stage, "fp16")
    losses, scales = [], [first.scale]
    for step in range(6):
        losses += first.train(range(step, step + 1), overflow_at=3)
        scales.append(first.scale)
        if step == 4:
            first.engine.save_checkpoint(directory, tag="t")
    second = Started.of(stage, "fp16")
    second.engine.load_checkpoint(directory, tag="t")
    taken_over = second.scale
    resumed = [taken_over, *second.train(range(5, 6)), second.scale]
    skip_steps_at_least_scale(second.engine)
    before = second.engine.skipped_steps
    for step in range(12):
        second.train(range(step, step + 1), overflow_at=step)
    return {
        "losses": losses,
        "scales": scales,
        "skipped": first.engine.skipped_steps,
        "resumed": resumed,
        "lost": second.engine.skipped_steps - before,
        "least": second.scale,
    }


class Peak(threading.Thread):
    """Measures the peak memory of this process above its memory at construction, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._before = self._most = anonymous()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, anonymous())

    def stop(self) -> int:
        """Stop measuring and return the peak."""
        self._done.set()
        self.join()
        return max(self._most, anonymous()) - self._before


def anonymous() -> int:
    """Memory of this process that is not mapped from files, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) * 1024


def built(precision: str) -> dict[str, Any]:
    """Build a deep model sharded and unsharded, from the same seed.

    Returns:
        `bytes` of its weights in fp32, `peak` bytes while the sharded one is built, and the names of weights that are
        `different` in the two.
    """
    import deepspeed

    from megabase.pipeline.zero.construction import Sharded

    settings = ReformerConfig(vocab_size=9, **DEEP)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    with Sharded(config):
        Reformer(ReformerConfig(vocab_size=9))  # memory that the libraries keep on first use must not count
    peak = Peak()
    peak.start()
    torch.manual_seed(5)
    with Sharded(config):
        sharded_model = Reformer(settings)
    most = peak.stop()
    torch.manual_seed(5)
    full = Reformer(settings)
    if precision == "bf16":
        full = full.bfloat16()
    different = []
    for (name, part), expected in zip(sharded_model.named_parameters(), full.parameters(), strict=True):
        assert part.numel() == 0, name
        with deepspeed.zero.GatheredParameters([part]):
            if part.dtype != expected.dtype or not torch.equal(part, expected):
                different.append(name)
    return {"bytes": sum(p.numel() * 4 for p in full.parameters()), "peak": most, "different": different}


def main(output: str) -> None:
    """Run all cases; rank 0 writes them."""
    from deepspeed.accelerator import get_accelerator

    from megabase.pipeline.zero import strategy  # sets DeepSpeed up for CPUs

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rendezvous.start()
    strategy.start_deepspeed()
    results = {f"built-{precision}": built(precision) for precision in PRECISIONS}
    for reference in itertools.product(PRECISIONS, CLIPS):
        results["-".join(map(str, ["alone", *reference]))] = alone(*reference)
    for case in itertools.product(STAGES, ACCUMULATIONS, PRECISIONS, CLIPS):
        results["-".join(map(str, case))] = sharded(*case)
    for stage, accumulation in itertools.product(STAGES, ACCUMULATIONS):
        shared = sharded(stage, accumulation, "fp32", CLIPS[-1], shared=True)
        results[f"shared-{stage}-{accumulation}"] = shared
    for stage, precision in OVERLAPS:
        found = sharded(stage, ACCUMULATIONS[-1], precision, CLIPS[-1], overlap_comm=True)
        results[f"overlap-{stage}-{precision}"] = found
    for kept in OFFLOADS:
        results["-".join(map(str, kept))] = offloaded(*kept)
    results["update-alone"] = update_alone()
    for stage, precision in itertools.product(STAGES, PRECISIONS):
        results[f"update-{stage}-{precision}"] = updated(stage, precision)
    # DeepSpeed refuses fp16 on CPUs on which it is slow. Its results are right on every CPU.
    get_accelerator().is_fp16_supported = lambda: True
    for stage in STAGES:
        results[f"half-{stage}"] = half(stage)
    results["second-copies"] = second_copies()
    if is_rank_zero():
        Path(output).write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
