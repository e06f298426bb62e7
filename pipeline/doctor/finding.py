"""What a check found: a line of the table."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """A line of the table.

    Attributes:
        what: was checked.
        state: OK; NOTE: worth knowing, and not an error on every machine; WRONG: a training or a job will fail or be
            much slower than it could.
        text: what was found.
        way_out: what to do; empty if nothing.
    """

    what: str
    state: str
    text: str
    way_out: str = ""


def ok(what: str, text: str) -> Finding:
    """A check that found nothing to change."""
    return Finding(what, OK, text)


def note(what: str, text: str, way_out: str = "") -> Finding:
    """A check that found something that may be as it should be."""
    return Finding(what, NOTE, text, way_out)


def wrong(what: str, text: str, way_out: str) -> Finding:
    """A check that failed."""
    return Finding(what, WRONG, text, way_out)
