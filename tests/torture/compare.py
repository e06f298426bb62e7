"""Comparison of a run with the undisturbed run, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.torture.rundir import Failed


def first_difference(reference: bytes, journal: bytes) -> str:
    """Where a journal differs from the undisturbed one."""
    theirs, ours = reference.splitlines(), journal.splitlines()
    for number, (one, other) in enumerate(zip(theirs, ours, strict=False), 1):
        if one != other:
            return (
                f"metrics.jsonl differs in line {number}:\n  undisturbed {one.decode(errors='replace')}"
                f"\n  tortured    {other.decode(errors='replace')}"
            )
    return f"metrics.jsonl has {len(ours)} lines, the undisturbed one {len(theirs)}"


def compare_checkpoints(one: Path, other: Path) -> tuple[int, int]:
    """Compare two checkpoints to the last bit; returns the number of their tensors, and of the bytes of these.

    Raises:
        Failed: a file, a tensor or a number is different or only in one of them.
    """
    from megabase.pipeline.zero.checkpoint_engine import load  # imported here because it imports torch

    names = [sorted(path.relative_to(root) for path in root.rglob("*.pt")) for root in (one, other)]
    if names[0] != names[1] or not names[0]:
        raise Failed(f"the checkpoints have different files: {names[0]} and {names[1]}")
    tensors = size = 0
    for name in names[0]:
        left, right = (dict(_leaves(load(root / name), name.name)) for root in (one, other))
        if left.keys() != right.keys():
            raise Failed(f"{name}: only in one of the runs: {sorted(left.keys() ^ right.keys())[:5]}")
        for place, value in left.items():
            if not _same(value, right[place]):
                raise Failed(f"{place} differs:\n  undisturbed {value}\n  tortured    {right[place]}")
            if hasattr(value, "nbytes"):
                tensors, size = tensors + 1, size + value.nbytes
    return tensors, size


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}/{index}")
    else:
        yield place, value


def _same(one: Any, other: Any) -> bool:
    """Equal to the last bit: NaN equals itself, zero does not equal minus zero."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        bits = [value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
        return torch.equal(*bits)
    if hasattr(one, "__dict__"):
        return type(one) is type(other) and vars(one) == vars(other)
    return bool(type(one) is type(other) and one == other)
