"""Attention layers, one module for each kind, and the branch that a block of the stack is built with."""

from megabase.models.attention.full import FullAttention, full_attention
from megabase.models.attention.heads import AttentionBranch, AttentionLayer
from megabase.models.attention.linformer import LinformerAttention, linformer_attention
from megabase.models.attention.local import LocalAttention, local_attention
from megabase.models.attention.lsh import LSHAttention, lsh_attention
from megabase.models.attention.performer import PerformerAttention, performer_attention
from megabase.models.config import ReformerConfig

__all__ = [
    "LSHAttention",
    "build_attention",
    "full_attention",
    "linformer_attention",
    "local_attention",
    "lsh_attention",
    "performer_attention",
]

KINDS: dict[str, type[AttentionLayer]] = {
    "local": LocalAttention,
    "lsh": LSHAttention,
    "full": FullAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
}
"""The layer of each name that `ReformerConfig.layers` may hold."""


def build_attention(config: ReformerConfig, layer: int) -> AttentionBranch:
    """F of block number `layer`, of the kind that the config's pattern has there."""
    attention = KINDS[config.pattern[layer]](config, layer)
    return AttentionBranch(config, layer, attention)
