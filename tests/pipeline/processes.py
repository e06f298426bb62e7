"""A function in several processes that are ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megabase.pipeline.ranks.launch import supervise
from megabase.pipeline.ranks.stop import StopRequest


def run_ranks(ranks: int, main: Callable[..., None], *arguments: str) -> int:
    """Call `main`, a function of a module, in `ranks` processes; returns the exit code, 0 if all is well.

    They leave as the ranks of a training do: the interpreter's teardown may abort, see `distributed.leave`.
    """
    program = (
        f"import sys, traceback; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from megabase.pipeline import log\n"
        "from megabase.pipeline.ranks.launch import leave\n"
        f"from {main.__module__} import {main.__name__} as main\n"
        "log.set_up()\n"
        f"try: main(*{arguments!r})\n"
        "except BaseException: traceback.print_exc(); leave(1)\n"
        "leave(0)\n"
    )
    return supervise([sys.executable, "-c", program], ranks, StopRequest())
