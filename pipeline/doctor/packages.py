"""Whether the installed packages are those that megabase was made for."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megabase
from megabase.pipeline.doctor.finding import Finding, note, ok, wrong
from megabase.pipeline.readable import counted

LOCK = "requirements.lock"
MOST_NAMED = 5


def installed(name: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(
    requirements: Sequence[str] | None = None, version_of: Callable[[str], str | None] = installed
) -> Finding:
    """Compare the installed packages with the ranges that megabase asks for.

    Args:
        requirements: as in `pyproject.toml`; None: those of the installed megabase, without its extras.
        version_of: the installed version of a package.
    """
    if requirements is None:
        requirements = metadata.requires("megabase") or []
    bad = []
    needed = [
        each
        for each in map(Requirement, requirements)
        if each.marker is None or each.marker.evaluate({"extra": ""})
    ]
    for requirement in needed:
        version = version_of(requirement.name)
        if version is None:
            bad.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if bad:
        return wrong("packages", _shortened(bad), "pip install megabase, in a new virtual environment")
    return ok(
        "packages", f"{counted(len(needed), 'package')} in their ranges, Python {platform.python_version()}"
    )


def check_lock(
    lock: Path | None = None, version_of: Callable[[str], str | None] = installed
) -> list[Finding]:
    """Compare the installed packages with `requirements.lock`, with which the tests ran.

    Args:
        lock: the file; None: that of the source tree, if megabase runs from one.
        version_of: the installed version of a package.

    Returns:
        Nothing if there is no such file: an installed megabase brings none along.
    """
    lock = Path(megabase.__file__).resolve().parents[1] / LOCK if lock is None else lock
    if not lock.exists():
        return []
    others, same = [], 0
    for line in lock.read_text().splitlines():
        name, _, locked = line.split("#")[0].split(";")[0].strip().partition("==")
        version = version_of(canonicalize_name(name)) if locked else None
        if version is None:  # not installed: it belongs to an extra, or `check_packages` names it
            continue
        if version.split("+")[0] == locked.split("+")[0]:
            same += 1
        else:
            others.append(f"{name} {version} instead of {locked}")
    if not others:
        return [ok("lock", f"{counted(same, 'package')} as the tests ran with")]
    return [note("lock", _shortened(others), f"{sys.executable} -m pip install -r {LOCK}")]


def _shortened(texts: Sequence[str]) -> str:
    more = len(texts) - MOST_NAMED
    return "; ".join(texts[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
