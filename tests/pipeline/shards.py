"""The weights and states of a checkpoint, for tests."""

from pathlib import Path

from megabase.pipeline.checkpoint.identity import saved_layout
from megabase.pipeline.checkpoint.manifest import read_manifest
from megabase.pipeline.zero.states import Shards


def open_shards(path: Path) -> Shards:
    """The weights and states of a checkpoint, laid out as its manifest says."""
    return Shards.open(path, saved_layout(read_manifest(path)))
