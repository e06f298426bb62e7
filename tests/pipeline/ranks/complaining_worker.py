"""One rank of test_distributed.py: it fails, and says why as a rank of a training does."""

from __future__ import annotations

import sys
import time

from megabase.pipeline.errors import UserError, rank_zero
from megabase.pipeline.ranks import launch as distributed


def main(who: str) -> None:
    """who: `all` ranks find the same thing wrong, rank 0 last; or rank `1` alone, while rank 0 goes on."""
    distributed.start()
    if who == "1" and rank_zero():
        time.sleep(60)
    if rank_zero():
        time.sleep(0.5)
    error = UserError(f"the disk of\n{who} is away")
    distributed.complain(error)
    distributed.complain(error)  # on its way up it is met again
    distributed.leave(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
