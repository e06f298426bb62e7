"""What a message about an interrupted run ends with."""

from pathlib import Path

from megabase.pipeline.rundir.hint import resume_hint


def test_the_hint_names_the_newest_published_checkpoint(tmp_path: Path) -> None:
    assert resume_hint(tmp_path) == "run it again to begin from step 0: it has no checkpoint yet"
    for name in ("step-9", "step-12", "step-20.partial", "step-15.broken", "step-007"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert resume_hint(tmp_path) == "run it again to resume from step 12"
