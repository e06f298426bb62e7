"""What to do after a run was interrupted: the end of messages about it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from megabase.pipeline.rundir.paths import RunPaths, newest_step


def resume_hint(directory: Path) -> str:
    """Say what the same command does with a run, by the names of its checkpoints: resume from a step, or begin."""
    step = None
    with suppress(OSError):
        step = newest_step(RunPaths(directory).checkpoints)
    if step is None:
        return "run it again to begin from step 0: it has no checkpoint yet"
    return f"run it again to resume from step {step}"
