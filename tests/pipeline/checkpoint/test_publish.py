"""Publishing a checkpoint by rename."""

import errno
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline.checkpoint import publish
from megabase.pipeline.checkpoint.damage import find_damage
from megabase.pipeline.checkpoint.manifest import Manifest, read_manifest
from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks.groups import Group
from tests.pipeline.checkpoints import publish_checkpoint


def test_a_published_checkpoint_is_intact_and_the_partial_directory_is_gone(
    tmp_path: Path, ranks: Group
) -> None:
    path = publish_checkpoint(tmp_path, 3, ranks)
    assert path == tmp_path / "step-3"
    assert find_damage(path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]
    assert sorted(read_manifest(path).files) == [
        "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "latest",
    ]


def test_publishing_over_a_checkpoint_keeps_the_old_one_aside(tmp_path: Path, ranks: Group) -> None:
    publish_checkpoint(tmp_path, 1, ranks)
    publish_checkpoint(tmp_path, 1, ranks)
    assert find_damage(tmp_path / "step-1") is None
    assert (tmp_path / "step-1.broken").is_dir()


def test_the_manifest_has_what_each_rank_wrote_and_the_error_of_one_rank_is_raised_on_all(
    tmp_path: Path,
) -> None:
    class Two:
        """Stands for a Group of two on rank 0; `other` is what rank 1 sends."""

        def __init__(self, other: Any) -> None:
            self.other = other

        def gather(self, value: Any) -> list[Any]:
            return [value, self.other]

    manifest = Manifest(1, 8, 2, 2, "32", {}, "d", {})
    own = {tmp_path / "checkpoint" / "a.pt": {"size": 1, "sha256": "a"}}
    other = {"checkpoint/b.pt": {"size": 2, "sha256": "b"}}
    publish.collect_files(tmp_path, manifest, Two((None, other)), own)  # type: ignore[arg-type]
    assert manifest.files == {"checkpoint/a.pt": {"size": 1, "sha256": "a"}, **other}

    full, away = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ESTALE, "Stale file handle")
    of_the_disk, gone, bug = (str(full), True, True), (str(away), False, True), ("not finite", False, False)
    cases: list[tuple[Any, Exception | None, type[Exception], bool]] = [
        (of_the_disk, None, publish.DiskFull, False),
        (of_the_disk, full, publish.DiskFull, False),
        (of_the_disk, KeyError("oops"), RunError, False),
        (gone, full, RunError, True),
        (bug, away, RunError, False),
    ]
    for other_failure, error, kind, temporary in cases:
        ranks: Any = Two((other_failure, {}))
        with pytest.raises(RunError, match="rank 1: ") as caught:
            publish.collect_files(tmp_path, manifest, ranks, {}, error)
        assert (type(caught.value), caught.value.temporary) == (kind, temporary)


def test_leftovers_of_killed_jobs_are_removed(tmp_path: Path, ranks: Group) -> None:
    published = publish_checkpoint(tmp_path, 1, ranks)
    publish.partial_directory(tmp_path, 9).mkdir()
    (tmp_path / "step-7.deleting").mkdir()
    publish.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [published]
