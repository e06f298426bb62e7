"""Choosing a checkpoint, among damaged ones of every kind."""

import errno
import json
from pathlib import Path

import pytest

from megabase.pipeline.checkpoint import damage as damage_module
from megabase.pipeline.checkpoint import publish
from megabase.pipeline.checkpoint.choose import choose_to_read, choose_to_resume, newest_intact
from megabase.pipeline.checkpoint.manifest import MANIFEST, seal_of
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.ranks.groups import Group
from tests.pipeline.checkpoints import publish_checkpoint, write_checkpoint


def test_the_newest_checkpoint_without_damage_is_chosen() -> None:
    """Damaged ones are passed over; an error for one that cannot be judged ends the search."""
    passed: list[tuple[str, str]] = []

    def pass_over(candidate: str, damage: str) -> None:
        passed.append((candidate, damage))

    def choose(damages: dict[str, str | None]) -> str | None:
        return newest_intact(damages, damages.__getitem__, pass_over)

    assert choose({"c": "torn", "b": None, "a": "never looked at"}) == "b" and passed == [("c", "torn")]
    assert choose({"b": "torn", "a": "short"}) is None and choose({}) is None

    def unreadable(_: str) -> None:
        raise OSError("stale")

    with pytest.raises(OSError, match="stale"):
        newest_intact(["b", "a"], unreadable, pass_over)


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
    ("damage", "message"),
    [
        (truncate, "has 1023 bytes instead of 1024"),
        (flip, "another checksum"),
        (remove_shard, "optim_states.pt is missing"),
        (remove_manifest, "megabase.json is missing"),
        (tear_manifest, "megabase.json cannot be read"),
        (escape, "outside its directory"),
        (add_shard, "zero_pp_rank_1_mp_rank_00_optim_states.pt exists, but megabase.json does not name it"),
    ],
)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_chosen(
    tmp_path: Path, ranks: Group, capsys: pytest.CaptureFixture[str], damage, message: str
) -> None:
    publish_checkpoint(tmp_path, 2, ranks)
    damage(publish_checkpoint(tmp_path, 4, ranks))
    chosen = choose_to_resume(tmp_path, ranks)
    assert chosen is not None and chosen[0] == tmp_path / "step-2" and chosen[1].step == 2
    warning = capsys.readouterr().err
    assert message in warning and "step-4" in warning
    assert (tmp_path / "step-4.broken").is_dir()


def test_partial_and_half_deleted_checkpoints_are_not_seen(tmp_path: Path, ranks: Group) -> None:
    publish.partial_directory(tmp_path, 9).mkdir()
    (tmp_path / "step-7.deleting").mkdir()
    assert choose_to_resume(tmp_path, ranks) is None


def test_without_an_intact_checkpoint_nothing_starts_at_step_0(tmp_path: Path, ranks: Group) -> None:
    truncate(publish_checkpoint(tmp_path, 2, ranks))
    for _ in range(2):  # the second time only the broken one is left
        with pytest.raises(UserError, match=r"no checkpoint in .* is intact \(step-2\.broken\)"):
            choose_to_resume(tmp_path, ranks)


def test_a_checkpoint_of_a_newer_version_stays_where_it_is(tmp_path: Path, ranks: Group) -> None:
    path = publish_checkpoint(tmp_path, 2, ranks)
    newer = json.loads((path / MANIFEST).read_text()) | {"version": 99, "unheard_of": 1}
    newer["seal"] = seal_of(newer)
    (path / MANIFEST).write_text(json.dumps(newer))
    with pytest.raises(UserError, match="update megabase"):
        choose_to_resume(tmp_path, ranks)
    assert path.is_dir()


def test_a_checkpoint_that_cannot_be_read_is_not_damaged(
    tmp_path: Path, ranks: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish_checkpoint(tmp_path, 2, ranks)

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(damage_module, "checksum", stale)
    with pytest.raises(RunError, match=r"rank 0: .*Stale file handle"):
        choose_to_resume(tmp_path, ranks)
    assert path.is_dir()


def test_a_reader_renames_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for step in (3, 5, 10):
        write_checkpoint(run / "checkpoints" / f"step-{step}")
    truncate(run / "checkpoints" / "step-10")
    assert choose_to_read(run, None).name == "step-5" and choose_to_read(run, 3).name == "step-3"
    assert "step-10 is broken" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"step-10 is broken .*: use --step 5, which is intact"):
        choose_to_read(run, 10)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-3", "step-5"]
