"""The record of a run's data, `dataset.json` in the run directory: what was trained on, without the shards."""

from __future__ import annotations

from pathlib import Path

from megabase.datamodules.files import publish_json
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.pipeline.rundir.paths import RunPaths


def write_dataset(directory: Path, shards: str, index: ShardIndex) -> None:
    """Write `dataset.json`: where the shards are, the checksum of their index, and the records and bases of each split.

    Args:
        directory: the run directory.
        shards: `data.shards`.
        index: of the shards.

    Raises:
        OSError: the file cannot be written.
    """
    segments = index.segments
    splits = {
        split: {
            "records": len(set(segments.record[segments.rows_of(split)])),
            "bases": segments.letters_of(split),
        }
        for split in segments.splits()
    }
    about = {
        "shards": shards,
        "identity": segments.identity,
        "alphabet": index.alphabet.name,
        "splits": splits,
    }
    publish_json(RunPaths(directory).dataset, about, indent=1)
