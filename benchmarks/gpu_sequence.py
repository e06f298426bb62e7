"""Checks one sequence over two processes, and DeepSpeed's overlap of communication, on one device.

    python -m benchmarks.gpu_sequence [--device cuda] [--json FILE]

NCCL does not let two processes share a GPU, so they talk over gloo: parts of a sequence are exchanged through host
memory. Checked are:
- loss and gradients of two processes that share each sequence against one process, in fp32 and bf16, for every kind of
  layer, with dropout; and how many positions have other bits in their hidden states;
- that reversible training in parts has the bits of ordinary training;
- that training under ZeRO 1 to 3 with `overlap_comm` gives the losses that it gives without, twice.

Prints a table; exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from benchmarks.gpu_checks import Check, guarded, relative, short
from megabase.models import FeedForwardConfig, LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.models.call import Call
from megabase.models.sequence import Part

PROCESSES = 2
PATTERNS = (["local", "lsh"], ["full", "performer"])
# ‖of two processes − of one‖ / ‖of one‖. In bf16 rounding also moves query-keys to other buckets.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
BATCH, LENGTH, STEPS = 2, 1024, 4


@dataclass(frozen=True)
class HostExchange:
    """The exchange between all processes, through host memory and as bytes, which gloo has for every device."""

    def __call__(self, sent: Tensor, counts_sent: Sequence[int], counts: Sequence[int]) -> Tensor:
        rows = (sent.flatten(1) if sent.dim() > 1 else sent[:, None]).contiguous().cpu().view(torch.uint8)
        received = rows.new_empty(sum(counts), rows.shape[1])
        dist.all_to_all_single(received, rows, list(counts), list(counts_sent))
        return received.view(sent.dtype).view(-1, *sent.shape[1:]).to(sent.device)


def model_of(layers: list[str], device: str, dim: int = 64) -> Reformer:
    """The same model in every process."""
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=9,
        dim=dim,
        depth=4,
        heads=2,
        layers=layers,
        dropout=0.1,
        lsh=LSHConfig(rounds=2, chunk_length=32, n_buckets=16),
        local=LocalConfig(window=32),
        feedforward=FeedForwardConfig(mult=4),
    )
    return Reformer(config).to(device).train()


def tokens_of(step: int, device: str) -> Tensor:
    """(BATCH, LENGTH) tokens, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(5, 9, (BATCH, LENGTH), generator=generator).to(device)


def loss_and_gradients(model: Reformer, x: Tensor, part: Part | None, reverse: bool = True) -> Tensor:
    """Loss and gradients of a part of the sequences x as one fp64 vector on the host; None: of the whole."""
    model.zero_grad()
    rows = slice(None) if part is None else part.rows
    seeds = Seeds(3, 5, torch.arange(BATCH, device=x.device))
    hidden = model.body(x[:, rows], seeds=seeds, part=part, reverse=reverse)
    loss = model.head(hidden, x.roll(-1, 1)[:, rows])
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([each.detach().flatten().double().cpu() for each in (loss, *gradients)])


@torch.no_grad()
def other_bits(model: Reformer, x: Tensor, part: Part) -> float:
    """The share of this part's positions whose hidden states are not those of one process."""
    seeds = Seeds(3, 5, torch.arange(BATCH, device=x.device))
    whole = model.body.run(x, Call(seeds))[:, part.rows]
    own = model.body.run(x[:, part.rows], Call(seeds, part=part))
    return (whole != own).any(-1).double().mean().item()


def parts(device: str) -> Iterator[Check]:
    """The checks of sequences that two processes share."""
    part = Part(dist.get_rank(), PROCESSES, LENGTH, HostExchange())
    x = tokens_of(0, device)
    same = Check("reversible training in parts: the bits of ordinary training")
    for dtype, limit in LIMITS.items():
        equal = Check(f"two processes {short(dtype)}: loss and gradients of one", limit=limit)
        # On CPUs kernels compute each row on its own in fp32.
        exact = device == "cpu" and dtype == torch.float32
        bits = Check(f"two processes {short(dtype)}: positions with other bits", limit=0.0 if exact else 1.0)
        for layers in PATTERNS:
            model = model_of(layers, device).to(dtype)
            alone = loss_and_gradients(model, x, None)
            shared, kept = (loss_and_gradients(model, x, part, reverse) for reverse in (True, False))
            same.judge((shared - kept).abs().max().item(), f"{short(dtype)} {layers}")
            dist.all_reduce(shared)
            equal.judge(relative(shared[:1], alone[:1], 1e-9), f"loss {layers}")
            equal.judge(relative(shared[1:], alone[1:], 1e-9), f"gradients {layers}")
            bits.judge(other_bits(model, x, part), f"{layers}")
        yield from (equal, bits)
    yield same


class Trained(nn.Module):
    """The Reformer with the loss as its forward, as DeepSpeed's engine calls it."""

    def __init__(self, model: Reformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Nats of the next token, per token."""
        return self.model.loss(x, x.roll(-1, 1)) / x.numel()


def losses(stage: int, overlap: bool, device: str) -> list[float]:
    """Losses of this process, which trains on one sequence of each batch."""
    import deepspeed

    model = Trained(model_of(["local", "lsh"], device, dim=256 if device == "cuda" else 32))
    largest = max(p.numel() for p in model.parameters())
    zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": largest}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 1000  # norms stay gathered, as `zero.overlap_comm` needs
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": True},
        },
        dist_init_required=False,
    )
    rank, found = dist.get_rank(), []
    for step in range(2 * STEPS):
        loss = engine(tokens_of(step, device)[rank : rank + 1])
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def overlap(stage: int, device: str) -> Check:
    """Without overlap once, with overlap twice: the same losses."""
    check = Check(f"ZeRO {stage} with overlap_comm: the losses without")
    without = losses(stage, False, device)
    for number in (1, 2):
        found = losses(stage, True, device)
        check.judge(max(abs(a - b) for a, b in zip(found, without, strict=True)), f"run {number}")
    return check


def work(rank: int, device: str, directory: str) -> None:
    """In each process: make all checks; rank 0 writes them."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": "0"}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    store = f"file://{directory}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    done = list(parts(device))
    from megabase.pipeline.zero import strategy

    strategy.start_deepspeed()
    done += [
        guarded(f"ZeRO {stage} with overlap_comm", partial(overlap, stage, device)) for stage in (1, 2, 3)
    ]
    if rank == 0:
        rows = [asdict(check) | {"verdict": check.verdict} for check in done]
        (Path(directory) / "checks.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Start the processes, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(work, (options.device, directory), nprocs=PROCESSES)
        rows = json.loads((Path(directory) / "checks.json").read_text())
    for row in rows:
        worst = f"worst {row['worst']:.2e} (limit {row['limit']:.0e}), {row['figures']} figures"
        print(f"{row['name']:62} {row['verdict']:8} {worst}")
        for failure in row["failures"][:3]:
            print(f"    {failure}")
    print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"device": options.device, "checks": rows}, indent=1) + "\n")
    return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
