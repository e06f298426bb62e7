"""One rank of test_failure.py: it fails, and reports why as a rank of a training does."""

from __future__ import annotations

import sys
import time

from megabase.pipeline.errors import UserError
from megabase.pipeline.ranks import rendezvous
from megabase.pipeline.ranks.environment import is_rank_zero
from megabase.pipeline.ranks.failure import exit_rank, report_failure


def main(failing: str) -> None:
    """Fail on `all` ranks with the same error, rank 0 last, or on rank `1` only, while rank 0 continues."""
    rendezvous.start()
    if failing == "1" and is_rank_zero():
        time.sleep(60)
    if is_rank_zero():
        time.sleep(0.5)
    error = UserError(f"the disk of\n{failing} is away")
    report_failure(error)
    report_failure(error)  # a second call, as by another function on the stack, prints nothing
    exit_rank(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
