"""The parameters of a model by part, counted from shapes: no weight is allocated."""

from __future__ import annotations

from megabase.models.config import ReformerConfig
from megabase.models.pretrained import empty
from megabase.pipeline.readable import counted


def count_parameters(config: ReformerConfig) -> dict[str, int]:
    """Parameters of a Reformer by part, in the order in which a token meets them; a tied weight counts once.

    Args:
        config: of the model; `vocab_size` is set.
    """
    kinds = {kind: config.pattern.count(kind) for kind in dict.fromkeys(config.pattern)}
    parts = [
        "embedding",
        *(_attention(kind, number) for kind, number in kinds.items()),
        _FEEDFORWARD,
        "output",
    ]
    counts = dict.fromkeys(parts, 0)
    for name, parameter in empty(config).named_parameters():
        counts[_part(name, config, kinds)] += parameter.numel()
    return counts


_FEEDFORWARD = "feed-forward"


def _attention(kind: str, layers: int) -> str:
    return f"{kind} attention ({counted(layers, 'layer')})"


def _part(name: str, config: ReformerConfig, kinds: dict[str, int]) -> str:
    """The part that a parameter belongs to, by its name."""
    words = name.split(".")
    if words[1] == "stack":  # body.stack.blocks.NUMBER.BRANCH...
        kind = config.pattern[int(words[3])]
        return _attention(kind, kinds[kind]) if words[4] == "f" else _FEEDFORWARD
    return "embedding" if words[1] == "embedding" else "output"
