"""A training of two ranks in which only rank 1 gets signals to stop, at a chosen moment.

As `python stopping_worker.py MOMENT KEY=VALUE...` this process supervises; its ranks run the same file. MOMENT:
startup (while the model is built), checkpoint (while step-N.partial is there), evaluation (at its first batch).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabase.pipeline import cli
from megabase.pipeline.checkpoint import publish
from megabase.pipeline.inference import scoring
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.ranks.supervisor import supervise
from megabase.pipeline.training.module import PretrainModule


def signal_self() -> None:
    """Send three signals to this process at once, as SLURM may."""
    for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), signum)


def before(function: Callable[..., Any], action: Callable[..., None]) -> Callable[..., Any]:
    def both(*arguments: Any, **more: Any) -> Any:
        action(*arguments)
        return function(*arguments, **more)

    return both


def during_checkpoint(partial: Path, *_: Any) -> None:
    assert partial.name.endswith(".partial") and partial.is_dir()
    signal_self()


def during_evaluation(*arguments: Any, stop: Callable[[], bool], **more: Any) -> Any:
    calls = 0

    def stop_after_signals() -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            signal_self()
        answer: bool = stop()
        return answer

    return evaluate(*arguments, stop=stop_after_signals, **more)


evaluate = scoring.evaluate


def arrange(moment: str) -> None:
    if moment == "startup":
        PretrainModule.configure_model = before(PretrainModule.configure_model, lambda _: signal_self())
    elif moment == "checkpoint":
        publish.collect_files = before(publish.collect_files, during_checkpoint)
    elif moment == "evaluation":
        scoring.evaluate = during_evaluation


if __name__ == "__main__":
    moment, *settings = sys.argv[1:]
    if "RANK" not in os.environ:
        sys.exit(supervise([sys.executable, *sys.argv], 2, StopRequest().listen(), hint=str))
    if os.environ["RANK"] == "1":
        arrange(moment)
    sys.exit(cli.main(["train", *settings]))
