"""GPU time by kernel: of one attention call, or of one training step of a model.

    python -m benchmarks.gpu_profile attention|model [--length 64k] [--json FILE]

Sums of torch's profiler over the calls, per call; beside them the time from the first kernel to the last, which
includes the gaps. Under another profiler such as `ncu` use `--calls 1 --plain`, which traces nothing itself.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megabase.pipeline.bench.attention_task import AttentionTask
from megabase.pipeline.bench.model_task import ModelTask
from megabase.pipeline.bench.options import lengths_of


@dataclass(frozen=True)
class Spent:
    """A kernel's time and how often it ran, per call."""

    kernel: str
    ms: float
    times: float


def traced(call: Callable[[], object], calls: int) -> tuple[list[Spent], float]:
    """The kernels, the longest first, and milliseconds of a call without the profiler."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as tracer:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    spent = [
        Spent(event.key, event.self_device_time_total / 1e3 / calls, event.count / calls)
        for event in tracer.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(spent, key=lambda s: -s.ms), start.elapsed_time(end) / calls


def hosted(call: Callable[[], object], calls: int) -> None:
    """Print the Python functions in which the host spends most time. Tracing slows all of them down."""
    torch.cuda.synchronize()
    tracer = cProfile.Profile()
    with tracer:
        for _ in range(calls):
            call()
    pstats.Stats(tracer).sort_stats("tottime").print_stats(25)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["attention", "model"])
    parser.add_argument("--length", default="64k")
    parser.add_argument("--contestant", default="ours", help="a name of megabase bench's")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--show", type=int, default=30)
    parser.add_argument("--host", action="store_true", help="also the time of the host, by function")
    parser.add_argument("--plain", action="store_true", help="only run, for another profiler")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    (length,) = lengths_of("--length", options.length)
    heads = options.dim // options.head_dim
    shared = {"heads": heads, "chunk": 128, "rounds": 4, "dtype": "bf16", "device": "cuda"}
    task: AttentionTask | ModelTask
    if options.what == "attention":
        task = AttentionTask(head_dim=options.head_dim, **shared)
    else:
        task = ModelTask(dim=options.dim, depth=options.depth, length=length, **shared)
    call = task.prepare(options.contestant, length, seed=0)
    for _ in range(2):
        call()
    if options.plain:
        for _ in range(options.calls):
            call()
        torch.cuda.synchronize()
        return 0
    spent, ms = traced(call, options.calls)
    busy = sum(s.ms for s in spent)
    print(f"{options.what} of {options.contestant}, length {length:,}, {heads} heads of {options.head_dim}")
    print(f"a call takes {ms:.3f} ms; its kernels {busy:.3f} ms")
    for s in spent[: options.show]:
        print(f"{s.ms:9.3f} ms {s.ms / busy:6.1%} {s.times:7.1f} ×  {s.kernel[:110]}")
    if options.host:
        hosted(call, options.calls)
    if options.json:
        rows = [vars(s) for s in spent]
        described = {**vars(options), "length": length, "ms": ms, "kernels": rows}
        described["json"] = str(options.json)
        options.json.write_text(json.dumps(described, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
