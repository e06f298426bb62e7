"""Which kernels take how long: one call of sorted attention (forward and backward), or one training step of a model.

    python -m benchmarks.gpu_profile attention|model [--lengths 64k] [--backends triton,triton-together] [--json FILE]

Sums of torch's profiler over the calls, per call; beside them the time from the first kernel to the last, which
includes the gaps. Each backend and length in turn. Under another profiler such as `ncu` use `--calls 1 --plain`, which
traces nothing itself. `--device cpu` profiles torch's operations, to test this script.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megabase.models.attention.kernels.dispatch import GPU_BACKEND
from megabase.pipeline.bench.attention_task import AttentionTask
from megabase.pipeline.bench.model_task import ModelTask
from megabase.pipeline.bench.options import lengths_of


@dataclass(frozen=True)
class Spent:
    """A kernel's time and how often it ran, per call."""

    kernel: str
    ms: float
    times: float


def traced(call: Callable[[], object], calls: int, device: str) -> tuple[list[Spent], float]:
    """The kernels, the longest first, and milliseconds of a call without the profiler."""
    ms = timed(call, calls) if device == "cuda" else timeit.timeit(call, number=calls) * 1e3 / calls
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as tracer:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    where = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    spent = [
        Spent(event.key, microseconds / 1e3 / calls, event.count / calls)
        for event in tracer.key_averages()
        if event.device_type == where
        for microseconds in [event.self_device_time_total if device == "cuda" else event.self_cpu_time_total]
    ]
    return sorted(spent, key=lambda s: -s.ms), ms


def timed(call: Callable[[], object], calls: int) -> float:
    """Milliseconds of a call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def hosted(call: Callable[[], object], calls: int) -> None:
    """Print the Python functions in which the host spends most time. Tracing slows all of them down."""
    tracer = cProfile.Profile()
    with tracer:
        for _ in range(calls):
            call()
    pstats.Stats(tracer).sort_stats("tottime").print_stats(25)


def parse_options() -> argparse.Namespace:
    """Read the command line; it is an error if there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["attention", "model"])
    parser.add_argument("--lengths", default="64k")
    parser.add_argument("--contestant", default="ours", help="a name of megabase bench's")
    parser.add_argument("--backends", default="triton", help="of ours on a GPU, separated by commas")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--show", type=int, default=30)
    parser.add_argument("--host", action="store_true", help="also the time of the host, by function")
    parser.add_argument("--plain", action="store_true", help="only run, for another profiler")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def profiled(options: argparse.Namespace, length: int, backend: str) -> dict[str, object]:
    """Profile one backend at one length and print it: what `--json` says of it."""
    os.environ[GPU_BACKEND] = backend
    heads = options.dim // options.head_dim
    shared = {"heads": heads, "chunk": 128, "rounds": 4, "dtype": "bf16", "device": options.device}
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
        return {}
    spent, ms = traced(call, options.calls, options.device)
    busy = sum(s.ms for s in spent)
    print(
        f"\n{options.what} of {options.contestant}, backend {backend}, length {length:,}, {heads} heads of "
        f"{options.head_dim}\na call takes {ms:.3f} ms; its kernels {busy:.3f} ms in "
        f"{sum(s.times for s in spent):.0f} launches"
    )
    for s in spent[: options.show]:
        print(f"{s.ms:9.3f} ms {s.ms / busy:6.1%} {s.times:7.1f} ×  {s.kernel[:110]}", flush=True)
    if options.host:
        hosted(call, options.calls)
    return {"backend": backend, "length": length, "ms": ms, "kernels": [vars(s) for s in spent]}


def main() -> int:
    options = parse_options()
    found = [
        profiled(options, length, backend)
        for length in lengths_of("--lengths", options.lengths)
        for backend in options.backends.split(",")
    ]
    if options.device == "cuda":
        torch.cuda.synchronize()
    if options.json:
        described = {**vars(options), "json": str(options.json), "profiles": found}
        options.json.write_text(json.dumps(described, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
