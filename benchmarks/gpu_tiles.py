"""The fastest tiles of the Triton kernels on this GPU: the time of each candidate, and the least time that its memory
traffic takes.

    python -m benchmarks.gpu_tiles [--passes hash] [--head-dims 64,128] [--lengths 16k] [--once] [--together]

A candidate is one `Tiles` for the forward or the backward pass at one width; the other pass keeps the table's. All are
compiled first, in parallel (compiling takes most of the time), then timed one after the other: the median of CUDA
events around whole passes of all rounds, without hashing and sorting. Prints the fastest, and the table's own choice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megabase.models.attention.kernels.inputs import Rule, SortedOrder
from megabase.models.attention.kernels.triton import host, tiles
from megabase.models.attention.kernels.triton.tiles import Tiles
from megabase.models.attention.lsh import draw_rotations
from megabase.models.config import LSHConfig, ReformerConfig
from megabase.pipeline.bench.options import lengths_of

ROUNDS, CHUNK, WIDTH = 4, 128, 1024
"""heads · d = WIDTH, batch 1."""
SMALL = 1024
"""Length at which candidates are compiled: the compiled code does not depend on it."""
BANDWIDTH = 3.35e12
"""Bytes a second, from the data sheet of an H100 SXM."""
PASSES = ("forward", "backward", "hash")


@dataclass(frozen=True)
class Candidate:
    """Tiles of one pass at one width, under one rule. together: all rounds in one launch."""

    which: str
    d: int
    once: bool
    together: bool
    tiles: Tiles

    def __str__(self) -> str:
        t = self.tiles
        limit = "" if t.registers is None else f", {t.registers} registers"
        return f"{t.own:3} × {t.other:<3} {t.warps} warps, {t.stages} stages{limit}"


def candidates(widths: list[int], once: bool, together: bool) -> Iterator[Candidate]:
    """All candidates, the table's own first."""
    shapes = [
        (64, 32, 4),
        (32, 32, 1),
        (32, 32, 2),
        (32, 32, 4),
        (32, 64, 2),
        (64, 32, 2),
        (64, 32, 8),
        (16, 32, 1),
    ]
    for d in widths:
        for own, warps, stages in itertools.product((64, 128, 256), (4, 8), (1, 2)):
            yield Candidate("hash", d, once, together, Tiles(own, 0, warps, stages))
    for which, d in itertools.product(("forward", "backward"), widths):
        table = tiles.FORWARD if which == "forward" else tiles.BACKWARD
        tried = [table[d]]
        for (own, other, warps), stages in itertools.product(shapes, (1, 2, 3)):
            for registers in (None, 128, 168) if (own, warps) == (64, 4) else (None, 128):
                tried.append(Tiles(own, other, warps, stages, registers))
        for sizes in dict.fromkeys(tried):
            yield Candidate(which, d, once, together, sizes)


class Problem:
    """Inputs of one width and length, with positions sorted by random buckets."""

    def __init__(self, d: int, length: int, once: bool, together: bool, made_for: int | None = None) -> None:
        """made_for: use the number of buckets of this length; None: of `length`."""
        self.together = together
        heads = WIDTH // d
        shape = (heads, length, d)
        generator = torch.Generator("cuda").manual_seed(length + d)
        self.q, self.v, self.grad = (
            torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        n_buckets = ReformerConfig(max_length=made_for or length, lsh=LSHConfig(chunk_length=CHUNK)).buckets
        buckets = torch.randint(
            n_buckets, (heads, ROUNDS, length), generator=generator, device="cuda", dtype=torch.int16
        )
        self.rotations = draw_rotations(
            heads, d, rounds=ROUNDS, n_buckets=n_buckets, seed=0, device=self.q.device
        )
        self.order = SortedOrder.by_bucket(buckets)
        self.rule = Rule(reach=CHUNK, attend="window", causal=True, once=once, own="never")
        for x in (self.q, self.v):
            x.requires_grad_()

    def forward(self) -> torch.Tensor:
        return host.sorted_attention(self.q, None, self.v, self.order, self.rule, together=self.together)

    def times(self, which: str, repeat: int) -> list[float]:
        """Milliseconds of `repeat` passes, after two for warming up."""
        spent = []
        for _ in range(repeat + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if which == "forward":
                with torch.no_grad():
                    start.record()
                    self.forward()
                    end.record()
            elif which == "hash":
                start.record()
                host.rotate_and_hash(self.q[None].detach(), self.rotations)
                end.record()
            else:
                out = self.forward()
                start.record()
                torch.autograd.grad(out, (self.q, self.v), self.grad)
                end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end))
        return spent[2:]

    def floor_ms(self, which: str) -> float:
        """The least time for the bytes that must cross the device's memory: see docs/kernels.md. If all rounds run
        together, the rounds after the first may find q, v and the gradient of out in the cache: not counted here."""
        slots, d = self.q.shape[0] * self.q.shape[1], self.q.shape[2]
        if which == "hash":
            each = 2 * d + 4 * ROUNDS
        elif which == "forward" and self.together:
            each = ROUNDS * (4 * d + 16 + 2 * 2 * d + 8) + 2 * d
        elif self.together:
            each = ROUNDS * (6 * d + 16 + 2 * 4 * d) + 4 * d + 4 * d
        elif which == "forward":
            each = ROUNDS * (4 * d + 16) + (ROUNDS - 1) * 2 * 4 * d + 2 * d
        else:
            each = ROUNDS * (6 * d + 16) + (ROUNDS - 1) * 2 * 8 * d + 4 * d + 4 * d
        return slots * each / BANDWIDTH * 1e3


def install(candidate: Candidate) -> None:
    """Make the kernels use the candidate's tiles, for every rule."""
    if candidate.which == "hash":
        tiles.HASH = candidate.tiles
        return
    table = tiles.FORWARD if candidate.which == "forward" else tiles.BACKWARD
    table[candidate.d] = candidate.tiles
    from megabase.models.attention.kernels.triton.launch import Launch

    Launch.tiles = _from_table  # type: ignore[method-assign, assignment]


def _from_table(launch: Any, table: dict[int, Tiles]) -> Tiles:
    """Replaces `Launch.tiles`: the table's tiles for every rule."""
    return table[max(launch.d, launch.d_v)]


def compile_one(candidate: Candidate, lengths: list[int]) -> str | None:
    """Run in a separate process to fill the compiler's cache. Returns the error, None if it compiled."""
    install(candidate)
    try:
        for length in lengths if candidate.which == "hash" else [SMALL]:
            Problem(candidate.d, SMALL, candidate.once, candidate.together, made_for=length).times(
                candidate.which, repeat=1
            )
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:120]
    return None


def compile_all(work: list[Candidate], lengths: list[int], seconds: float) -> dict[Candidate, str | None]:
    """The candidates that were compiled in time, each with its error or None."""
    until = time.monotonic() + seconds
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    done: dict[Candidate, str | None] = {}
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    running = {pool.submit(compile_one, candidate, lengths): candidate for candidate in work}
    try:
        for future in as_completed(running, timeout=max(0.0, until - time.monotonic())):
            done[running[future]] = future.result()
    except TimeoutError:
        print(f"{len(work) - len(done)} candidates were not compiled in {seconds:.0f} s")
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list((pool._processes or {}).values()):
        process.kill()
    return done


def parse_options() -> argparse.Namespace:
    """Read the command line; it is an error if there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--lengths", default="16k,64k")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--once", action="store_true", help="the rule `once` instead of `average`")
    parser.add_argument("--together", action="store_true", help="all rounds in one launch")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--compile-seconds", type=float, default=150.0)
    parser.add_argument("--show", type=int, default=8, help="print this many of the fastest of each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    return options


def main() -> int:
    options = parse_options()
    widths = [int(d) for d in options.head_dims.split(",")]
    lengths = lengths_of("--lengths", options.lengths)
    tables = {
        "forward": dict(tiles.FORWARD),
        "backward": dict(tiles.BACKWARD),
        "hash": dict.fromkeys(widths, tiles.HASH),
    }
    passes = options.passes.split(",")
    work = [c for c in candidates(widths, options.once, options.together) if c.which in passes]
    settings = f"rounds {ROUNDS}, chunk {CHUNK}, once {options.once}, together {options.together}"
    print(f"{torch.cuda.get_device_name()}: {len(work)} candidates, {settings}", flush=True)
    compiled = compile_all(work, lengths, options.compile_seconds)

    rows = []
    for which, d, length in itertools.product(passes, widths, lengths):
        problem = Problem(d, length, options.once, options.together)
        timed = []
        for candidate in (
            c for c in work if (c.which, c.d) == (which, d) and compiled.get(c, "late") is None
        ):
            tiles.FORWARD.update(tables["forward"])
            tiles.BACKWARD.update(tables["backward"])
            install(candidate)
            try:
                timed.append((statistics.median(problem.times(which, options.repeat)), candidate))
            except Exception as error:
                compiled[candidate] = f"{type(error).__name__}: {error}"[:120]
        timed.sort(key=lambda pair: pair[0])
        floor = problem.floor_ms(which)
        print(f"\n{which}, d = {d}, length {length:,}: floor of bytes {floor:.2f} ms", flush=True)
        own = tables[which][d]
        for place, (ms, candidate) in enumerate(timed):
            if place < options.show or candidate.tiles == own:
                mark = "  <- table" if candidate.tiles == own else ""
                print(
                    f"  {place + 1:3}. {ms:8.3f} ms  {ms / floor:5.2f} × floor  {candidate}{mark}", flush=True
                )
        rows += [
            {**asdict(c), "tiles": c.tiles._asdict(), "length": length, "ms": ms, "floor_ms": floor}
            for ms, c in timed
        ]
        if options.json:
            failed = {f"{c.which} {c.d} {c}": why for c, why in compiled.items() if why}
            described = {"device": torch.cuda.get_device_name(), "rows": rows, "failed": failed}
            options.json.write_text(json.dumps(described, indent=1) + "\n")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
