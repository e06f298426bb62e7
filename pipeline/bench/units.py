"""Seconds and bytes as people read them."""

from __future__ import annotations


def seconds(value: float | None) -> str:
    """Seconds as s or ms, with three digits; empty for None."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1.0 else f"{value * 1e3:.3g} ms"


def memory(value: int | None) -> str:
    """Bytes as MiB, from 1 GiB on as GiB; empty for None."""
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
