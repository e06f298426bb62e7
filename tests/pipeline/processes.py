"""A function in several processes that are ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.ranks.supervisor import supervise


def run_ranks(ranks: int, main: Callable[..., None], *arguments: str) -> int:
    """Call `main`, a function of a module, in `ranks` processes; returns the exit code, 0 if all is well.

    They exit as the ranks of a training do, see `failure.exit_rank`.
    """
    program = (
        f"import sys, traceback; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from megabase.pipeline import log\n"
        "from megabase.pipeline.ranks.failure import exit_rank\n"
        f"from {main.__module__} import {main.__name__} as main\n"
        "log.set_up()\n"
        f"try: main(*{arguments!r})\n"
        "except BaseException: traceback.print_exc(); exit_rank(1)\n"
        "exit_rank(0)\n"
    )
    return supervise([sys.executable, "-c", program], ranks, StopRequest())
