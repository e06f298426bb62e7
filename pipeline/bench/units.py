"""Seconds and bytes as people read them."""

from __future__ import annotations


def seconds(value: float | None) -> str:
    """Three digits, in s or ms."""
    if value is None:
        return ""
    return (
        f"{value:.3g} s"
        if 1.0 <= value < 1000
        else f"{value:,.0f} s"
        if value >= 1000
        else f"{value * 1e3:.3g} ms"
    )


def memory(value: int | None) -> str:
    """MiB, or GiB from there on."""
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
