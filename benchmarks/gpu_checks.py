"""Checks the kernels on this device: equal to `reference` in fp64, the same bits twice, exact reversible training.

    python -m benchmarks.gpu_checks [--device cuda] [--cases 40] [--backends triton-together] [--json FILE]

A plain script that needs nothing but torch (and triton on a GPU). Shapes, rules, masks and inputs are drawn anew
from the seed, which is the time of day unless given. Prints a table; exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.models import FeedForwardConfig, LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.models.attention import local_attention, lsh_attention
from megabase.models.attention.lsh import hash_buckets
from megabase.models.generation import read_block, start

BACKENDS = {"cuda": ("auto", "chunked", "triton", "triton-together"), "cpu": ("auto", "chunked", "native")}
PER_RULE = 3
"""Consecutive cases with one rule and width: a kernel is compiled for these, not for a shape."""
# ‖got − reference‖ / ‖reference‖: several times the rounding of the operands; a wrong key or sum gives far more.
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LENGTHS = (1, 2, 17, 64, 100, 129, 255, 384, 700)
# The least share of positions with the buckets of a CPU, in fp32: rounding decides between two equally near directions.
LEAST_EQUAL = 0.999


@dataclass
class Check:
    """The result of one check: how many figures it compared, the worst of them, and the failures."""

    name: str
    figures: int = 0
    worst: float = 0.0
    limit: float = 0.0
    failures: list[str] = field(default_factory=list)
    skipped: str | None = None

    def judge(self, figure: float, case: str) -> None:
        """Count a figure; it fails if it is above the limit or NaN."""
        self.figures += 1
        if not figure <= self.limit:
            self.failures.append(f"{case}: {figure:.3g}")
        self.worst = figure if figure != figure else max(self.worst, figure)

    @property
    def verdict(self) -> str:
        """The word in the table: ok, FAILED or skipped."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        return "FAILED" if self.failures or not self.figures else "ok"


@dataclass(frozen=True)
class Kernel:
    """A backend in a dtype on a device, to be checked with `cases` random cases, or for `seconds`."""

    backend: str
    dtype: torch.dtype
    device: str
    cases: int
    seconds: float
    seed: int


@dataclass
class Case:
    """Inputs and settings of a call of lsh_attention."""

    qk: Tensor
    v: Tensor
    grad: Tensor
    settings: dict[str, Any]

    def __str__(self) -> str:
        shown = {k: v for k, v in self.settings.items() if not isinstance(v, Tensor)}
        return f"{tuple(self.qk.shape)} {shown} mask={self.settings['mask'] is not None}"

    def results(self, backend: str, dtype: torch.dtype) -> list[Tensor]:
        """Output and both gradients."""
        qk, v = (x.to(dtype).requires_grad_() for x in (self.qk, self.v))
        out = lsh_attention(qk, v, backend=backend, **self.settings)
        return [out.detach(), *torch.autograd.grad(out, (qk, v), self.grad.to(out.dtype))]


def draw_rules(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Every rule that kernels are compiled for, in random order, endlessly, each with random rounds and width."""
    rules = list(itertools.product(("window", "chunk"), ("average", "once"), (True, False)))
    chance.shuffle(rules)
    for attend, duplicates, causal in itertools.cycle(rules):
        yield {
            "attend": attend,
            "duplicates": duplicates,
            "causal": causal,
            "rounds": chance.randint(1, 4),
            "d": chance.choice([16, 32, 64, 128]),
        }


def draw_case(chance: random.Random, rule: dict[str, Any], dtype: torch.dtype, device: str) -> Case:
    """A random shape, reach, mask and set of buckets under the rule, and fresh inputs of `dtype`."""
    settings = dict(rule)
    batch, heads, length, d = (
        chance.randint(1, 2),
        chance.randint(1, 3),
        chance.choice(LENGTHS),
        settings.pop("d"),
    )
    qk, v, grad = (torch.randn(batch, heads, length, d, device=device).to(dtype) for _ in range(3))
    n_buckets = chance.choice([1, 2, 4, 16])
    settings |= {
        "chunk_length": chance.choice([1, 16, 32, 64, 100, 128]),
        "seed": chance.getrandbits(31),
        "mask": torch.rand(batch, length, device=device) < 0.8 if chance.random() < 0.3 else None,
        "buckets": torch.randint(0, n_buckets, (batch, heads, settings["rounds"], length), device=device),
    }
    return Case(qk, v, grad, settings)


def relative(got: Tensor, expected: Tensor, least: float = 1.0) -> float:
    """‖got − expected‖ / max(‖expected‖, least) in fp64."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(least)).item()


def against_reference(kernel: Kernel) -> Check:
    """Forward and gradients against `reference` in fp64, and the same bits in a second call: all cases, or as many as
    the time allows, at least one."""
    backend, dtype, device = kernel.backend, kernel.dtype, kernel.device
    chance = random.Random(f"{kernel.seed} {backend} {dtype}")
    torch.manual_seed(chance.getrandbits(31))
    until = time.monotonic() + kernel.seconds
    check = Check(f"{backend} {short(dtype)}: equals reference, twice the same", limit=LIMITS[dtype])
    rules = draw_rules(chance)
    rule: dict[str, Any] = {}
    for number in range(kernel.cases):
        if check.figures and time.monotonic() > until:
            break
        rule = rule if number % PER_RULE else next(rules)
        case = draw_case(chance, rule, dtype, device)
        got = case.results(backend, dtype)
        expected = case.results("reference", torch.float64)
        # A gradient may cancel to zero. Then its rounding is that of the terms that cancel.
        of_grad = max(1.0, case.grad.double().norm().item())
        for name, a, b in zip(("out", "grad qk", "grad v"), got, expected, strict=True):
            check.judge(relative(a, b, 1.0 if name == "out" else of_grad), f"{name} {case}")
        if not all(map(torch.equal, got, case.results(backend, dtype))):
            check.failures.append(f"not the same bits twice: {case}")
    return check


def hashing(chance: random.Random, n: int, device: str) -> Check:
    """Buckets equal those of a CPU in fp32, apart from ties in rounding."""
    check = Check("hashing: the buckets of a CPU", limit=1 - LEAST_EQUAL)
    for _ in range(n):
        x = torch.randn(
            1, chance.randint(1, 3), chance.choice([100, 1000, 4096]), chance.choice([32, 64, 128])
        )
        settings = {
            "rounds": 2,
            "n_buckets": chance.choice([2, 64, 256, 1024]),
            "seed": chance.getrandbits(31),
        }
        here = hash_buckets(x.to(device), **settings).cpu()
        differ = (here.long() != hash_buckets(x, **settings).long()).double().mean().item()
        check.judge(differ, f"{tuple(x.shape)} {settings}")
    return check


def local(chance: random.Random, n: int, device: str) -> Check:
    """Local attention against dense attention with a window as mask, in fp64."""
    check = Check("local attention fp32: equals dense attention", limit=LIMITS[torch.float32])
    for _ in range(n):
        length, window, causal = chance.choice(LENGTHS), chance.choice([1, 16, 100]), chance.random() < 0.7
        q, k, v, grad = (torch.randn(1, 2, length, 64, device=device) for _ in range(4))
        apart = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        seen = (apart < window) & (apart >= 0 if causal else apart > -window)

        def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
            return scores.softmax(-1) @ v

        def ours(q: Tensor, k: Tensor, v: Tensor, window: int = window, causal: bool = causal) -> Tensor:
            return local_attention(q, k, v, window=window, causal=causal)

        got = gradients(ours, (q, k, v), grad)
        expected = gradients(dense, tuple(x.double() for x in (q, k, v)), grad.double())
        for a, b in zip(got, expected, strict=True):
            check.judge(relative(a, b), f"length {length} window {window} causal {causal}")
    return check


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Output and gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def reversible(chance: random.Random, device: str) -> Check:
    """Loss and gradients of a model trained reversibly and with ordinary autograd: equal to the last bit."""
    check = Check("reversible training: the bits of ordinary training")
    for dtype in (torch.float32, torch.bfloat16):
        for layers in (["local", "lsh"], ["lsh", "performer"]):
            config = ReformerConfig(
                vocab_size=9,
                dim=64,
                depth=6,
                heads=2,
                layers=layers,
                dropout=0.1,
                lsh=LSHConfig(
                    rounds=2, chunk_length=32, n_buckets=8, dropout=0.1 if dtype.itemsize == 4 else 0.0
                ),
                local=LocalConfig(window=32),
                feedforward=FeedForwardConfig(mult=2),
            )
            model = Reformer(config).to(device, dtype).train()
            x = torch.randint(5, 9, (2, 300), device=device)
            seeds = Seeds(chance.getrandbits(31), 5, torch.arange(2, device=device))
            rebuilt, kept = (loss_and_gradients(model, x, seeds, reverse) for reverse in (True, False))
            check.judge((rebuilt - kept).abs().max().item(), f"{short(dtype)} {layers}")
    return check


@torch.no_grad()
def reading(chance: random.Random, device: str) -> Check:
    """Log-probabilities of a sequence that is read in blocks, and from a fork: those of one pass, but for rounding.

    The median over tokens is judged: a few query-keys lie so close to a border that rounding moves them to another
    bucket.
    """
    check = Check("reading in blocks: one pass", limit=1e-4)
    layers = ["local", "lsh", "performer", "full"]
    config = ReformerConfig(
        vocab_size=9,
        dim=64,
        depth=4,
        heads=2,
        layers=layers,
        lsh=LSHConfig(rounds=2, chunk_length=32, n_buckets=16, duplicates="once"),
        local=LocalConfig(window=32),
    )
    model = Reformer(config).to(device).eval()
    x = torch.randint(5, 9, (2, 6000), device=device)
    seeds = Seeds(chance.getrandbits(31))
    expected = model(x, seeds=seeds).float().log_softmax(-1)[:, :-1].gather(2, x[:, 1:, None]).squeeze(2)
    sizes = [3000, 1, 2, 40, 957, 2000]
    state = start(model, 2, seeds=seeds)
    found = []
    for block in x.split(sizes, dim=1):
        found.append(read_block(model, block, state).log_probs)
        state = state.fork([0, 1])
    difference = (torch.cat(found, dim=1)[:, 1:] - expected).abs()
    for number, part in enumerate(difference.split([sizes[0] - 1, *sizes[1:]], dim=1)):
        check.judge(part.median().item(), f"block {number} of {sizes[number]}")
    return check


def loss_and_gradients(model: Reformer, x: Tensor, seeds: Seeds, reverse: bool) -> Tensor:
    """Loss and all gradients as one fp32 vector."""
    model.zero_grad()
    loss = model.head(model.body(x, seeds=seeds, reverse=reverse), x.roll(-1, 1))
    loss.backward()
    grads = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().float().flatten(), *grads])


def beyond_31_bits(device: str) -> Check:
    """More than 2^31 numbers in a tensor: the last head gives the same bits as if computed alone."""
    check = Check("2^31 numbers and more: the last head as alone")
    if device != "cuda":
        check.skipped = "needs a GPU"
        return check
    heads, length, d = 17, 1 << 20, 128
    qk, v, grad = (torch.randn(1, heads, length, d, device=device, dtype=torch.bfloat16) for _ in range(3))
    buckets = torch.randint(0, 4096, (1, heads, 1, length), device=device)
    settings = {"rounds": 1, "chunk_length": 128, "causal": True, "seed": 0, "mask": None}
    last = Case(qk[:, -1:], v[:, -1:], grad[:, -1:], {**settings, "buckets": buckets[:, -1:]})
    try:
        alone = last.results("auto", torch.bfloat16)
        together = Case(qk, v, grad, {**settings, "buckets": buckets}).results("auto", torch.bfloat16)
    except torch.OutOfMemoryError:
        check.skipped = "out of memory"
        return check
    for name, a, b in zip(("out", "grad qk", "grad v"), together, alone, strict=True):
        check.judge((a[:, -1:] - b).abs().max().item(), name)
    return check


def checks(
    device: str, cases: int, seed: int, seconds: float, backends: tuple[str, ...] | None
) -> Iterator[Check]:
    """Run all checks, in order; with `backends` only those against the reference, of these backends. On a GPU backends
    and dtypes are checked in parallel: most of the time is compiling."""
    kernels = [(backend, dtype) for backend in backends or BACKENDS[device] for dtype in LIMITS]
    workers = min(len(kernels), max(1, len(os.sched_getaffinity(0)) // 2)) if device == "cuda" else 1
    share = seconds / -(-len(kernels) // workers)
    work = [Kernel(backend, dtype, device, cases, share, seed) for backend, dtype in kernels]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(against_reference, kernel) for kernel in work]
        for kernel, future in zip(work, running, strict=True):
            yield guarded(f"{kernel.backend} {short(kernel.dtype)}", future.result)
    if backends:
        return
    chance = random.Random(seed)
    torch.manual_seed(seed)
    some = max(1, cases // 4)
    yield guarded("hashing", lambda: hashing(chance, some, device))
    yield guarded("local attention", lambda: local(chance, some, device))
    yield guarded("reversible training", lambda: reversible(chance, device))
    yield guarded("reading in blocks", lambda: reading(chance, device))
    yield guarded("2^31 numbers and more", lambda: beyond_31_bits(device))


def guarded(name: str, function: Callable[[], Check]) -> Check:
    """Run a check. If it raises, return a failed check with the error, so that the others still run."""
    try:
        return function()
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        return Check(name, failures=[f"{type(error).__name__}: {line}"[:300]])


def short(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cases", type=int, default=40, help="random cases for each kernel and dtype")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for all these cases together, compiling included"
    )
    parser.add_argument("--backends", help="only these against the reference, separated by commas")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    print(f"device {options.device}, seed {options.seed}")
    done: list[Check] = []
    backends = tuple(options.backends.split(",")) if options.backends else None
    for check in checks(options.device, options.cases, options.seed, options.seconds, backends):
        done.append(check)
        figures = (
            ""
            if check.skipped
            else f"worst {check.worst:.2e} (limit {check.limit:.0e}), {check.figures} figures"
        )
        print(f"{check.name:58} {check.verdict:8} {figures}", flush=True)
        for failure in check.failures[:3]:
            print(f"    {failure}", flush=True)
        if options.json:
            rows = [{**asdict(c), "verdict": c.verdict} for c in done]
            described = {"seed": options.seed, "device": options.device, "checks": rows}
            options.json.write_text(json.dumps(described, indent=1) + "\n")
    return int(any(check.failures or not (check.skipped or check.figures) for check in done))


if __name__ == "__main__":
    sys.exit(main())
