"""What a sequence looks like to a pretrained model: the token before it, padding after it, the longest that fits."""

from __future__ import annotations

from dataclasses import dataclass

from megabase.models.config import ReformerConfig

TABLES = ("axial", "learned")


@dataclass(frozen=True)
class Layout:
    """The tokens of a sequence.

    Attributes:
        before: tokens before the first letter: BOS for a causal model, as in its training; none for one that sees both
            sides.
        strict: what a position computes depends on nothing later, so padding at the end changes nothing.
        length: tokens of the longest batch.
    """

    before: int
    strict: bool
    length: int


def layout_of(model: ReformerConfig, longest: int) -> Layout:
    """The layout for sequences of up to `longest` letters."""
    before = 1 if model.causal else 0
    strict = model.causal and "chunk" not in (model.lsh.attend, model.local.attend)
    length = model.max_length if "linformer" in model.layers else longest + before
    assert length is not None
    return Layout(before, strict, length)


def most_letters(model: ReformerConfig) -> int | None:
    """The longest sequence that a model can read; None: there is no limit."""
    if model.max_length is None or not (model.positions in TABLES or "linformer" in model.layers):
        return None
    return model.max_length - (1 if model.causal else 0)
