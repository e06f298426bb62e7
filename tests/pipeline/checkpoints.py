"""Checkpoints made by hand, for tests that need no training."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megabase.pipeline.checkpoint import publish
from megabase.pipeline.checkpoint.manifest import MANIFEST, Manifest, seal_of
from megabase.pipeline.ranks.groups import Group


def write_checkpoint(path: Path, name: str | None = None, **fields: object) -> Path:
    """An intact checkpoint in `path`, named step-N and then renamed to `name`. `fields`: of its manifest."""
    step = int(path.name.removeprefix("step-"))
    path = path.with_name(name or path.name)
    contents = {
        "latest": b"checkpoint",
        "checkpoint/mp_rank_00_model_states.pt": bytes(range(256)) * 3,
        "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt": bytes(range(256)) * step,
    }
    for file, content in contents.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(content)
    files = {
        file: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in contents.items()
    }
    manifest = Manifest(step, step * 8, 2, 2, "32", {"model.dim": 8}, "d", {"torch": "2"}, time.time(), files)
    (path / MANIFEST).write_text(sealed(asdict(manifest) | fields))
    return path


def sealed(content: dict[str, Any]) -> str:
    """A manifest's content as JSON, with a seal that fits."""
    return json.dumps(content | {"seal": seal_of(content)})


def publish_checkpoint(root: Path, step: int, ranks: Group, config: dict | None = None) -> Path:
    """Write and publish a small checkpoint in the directory `root`."""
    partial = publish.partial_directory(root, step)
    shard = partial / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(range(256)) * step)
    (partial / "latest").write_text("checkpoint")
    manifest = Manifest(step, step * 8, 1, 2, "32", config or {"model.dim": 8}, "d", {"torch": "2"})
    files = {path: publish.sync_and_measure(path) for path in (shard, partial / "latest")}
    publish.collect_files(partial, manifest, ranks, files)
    publish.publish(partial, manifest)
    return publish.published_directory(partial)
