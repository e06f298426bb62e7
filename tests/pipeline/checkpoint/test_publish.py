"""Publishing, verifying, choosing and keeping checkpoints; with damaged ones of every kind."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline.checkpoint import manifest
from megabase.pipeline.checkpoint import publish as checkpoint
from megabase.pipeline.checkpoint.manifest import seal_of
from megabase.pipeline.checkpoint.publish import MANIFEST, Manifest
from megabase.pipeline.config.load import load
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.ranks.groups import Group


def publish(root: Path, step: int, ranks: Group, config: dict | None = None) -> Path:
    partial = checkpoint.partial_directory(root, step)
    shard = partial / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(range(256)) * step)
    (partial / "latest").write_text("checkpoint")
    manifest = Manifest(step, step * 8, 1, 2, "32", config or {"model.dim": 8}, "d", {"torch": "2"})
    files = {path: checkpoint.synced(path) for path in (shard, partial / "latest")}
    checkpoint.describe(partial, manifest, ranks, files)
    checkpoint.seal(partial, manifest)
    return checkpoint.published(partial)


def test_a_published_checkpoint_is_whole_and_the_partial_is_gone(tmp_path: Path, ranks: Group) -> None:
    path = publish(tmp_path, 3, ranks)
    assert path == tmp_path / "step-3"
    assert checkpoint.verify(path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]
    assert sorted(checkpoint.read_manifest(path).files) == [
        "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "latest",
    ]


def truncate(path: Path) -> None:
    shard = next((path / "checkpoint").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])


def flip(path: Path) -> None:
    shard = next((path / "checkpoint").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def remove_shard(path: Path) -> None:
    next((path / "checkpoint").iterdir()).unlink()


def remove_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def tear_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40])


def escape(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../outside"] = {"size": 0, "sha256": "0" * 64}
    (path / MANIFEST).write_text(json.dumps(manifest))


def add_shard(path: Path) -> None:
    (path / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "has 1023 bytes instead of 1024"),
        (flip, "another checksum"),
        (remove_shard, "optim_states.pt is missing"),
        (remove_manifest, "megabase.json is missing"),
        (tear_manifest, "megabase.json cannot be read"),
        (escape, "outside its directory"),
        (add_shard, "zero_pp_rank_1_mp_rank_00_optim_states.pt is there, but megabase.json does not name it"),
    ],
)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_chosen(
    tmp_path: Path, ranks: Group, capsys: pytest.CaptureFixture[str], damage, says: str
) -> None:
    publish(tmp_path, 2, ranks)
    damage(publish(tmp_path, 4, ranks))
    chosen = checkpoint.choose(tmp_path, ranks)
    assert chosen is not None and chosen[0] == tmp_path / "step-2" and chosen[1].step == 2
    complaint = capsys.readouterr().err
    assert says in complaint and "step-4" in complaint
    assert (tmp_path / "step-4.broken").is_dir()


def test_half_written_ones_are_not_seen(tmp_path: Path, ranks: Group) -> None:
    checkpoint.partial_directory(tmp_path, 9).mkdir()
    (tmp_path / "step-7.deleting").mkdir()
    assert checkpoint.choose(tmp_path, ranks) is None
    checkpoint.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_publishing_over_a_checkpoint_keeps_the_old_one_aside(tmp_path: Path, ranks: Group) -> None:
    publish(tmp_path, 1, ranks)
    publish(tmp_path, 1, ranks)
    assert checkpoint.verify(tmp_path / "step-1") is None
    assert (tmp_path / "step-1.broken").is_dir()


def settings(*changes: str) -> Manifest:
    """What a checkpoint of a small run would say."""
    run = load([], ["run.name=x", "data.shards=s", *changes])
    return checkpoint.manifest_of(run, 5, 2, "these bases")


def test_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    then = settings()
    free = [
        "optim.lr=1",
        "data.micro_batch=4",
        "model.loss_chunk=8",
        "data.shards=moved",
        "trainer.max_steps=9",
        "zero.stage=3",
    ]
    checkpoint.check_same_run(then, settings(*free), tmp_path)
    refused = {
        "model.dim=128": r"model\.dim: checkpoint 256, config 128",
        "data.length=64": r"data\.length: checkpoint 8192, config 64",
        "trainer.precision=bf16": r"trainer\.precision: checkpoint 32, now bf16",
        "run.seed=2": r"run\.seed: checkpoint 1, config 2",
    }
    for change, message in refused.items():
        with pytest.raises(UserError, match=message):
            checkpoint.check_same_run(then, settings(change), tmp_path)
    with pytest.raises(UserError, match=r"data\.length: .*; model\.dim: "):
        checkpoint.check_same_run(then, settings("model.dim=128", "data.length=64"), tmp_path)
    with pytest.raises(UserError, match="holds other records or splits"):
        checkpoint.check_same_run(then, replace(settings(), data="others"), tmp_path)
    checkpoint.check_same_run(then, replace(settings(), ranks=4), tmp_path)


def test_a_setting_newer_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    then = settings()
    del then.config["model.conv"]
    checkpoint.check_same_run(then, settings(), tmp_path)
    with pytest.raises(UserError, match=r"model\.conv: checkpoint 4, config 0"):
        checkpoint.check_same_run(then, settings("model.conv=0"), tmp_path)


def test_a_mixture_of_genomes_belongs_to_the_run(tmp_path: Path) -> None:
    then = settings("data.mixture={ecoli.fna.gz: 3, 'human*': 1}")
    checkpoint.check_same_run(then, settings("data.mixture={ecoli.fna.gz: 3, 'human*': 1}"), tmp_path)
    with pytest.raises(UserError, match=r"data\.mixture\.ecoli\.fna\.gz: checkpoint 3\.0, config 2"):
        checkpoint.check_same_run(then, settings("data.mixture={ecoli.fna.gz: 2, 'human*': 1}"), tmp_path)
    with pytest.raises(UserError, match=r"data\.mixture"):
        checkpoint.check_same_run(then, settings(), tmp_path)
    with pytest.raises(UserError, match=r"data\.mixture"):
        checkpoint.check_same_run(settings(), then, tmp_path)


def test_when_none_is_whole_nothing_starts_from_zero(tmp_path: Path, ranks: Group) -> None:
    truncate(publish(tmp_path, 2, ranks))
    for _ in range(2):  # the second time only the broken one is left
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(step-2\.broken\)"):
            checkpoint.choose(tmp_path, ranks)


def test_a_checkpoint_of_a_newer_version_stays_where_it_is(tmp_path: Path, ranks: Group) -> None:
    path = publish(tmp_path, 2, ranks)
    newer = json.loads((path / MANIFEST).read_text()) | {"version": 99, "unheard_of": 1}
    newer["seal"] = seal_of(newer)
    (path / MANIFEST).write_text(json.dumps(newer))
    with pytest.raises(UserError, match="update megabase"):
        checkpoint.choose(tmp_path, ranks)
    assert path.is_dir()


def test_what_cannot_be_read_is_no_damage(
    tmp_path: Path, ranks: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(tmp_path, 2, ranks)

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(manifest, "checksum", stale)
    with pytest.raises(RunError, match=r"rank 0: .*Stale file handle"):
        checkpoint.choose(tmp_path, ranks)
    assert path.is_dir()


def test_the_manifest_has_what_each_rank_wrote_and_one_ranks_error_is_everyones(tmp_path: Path) -> None:
    class Two:
        """Stands for `Ranks` on rank 0; `other` is what rank 1 tells."""

        def __init__(self, other: Any) -> None:
            self.other = other

        def gather(self, value: Any) -> list[Any]:
            return [value, self.other]

    manifest = Manifest(1, 8, 2, 2, "32", {}, "d", {})
    mine = {tmp_path / "checkpoint" / "a.pt": {"size": 1, "sha256": "a"}}
    theirs = {"checkpoint/b.pt": {"size": 2, "sha256": "b"}}
    checkpoint.describe(tmp_path, manifest, Two((None, theirs)), mine)  # type: ignore[arg-type]
    assert manifest.files == {"checkpoint/a.pt": {"size": 1, "sha256": "a"}, **theirs}

    full, away = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ESTALE, "Stale file handle")
    of_the_disk, gone, ours = (str(full), True, True), (str(away), False, True), ("not finite", False, False)
    cases: list[tuple[Any, Exception | None, type[Exception], bool]] = [
        (of_the_disk, None, checkpoint.DiskFull, False),
        (of_the_disk, full, checkpoint.DiskFull, False),
        (of_the_disk, KeyError("oops"), RunError, False),
        (gone, full, RunError, True),
        (ours, away, RunError, False),
    ]
    for theirs_wrong, error, kind, temporary in cases:
        ranks: Any = Two((theirs_wrong, {}))
        with pytest.raises(RunError, match="rank 1: ") as caught:
            checkpoint.describe(tmp_path, manifest, ranks, {}, error)
        assert (type(caught.value), caught.value.temporary) == (kind, temporary)
