"""The work of `megabase bench attention`, and the contestants that do it.

A call is the forward pass and the backward pass from a random gradient of the output to the gradients of all inputs.
The inputs are random and have the layout that the contestant takes. Hashing and sorting are part of the call;
projections from and to the model's width are not, for any contestant. Each contestant's docstring says what it does
differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megabase.models.attention import linformer_attention, local_attention, lsh_attention, performer_attention
from megabase.models.attention.performer_features import draw_directions
from megabase.models.config import LSHConfig, ReformerConfig
from megabase.pipeline.bench import peers
from megabase.pipeline.bench.contest import OURS, Call, Entry
from megabase.pipeline.bench.options import DTYPES

BACKENDS = ("reference", "chunked", "native", "triton", "triton-together")
FEATURES = 256
"""Number of features of our Performer attention, and of slots of our Linformer attention."""


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
        """A call at the length of four chunks."""
        return self.prepare(name, 4 * self.chunk, 0)


Build = Callable[[AttentionTask, Callable[[], Tensor], int, int], tuple[peers.Forward, list[Tensor]]]


@dataclass(frozen=True)
class Contestant:
    """build: (task, draws a leaf of shape (1, heads, length, d), length, seed) -> forward pass and leaves."""

    entry: Entry
    build: Build


def ours(backend: str) -> Build:
    """lsh_attention as a model made for that length calls it: its number of buckets, and no position attends to itself.
    Query-keys and values (batch, heads, length, d)."""

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
                own=False,
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
                f"sdpa-{kernel}" if kernel else "sdpa",
                f"torch SDPA{f', {label}' if label else ''}",
                growth=2.0,
            ),
            lambda task, leaf, length, seed, kernel=kernel: peers.sdpa(task, leaf, kernel),  # type: ignore[misc]
        )
        for kernel, label in ((None, ""), ("flash", "flash"), ("cudnn", "cuDNN"))
    ]
    return [
        Contestant(Entry(OURS, "megabase"), ours("auto")),
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
        *(Contestant(Entry(f"{OURS}-{name}", f"megabase, {name}"), ours(name)) for name in BACKENDS),
        Contestant(Entry(f"{OURS}-local", "megabase, local"), our_local),
        Contestant(Entry(f"{OURS}-performer", "megabase, Performer"), our_performer),
        Contestant(Entry(f"{OURS}-linformer", "megabase, Linformer (not causal)"), our_linformer),
    ]


CONTESTANTS = {contestant.entry.name: contestant for contestant in _contestants()}


def default_contestants(device: str) -> list[str]:
    """megabase and its peers; on a GPU two of torch's exact kernels, flash and cuDNN."""
    exact = ["sdpa-flash", "sdpa-cudnn"] if device == "cuda" else ["sdpa"]
    return [OURS, *exact, "transformers", "reformer-pytorch", "performer-pytorch"]
