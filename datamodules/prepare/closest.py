"""Finds the record that a user meant by a name that no record has."""

import difflib
from collections.abc import Sequence

_LISTED = 8
_COMPARED = 20_000  # difflib takes 10 microseconds a name


def hint(name: str, names: Sequence[str]) -> str:
    """What to add to "no record is named `name`": "; did you mean 'x'?", and the names, if they are few."""
    found = closest(name, names)
    meant = f"; did you mean {found!r}?" if found else ""
    if not names or ((len(names) > _LISTED or len(names) == 1) and found):
        return meant
    if len(names) > _LISTED:
        return f"; records have names such as {names[0]!r}"
    return f"{meant}{' The' if found else '; the'} records are {', '.join(names)}"


def closest(name: str, names: Sequence[str]) -> str:
    """The name that differs least: by case, by "chr" before it, by what is around it (NC_1 in ref|NC_1.2|), by letters.

    Returns:
        An element of `names`; empty if none is close.
    """
    wanted = name.casefold()
    same = {wanted, f"chr{wanted}", wanted.removeprefix("chr")}
    for like in (lambda other: other in same, lambda other: len(wanted) > 2 and wanted in other):
        if found := [other for other in names if like(other.casefold())]:
            return min(found, key=len)
    near = difflib.get_close_matches(name, names, 1) if len(names) <= _COMPARED else []
    return near[0] if near else ""
