"""The files of a run that MLflow gets as artifacts: small ones as they are, and of checkpoints where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megabase.pipeline.checkpoint.damage import checksum
from megabase.pipeline.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    list_checkpoints,
    read_manifest,
    step_of,
)
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.paths import RunPaths

# The artifact that lists the checkpoints.
CHECKPOINTS = "checkpoints.json"


class Files:
    """Sends the files of a run, again when they have changed.

    Args:
        directory: the run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = RunPaths(directory)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._checkpoints: dict[Path, dict[str, Any]] = {}

    def changed(self) -> list[Path]:
        """The files and directories that exist and were not sent as they are now."""
        return [path for path in self._all() if path.exists() and self._sent.get(path) != _version(path)]

    def send(self, client: Any, run_id: str) -> None:
        """Send what has changed."""
        for path in self.changed():
            version = _version(path)
            if path == self._paths.checkpoints:
                client.log_text(run_id, json.dumps(self._list_checkpoints(), indent=1), CHECKPOINTS)
            else:
                folder = path.parent.name if path.parent == self._paths.pictures else None
                client.log_artifact(run_id, str(path), folder)
            self._sent[path] = version

    def _all(self) -> Iterator[Path]:
        paths = self._paths
        yield from (paths.config, paths.environment, paths.packages, paths.submit_script)
        yield from (paths.init_from, paths.baselines, paths.loss_curve, paths.report)
        yield from sorted(paths.pictures.glob("*.png"))
        # Its time changes when a checkpoint is published or deleted, both by renaming.
        yield paths.checkpoints

    def _list_checkpoints(self) -> list[dict[str, Any]]:
        """Step, path, bytes and checksum of each checkpoint, the oldest first. A damaged one is left out."""
        before, self._checkpoints = self._checkpoints, {}
        for path in reversed(list_checkpoints(self._paths.checkpoints)):
            with suppress(Damaged, UserError, OSError):  # OSError: deleted in the meantime
                self._checkpoints[path] = before.get(path) or _describe(path)
        return list(self._checkpoints.values())


def _describe(checkpoint: Path) -> dict[str, Any]:
    """What MLflow is told about a checkpoint. The checksum is that of the manifest, which has those of all files."""
    return {
        "step": step_of(checkpoint),
        "path": str(checkpoint.absolute()),
        "bytes": read_manifest(checkpoint).size,
        "manifest_sha256": checksum(checkpoint / MANIFEST),
    }


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
