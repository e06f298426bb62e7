"""Numbers, sizes and times as people read them. Imports nothing, because every start of a command imports it."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number of things in words: "1 record", "2,000 records"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def readable_size(size: int) -> str:
    """A number of bytes for people, such as "1.5 GiB"."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} bytes"


def readable_time(seconds: float) -> str:
    """A span of time for people, such as "1.4 hours"."""
    for unit, name in ((365 * 86_400, "years"), (86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            count = seconds / unit
            return f"{count:,.0f} {name}" if count >= 10 else f"{count:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def age(seconds: float) -> str:
    """A time span for people, such as "3 d" or "59 min"."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"
