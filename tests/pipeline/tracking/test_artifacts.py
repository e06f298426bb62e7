"""Which files of a run MLflow gets, and when."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.artifacts import Files
from tests.pipeline.checkpoints import write_checkpoint


class Client:
    """Keeps what it is sent: (artifact, content)."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    def log_artifact(self, _: str, path: str, folder: str | None) -> None:
        self.sent.append(
            (f"{folder}/{Path(path).name}" if folder else Path(path).name, Path(path).read_text())
        )

    def log_text(self, _: str, text: str, name: str) -> None:
        self.sent.append((name, text))


@pytest.fixture
def client() -> Client:
    return Client()


def test_a_file_is_sent_again_when_it_has_changed(tmp_path: Path, client: Client) -> None:
    paths, files = RunPaths(tmp_path), Files(tmp_path)
    assert files.changed() == []
    paths.pictures.mkdir()
    for path in (paths.loss_curve, paths.submit_script, paths.packages, paths.pictures / "memory.png"):
        path.write_text("one")
    files.send(client, "run")
    assert sorted(client.sent) == [
        ("loss.png", "one"),
        ("packages.txt", "one"),
        ("pictures/memory.png", "one"),
        ("submit.sbatch", "one"),
    ]
    client.sent.clear()
    files.send(client, "run")
    assert not client.sent and not files.changed()
    (paths.pictures / "memory.png").write_text("three")
    files.send(client, "run")
    assert client.sent == [("pictures/memory.png", "three")]


def test_the_list_of_checkpoints_follows_the_directory(tmp_path: Path, client: Client) -> None:
    checkpoints, files = RunPaths(tmp_path).checkpoints, Files(tmp_path)

    def listed() -> list[int]:
        # Whatever the resolution of the file system's clock.
        os.utime(checkpoints, ns=(0, len(client.sent)))
        files.send(client, "run")
        name, text = client.sent[-1]
        assert name == "checkpoints.json"
        return [entry["step"] for entry in json.loads(text)]

    for step in (5, 10):
        write_checkpoint(checkpoints / f"step-{step}")
    assert listed() == [5, 10]
    (entry, _) = json.loads(client.sent[-1][1])
    manifest = checkpoints / "step-5" / "megabase.json"
    assert entry["path"] == str(manifest.parent)
    assert entry["bytes"] == sum(each["size"] for each in json.loads(manifest.read_text())["files"].values())
    assert len(entry["manifest_sha256"]) == 64
    shutil.rmtree(checkpoints / "step-5")
    write_checkpoint(checkpoints / "step-15")
    (checkpoints / "step-15" / "megabase.json").write_text("{")
    assert listed() == [10]
