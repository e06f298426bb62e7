"""`megabase bench attention`: one attention layer's core, forward and backward, causal, batch 1.

A call is the forward pass and the backward pass from a random gradient of the output to the gradients of all inputs,
which are random and lie there in the layout that the contestant takes. Hashing and sorting are part of it;
projections from and to the model's width are not, for anybody. Where ours and the peers differ in what they
do is said at each contestant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabase.models.attention import linformer_attention, local_attention, lsh_attention, performer_attention
from megabase.models.attention.performer_features import draw_directions
from megabase.models.config import LSHConfig, ReformerConfig
from megabase.pipeline.bench import contest, draw, peers, report
from megabase.pipeline.bench.contest import Budget, Entry
from megabase.pipeline.bench.lab import Call, open_lab
from megabase.pipeline.bench.options import DTYPES, device_of, lengths_of, names_of, positive

BACKENDS = ("reference", "chunked", "native", "triton")
FEATURES = 256
"""Of our Performer attention; also the slots of our Linformer attention."""


@dataclass(frozen=True)
class AttentionTask:
    """The work: everything but the contestant and the length. dtype: a key of DTYPES; device: cpu or cuda."""

    heads: int
    head_dim: int
    chunk: int
    rounds: int
    dtype: str
    device: str

    def prepare(self, name: str, size: int, seed: int) -> Call:
        """One call of a contestant at length `size`. Raises LeftOut."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal() -> Tensor:
            shape = (1, self.heads, size, self.head_dim)
            return torch.randn(shape, generator=generator, dtype=DTYPES[self.dtype], device=self.device)

        def leaf() -> Tensor:
            return normal().requires_grad_()

        forward, leaves = CONTESTANTS[name].build(self, leaf, size, seed)
        grad = normal()

        def call() -> None:
            out = forward()
            torch.autograd.backward(out, grad.view(out.shape), inputs=leaves)

        return call

    def tiny(self, name: str) -> Call:
        """A call at a few chunks."""
        return self.prepare(name, 4 * self.chunk, 0)


Build = Callable[[AttentionTask, Callable[[], Tensor], int, int], tuple[peers.Forward, list[Tensor]]]


@dataclass(frozen=True)
class Contestant:
    """build: (task, draws a leaf of shape (1, heads, length, d), length, seed) -> forward pass and leaves."""

    entry: Entry
    build: Build


def ours(backend: str) -> Build:
    """lsh_attention with its defaults (`window`, `average`), hashing into length / chunk buckets, as a model made for
    that length does. Query-keys and values (batch, heads, length, d)."""

    def build(
        task: AttentionTask, leaf: Callable[[], Tensor], length: int, seed: int
    ) -> tuple[peers.Forward, list[Tensor]]:
        qk, v = leaf(), leaf()
        buckets = ReformerConfig(max_length=length, lsh=LSHConfig(chunk_length=task.chunk)).buckets

        def forward() -> Tensor:
            return lsh_attention(
                qk,
                v,
                rounds=task.rounds,
                chunk_length=task.chunk,
                causal=True,
                seed=seed,
                n_buckets=buckets,
                backend=backend,
            )

        return forward, [qk, v]

    return build


def our_local(
    task: AttentionTask, leaf: Callable[[], Tensor], length: int, seed: int
) -> tuple[peers.Forward, list[Tensor]]:
    """local_attention over the last 2 · chunk positions: what a chunk and the one before reach at most."""
    q, k, v = leaf(), leaf(), leaf()
    return (lambda: local_attention(q, k, v, window=2 * task.chunk, causal=True)), [q, k, v]


def our_performer(
    task: AttentionTask, leaf: Callable[[], Tensor], length: int, seed: int
) -> tuple[peers.Forward, list[Tensor]]:
    """performer_attention, causal, with FEATURES features."""
    q, k, v = leaf(), leaf(), leaf()
    directions = draw_directions(task.heads, FEATURES, task.head_dim, seed, q.device)
    return (lambda: performer_attention(q, k, v, directions, causal=True)), [q, k, v]


def our_linformer(
    task: AttentionTask, leaf: Callable[[], Tensor], length: int, seed: int
) -> tuple[peers.Forward, list[Tensor]]:
    """linformer_attention with FEATURES slots and one matrix for keys and values, trained too. It cannot be causal."""
    q, k, v = leaf(), leaf(), leaf()
    slots = torch.randn(FEATURES, length, dtype=q.dtype, device=q.device) * length**-0.5
    slots.requires_grad_()
    return (lambda: linformer_attention(q, k, v, slots)), [q, k, v, slots]


def _contestants() -> list[Contestant]:
    exact = [
        Contestant(
            Entry(
                f"sdpa-{kernel}" if kernel else "sdpa", f"torch SDPA{f', {said}' if said else ''}", growth=2.0
            ),
            lambda task, leaf, length, seed, kernel=kernel: peers.sdpa(task, leaf, kernel),  # type: ignore[misc]
        )
        for kernel, said in ((None, ""), ("flash", "flash"), ("cudnn", "cuDNN"))
    ]
    return [
        Contestant(Entry(report.OURS, "megabase"), ours("auto")),
        *exact,
        Contestant(
            Entry("transformers", "transformers"),
            lambda task, leaf, length, seed: peers.transformers_lsh(task, leaf, length),
        ),
        Contestant(
            Entry("reformer-pytorch", "reformer-pytorch"),
            lambda task, leaf, length, seed: peers.reformer_pytorch_lsh(task, leaf, length),
        ),
        Contestant(
            Entry("performer-pytorch", "performer-pytorch"),
            lambda task, leaf, length, seed: peers.performer_pytorch_fast(task, leaf),
        ),
        *(Contestant(Entry(f"{report.OURS}-{name}", f"megabase, {name}"), ours(name)) for name in BACKENDS),
        Contestant(Entry(f"{report.OURS}-local", "megabase, local"), our_local),
        Contestant(Entry(f"{report.OURS}-performer", "megabase, Performer"), our_performer),
        Contestant(Entry(f"{report.OURS}-linformer", "megabase, Linformer (not causal)"), our_linformer),
    ]


CONTESTANTS = {contestant.entry.name: contestant for contestant in _contestants()}


def default_contestants(device: str) -> list[str]:
    """Ours and its peers; on a GPU both of torch's fast exact kernels."""
    exact = ["sdpa-flash", "sdpa-cudnn"] if device == "cuda" else ["sdpa"]
    return [report.OURS, *exact, "transformers", "reformer-pytorch", "performer-pytorch"]


@dataclass(frozen=True)
class AttentionOptions:
    """What was typed; None: the device's default."""

    lengths: str
    contestants: str | None
    dtype: str | None
    heads: int | None
    head_dim: int | None
    chunk: int | None
    rounds: int
    repeat: int
    seconds: float | None
    device: str
    json: Path | None
    picture: Path | None


def task_of(options: AttentionOptions) -> AttentionTask:
    """The work asked for: by default 4 heads of 64 and chunks of 64 in fp32 on a CPU, 8 of 128 and 128 in bf16 on a
    GPU. Raises UserError."""
    device = device_of(options.device)
    gpu = device == "cuda"
    task = AttentionTask(
        heads=options.heads if options.heads is not None else (8 if gpu else 4),
        head_dim=options.head_dim if options.head_dim is not None else (128 if gpu else 64),
        chunk=options.chunk if options.chunk is not None else (128 if gpu else 64),
        rounds=options.rounds,
        dtype=options.dtype or ("bf16" if gpu else "fp32"),
        device=device,
    )
    for name in ("heads", "head_dim", "chunk", "rounds"):
        positive(f"--{name.replace('_', '-')}", getattr(task, name))
    return task


def run(options: AttentionOptions) -> int:
    """Hold the contest; print the table, write what was asked for. Returns the exit code. Raises UserError."""
    task = task_of(options)
    lengths = lengths_of("--lengths", options.lengths)
    names = names_of("--contestants", options.contestants, CONTESTANTS, default_contestants(task.device))
    positive("--repeat", options.repeat)
    seconds = options.seconds if options.seconds is not None else (5.0 if task.device == "cuda" else 40.0)
    positive("--seconds", seconds)
    files = report.Files.of(options.json, options.picture)

    entries = [CONTESTANTS[name].entry for name in names]
    settings = {**asdict(task), "causal": True, "batch": 1, "seconds": seconds, "repeat": options.repeat}
    result = report.Result("attention", settings, {entry.name: entry.label for entry in entries})

    def after(points: Sequence[contest.Point]) -> None:
        result.add("length", points)
        report.say(points, result)
        files.write_json(result)

    contest.hold(entries, lengths, open_lab(task, task.device), Budget(seconds, options.repeat), after)
    report.attention_table(result)
    files.write_picture(result, draw.attention)
    return result.exit_code()
