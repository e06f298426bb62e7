"""Checks of single values that the sections of the config share."""

from __future__ import annotations

from megabase.pipeline.errors import UserError


def require_positive(section: object, prefix: str, *names: str) -> None:
    """Raise UserError unless each of these numbers of a section is above zero or None."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise UserError(f"{prefix}.{name}={value}: must be above zero")


def require_not_negative(section: object, prefix: str, *names: str) -> None:
    """Raise UserError if one of these numbers of a section is below zero."""
    for name in names:
        if (value := getattr(section, name)) < 0:
            raise UserError(f"{prefix}.{name}={value}: must not be negative (0 switches it off)")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless the value of a key is one of the choices."""
    if value not in choices:
        raise UserError(f"{key}={value!r}: choose one of {', '.join(choices)}")
