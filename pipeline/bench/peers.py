"""Adapters of the peers to the work that megabase's contestants do.

A package that is missing raises LeftOut with the command that installs it. The docstring of each adapter describes what
its call contains.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megabase.pipeline.bench.contest import LeftOut, Reason

TRANSFORMERS = "transformers.models.reformer.modeling_reformer"
REFORMER_PYTORCH = "reformer_pytorch"
PERFORMER_PYTORCH = "performer_pytorch"
MODULES = (TRANSFORMERS, REFORMER_PYTORCH, PERFORMER_PYTORCH)
PACKAGES = ("transformers", "reformer-pytorch", "performer-pytorch")

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

Forward = Callable[[], Tensor]


class AttentionSize(Protocol):
    """The size of an attention layer. chunk: positions in a chunk. rounds: of hashing."""

    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def rounds(self) -> int: ...


class ModelSize(Protocol):
    """The size of a model and its input. chunk: positions in a chunk. rounds: of hashing. length: tokens."""

    @property
    def dim(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def load(module: str) -> Any:
    """The module of a peer. Raises LeftOut with the command that installs it."""
    package = PACKAGES[MODULES.index(module)]
    try:
        version(package)
    except PackageNotFoundError:
        raise LeftOut(Reason(f"not installed (pip install {package})", for_good=True)) from None
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module(module)


# Attention: each returns the forward pass as a function of nothing, and the leaves that get gradients.


def sdpa(task: AttentionSize, draw: Callable[[], Tensor], kernel: str | None) -> tuple[Forward, list[Tensor]]:
    """torch's scaled_dot_product_attention, causal, of separate queries, keys and values. kernel None: any."""
    q, k, v = draw(), draw(), draw()

    def forward() -> Tensor:
        if kernel is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        try:
            with sdpa_kernel([SDPA_KERNELS[kernel]]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        except RuntimeError as error:
            if any(words in str(error) for words in ("No available kernel", "No viable backend")):
                raise LeftOut(Reason("torch has no such kernel here", for_good=True)) from None
            raise

    return forward, [q, k, v]


class _Given(nn.Module):
    """Replaces a projection and returns a given tensor."""

    def __init__(self, projected: Tensor) -> None:
        super().__init__()
        self.projected = projected

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projected


def transformers_lsh(
    task: AttentionSize, draw: Callable[[], Tensor], length: int
) -> tuple[Forward, list[Tensor]]:
    """LSHSelfAttention without its two projections: query-keys and values are given in their place, in the
    layer's own layout (batch, length, heads · d). Hashing, sorting, attention, merging of rounds, in training mode.
    The number of buckets is the layer's own choice (about 2 · length / chunk)."""
    module = load(TRANSFORMERS)
    needs_multiple(length, task.chunk)
    width = task.heads * task.head_dim
    layer = module.LSHSelfAttention(
        _reformer_config(task.chunk, task.rounds, task.heads, task.head_dim, length)
    )
    qk, v = (draw().view(1, length, width).detach().requires_grad_() for _ in range(2))
    layer.query_key, layer.value = _Given(qk), _Given(v)
    layer.to(qk.device).train()
    hidden = qk.detach()  # only its shape is used
    return (lambda: layer(hidden).hidden_states), [qk, v]


def reformer_pytorch_lsh(
    task: AttentionSize, draw: Callable[[], Tensor], length: int
) -> tuple[Forward, list[Tensor]]:
    """LSHAttention, which takes query-keys and values (batch · heads, length, d): hashing into length / chunk
    buckets, sorting, attention, merging of rounds, in training mode."""
    module = load(REFORMER_PYTORCH)
    needs_multiple(length, 2 * task.chunk)
    layer = module.LSHAttention(bucket_size=task.chunk, n_hashes=task.rounds, causal=True).train()
    qk, v = (draw().flatten(0, 1).detach().requires_grad_() for _ in range(2))
    return (lambda: layer(qk, v)[0]), [qk, v]


def performer_pytorch_fast(task: AttentionSize, draw: Callable[[], Tensor]) -> tuple[Forward, list[Tensor]]:
    """FastAttention, causal, with its default number of features (d · ln d); its CUDA extension where that is
    installed, else its own fallback in plain torch."""
    module = load(PERFORMER_PYTORCH)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it uses its fallback
        layer = module.FastAttention(dim_heads=task.head_dim, causal=True)
    q, k, v = draw(), draw(), draw()
    layer.to(q.device)
    return (lambda: layer(q, k, v)), [q, k, v]


def needs_multiple(length: int, step: int) -> None:
    """Raise LeftOut unless the length is a multiple of `step`."""
    if length % step:
        raise LeftOut(f"takes lengths that are multiples of {step}")


# Models: modules from tokens (1, length) to logits (1, length, vocab).


class _Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def transformers_model(task: ModelSize) -> nn.Module:
    """ReformerModelWithLMHead: local and LSH layers in turns, axial positions, feed-forward unchunked, no dropout."""
    module = load(TRANSFORMERS)
    needs_multiple(task.length, task.chunk)
    config = _reformer_config(task.chunk, task.rounds, task.heads, task.dim // task.heads, task.length)
    rows = 1 << (task.length.bit_length() // 2)
    needs_multiple(task.length, rows)
    config.attn_layers = [("local", "lsh")[i % 2] for i in range(task.depth)]
    config.num_hidden_layers = task.depth
    config.axial_pos_embds = True
    config.axial_pos_shape = (rows, task.length // rows)
    config.axial_pos_embds_dim = (task.dim // 4, task.dim - task.dim // 4)
    config.feed_forward_size = 4 * task.dim
    config.vocab_size = task.vocab_size
    config.hidden_dropout_prob = 0.0
    return _Logits(module.ReformerModelWithLMHead(config))


def reformer_pytorch_model(task: ModelSize) -> nn.Module:
    """ReformerLM: half of the heads local in every layer, rotary positions, feed-forward in FF_CHUNKS pieces."""
    module = load(REFORMER_PYTORCH)
    needs_multiple(task.length, 2 * task.chunk)
    return module.ReformerLM(
        num_tokens=task.vocab_size,
        dim=task.dim,
        depth=task.depth,
        max_seq_len=task.length,
        heads=task.heads,
        dim_head=task.dim // task.heads,
        bucket_size=task.chunk,
        n_hashes=task.rounds,
        causal=True,
        n_local_attn_heads=task.heads // 2,
        ff_chunks=FF_CHUNKS,
    )


FF_CHUNKS = 8
"""Pieces of ReformerLM's feed-forward: enough that its hidden layer does not decide the peak memory."""


def _reformer_config(chunk: int, rounds: int, heads: int, head_dim: int, length: int) -> Any:
    config = importlib.import_module("transformers").ReformerConfig()
    config.num_attention_heads, config.attention_head_size = heads, head_dim
    config.hidden_size = heads * head_dim
    config.num_hashes, config.num_buckets = rounds, None
    config.lsh_attn_chunk_length = config.local_attn_chunk_length = chunk
    config.lsh_attention_probs_dropout_prob = config.local_attention_probs_dropout_prob = 0.0
    config.is_decoder = True
    config.max_position_embeddings = length
    return config
