"""leakage.json beside the index: how many of the sampled 31-mers of each held-out split also occur in training."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megabase.datamodules.files import publish_json
from megabase.datamodules.index.store import Store, StoreError

LEAKAGE_NAME = "leakage.json"
WARN_SHARE = 0.2
"""A larger share is warned about: what two genomes share that are 95 % identical, about the border of a species
(0.95^31)."""


@dataclass(frozen=True)
class Leakage:
    """Of one split that is held out.

    Attributes:
        split: its name.
        kmers: sampled 31-mers, each once.
        in_training: how many of them occur in training.
    """

    split: str
    kmers: int
    in_training: int

    @property
    def share(self) -> float:
        """Fraction of the split's 31-mers that occur in training; 0 without any."""
        return self.in_training / self.kmers if self.kmers else 0.0


def write_leakage(folder: Path, leaks: Sequence[Leakage]) -> None:
    """Write the file, or remove an older one if nothing is held out. Raises OSError."""
    path = folder / LEAKAGE_NAME
    if leaks:
        publish_json(path, [asdict(leak) for leak in leaks])
    else:
        path.unlink(missing_ok=True)


def read_leakage(store: Store) -> list[Leakage]:
    """What the file says; nothing if it is not there or not readable: the shards can be used without."""
    try:
        return [Leakage(**entry) for entry in json.loads(store.read_whole(LEAKAGE_NAME))]
    except (FileNotFoundError, StoreError, TypeError, ValueError):
        return []
