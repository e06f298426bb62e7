"""The torture test with five kills, in the phases that matter most; and tests of its parts."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megabase.pipeline.checkpoint.damage import find_damage
from tests.processes import Python
from tests.torture.__main__ import run
from tests.torture.compare import compare_checkpoints, first_difference
from tests.torture.damages import CHECKPOINT_DAMAGES, OTHER_DAMAGES
from tests.torture.job import Job
from tests.torture.plan import ALL, NEED_A_SMALL_DISK, PHASES, RANK, SUPERVISOR, Kill, plan
from tests.torture.rundir import Failed, damage_of
from tests.torture.torture import Options


class ForkedJob(Job):
    """A job as a fork that has imported the libraries already (tests/processes.py)."""

    def _start(self, command: Sequence[str], cwd: Path) -> int:
        self._python = Python(*command, cwd=cwd, output=self.log)
        return self._python.pid

    def poll(self) -> int | None:
        return self._python.poll()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_killed_five_times_ends_as_the_undisturbed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(Options(kills=5, seed=3, directory=tmp_path / "torture", chance=0.8, job=ForkedJob))
    output = capsys.readouterr().out
    assert code == 0, output
    assert "5 kills survived" in output and "metrics.jsonl identical" in output


def drawn(seed: int, kills: int) -> list[Kill]:
    return plan(seed, kills, 2, small_disk=True, chance=0.5)


def test_the_plan_follows_from_the_seed_and_has_every_phase_and_damage() -> None:
    assert drawn(7, 40) == drawn(7, 40) != drawn(8, 40)
    assert drawn(7, 40)[:10] == drawn(7, 10)
    assert {kill.phase for kill in drawn(7, len(PHASES))} == set(PHASES)
    assert {kill.target for kill in drawn(7, 40)} == {ALL, SUPERVISOR, f"{RANK} 0", f"{RANK} 1"}
    assert {name for kill in drawn(7, 100) for name in kill.damages} >= CHECKPOINT_DAMAGES.keys()


def test_without_a_small_disk_no_disk_is_filled() -> None:
    kills = plan(7, 40, 2, small_disk=False, chance=1.0)
    assert not {kill.phase for kill in kills} & set(NEED_A_SMALL_DISK)


def make_checkpoint(path: Path) -> Path:
    """A checkpoint of one shard with a manifest that fits its files."""
    (path / "checkpoint").mkdir(parents=True)
    state = {"weight": torch.arange(6, dtype=torch.float32), "step": 3, "betas": (0.9, 0.95)}
    torch.save(state, path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (path / "latest").write_text("checkpoint")
    files = {
        str(file.relative_to(path)): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.rglob("*")
        if file.is_file()
    }
    manifest = {
        "version": 1,
        "step": 3,
        "samples": 12,
        "ranks": 1,
        "stage": 2,
        "precision": "32",
        "config": {},
        "data": "d",
        "versions": {},
        "created": 1.0,
        "files": files,
    }
    (path / "megabase.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize("name", [name for name in CHECKPOINT_DAMAGES if name != "manifest flipped"])
def test_every_damage_to_a_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path / "step-3")
    assert damage_of(path) is None
    CHECKPOINT_DAMAGES[name](path, random.Random(1))
    assert damage_of(path) is not None and find_damage(path) is not None


def test_only_rows_after_the_newest_checkpoint_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.9}, {"step": 2, "valid_loss": 1.8}]
    rows += [{"step": step, "loss": 1.7} for step in (3, 4, 5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    left = set()
    for seed in range(20):
        (tmp_path / "metrics.jsonl").write_text(text)
        OTHER_DAMAGES["journal's tail lost"](tmp_path, random.Random(seed))
        now = (tmp_path / "metrics.jsonl").read_text()
        assert text.startswith(now)
        left.add(now.count("\n"))
    assert left == {3, 4, 5, 6}


def test_the_comparison_sees_one_bit(tmp_path: Path) -> None:
    one, other = make_checkpoint(tmp_path / "one"), make_checkpoint(tmp_path / "other")
    assert compare_checkpoints(one, other) == (1, 24)
    shard = other / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(shard, weights_only=True)
    state["weight"][0] = -0.0  # equal to 0.0, but for a bit
    torch.save(state, shard)
    with pytest.raises(Failed, match="weight differs"):
        compare_checkpoints(one, other)
    torch.save(state | {"more": 1}, shard)
    with pytest.raises(Failed, match="only in one"):
        compare_checkpoints(one, other)


def test_the_first_difference_of_two_journals_is_shown() -> None:
    found = first_difference(b'{"step": 1}\n{"step": 2}\n', b'{"step": 1}\n{"step": 3}\n')
    assert "line 2" in found and '{"step": 3}' in found
    assert "1 lines, the undisturbed one 2" in first_difference(b"a\nb\n", b"a\n")
