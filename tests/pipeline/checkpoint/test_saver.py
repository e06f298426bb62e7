"""The saver on one rank in a real process group: work in the background, and a disk that fills up meanwhile."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megabase.pipeline.checkpoint import publish
from megabase.pipeline.checkpoint.damage import find_damage
from megabase.pipeline.checkpoint.manifest import list_checkpoints, read_manifest
from megabase.pipeline.checkpoint.saver import Saver
from megabase.pipeline.config.load import load
from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks.agreement import Agreement
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.rundir.paths import METRICS
from megabase.pipeline.zero.checkpoint_engine import Storage


class Bench:
    """A saver whose states are one tensor, `weights`, written by the real storage."""

    def __init__(self, root: Path, ranks: Group, background: bool) -> None:
        settings = [
            f"run.root={root}",
            "run.name=run",
            f"checkpoint.background={background}",
            "checkpoint.keep=2",
        ]
        config = load([], [*settings, "data.shards=nowhere"])
        self.run = config.directory
        (self.run / "checkpoints").mkdir(parents=True)
        (self.run / METRICS).write_text('{"step": 1, "loss": 2.0}\n')
        self.weights = torch.arange(5.0)
        self.storage = Storage(background)
        self.saver = Saver(config, ranks, self.storage, data="data", alphabet="dna")
        self.trainer: Any = SimpleNamespace(
            save_checkpoint=self.write, lightning_module=torch.nn.Linear(2, 2)
        )

    def write(self, partial: Path, weights_only: bool) -> None:
        file = partial / "checkpoint" / "mp_rank_00_model_states.pt"
        self.storage.create(None)  # type: ignore[arg-type]
        self.storage.makedirs(str(file.parent), exist_ok=True)
        self.storage.save({"x": self.weights}, str(file))

    @property
    def steps(self) -> list[str]:
        return [path.name for path in list_checkpoints(self.run / "checkpoints")]


@pytest.fixture
def bench(tmp_path: Path, ranks: Group) -> Callable[[bool], Bench]:
    return lambda background: Bench(tmp_path, ranks, background)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within 10 s")


def test_training_continues_while_a_checkpoint_is_published(bench, monkeypatch) -> None:
    it = bench(True)
    gate, original = threading.Event(), publish.publish

    def held_up(*arguments: Any) -> None:
        gate.wait()
        original(*arguments)

    monkeypatch.setattr(publish, "publish", held_up)
    it.saver.begin(it.trainer, 3, must=False)
    wait_for(lambda: it.saver.progress == 1)
    assert it.saver.advanced == 0
    assert it.saver.advance() is None  # returns at once: the gate is closed
    assert (it.saver.advanced, it.saver.progress, it.steps) == (1, 1, [])
    gate.set()
    wait_for(lambda: it.saver.progress == 2)
    saved = it.saver.advance()
    assert saved.path == it.run / "checkpoints" / "step-3" and saved.held <= saved.seconds + 10
    assert (it.saver.pending, it.saver.progress, it.steps) == (None, 0, ["step-3"])
    assert read_manifest(saved.path).alphabet == "dna"
    assert set(read_manifest(saved.path).files) == {
        "checkpoint/mp_rank_00_model_states.pt",
        "latest",
        METRICS,
    }
    assert find_damage(saved.path) is None


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_when_a_checkpoint_is_published(bench, monkeypatch, capsys, background) -> None:
    """It is given up, its space is freed, and the next one is written. It is an error if the run ends with it."""
    it = bench(background)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(publish, "publish", full)
        it.saver.begin(it.trainer, 1, must=False)
        while it.saver.pending:
            assert it.saver.advance() is None
        assert "the checkpoint of step 1 is not written" in capsys.readouterr().err
        assert list((it.run / "checkpoints").iterdir()) == []
        it.saver.begin(it.trainer, 2, must=True)
        with pytest.raises(RunError, match=r"step 2 is not written: .*No space left"):
            while it.saver.pending:
                it.saver.advance()
    it.saver.begin(it.trainer, 3, must=False)
    while it.saver.pending:
        it.saver.advance()
    assert it.steps == ["step-3"]


@pytest.mark.parametrize("background", [False, True])
def test_states_that_are_not_finite_end_the_run_and_leave_the_checkpoints_before(bench, background) -> None:
    it = bench(background)
    it.saver.begin(it.trainer, 1, must=False)
    while it.saver.pending:
        it.saver.advance()
    it.weights[3] = math.nan
    it.saver.begin(it.trainer, 2, must=False)
    it.weights[3] = 0  # changes the original; the copy is written in the background
    with pytest.raises(
        RunError,
        match=r"step 2 is not written: rank 0: weights .* are not finite\. Earlier checkpoints are unchanged",
    ):
        while it.saver.pending:
            it.saver.advance()
    assert [path.name for path in (it.run / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("background", [False, True])
def test_a_bug_keeps_its_traceback(bench, monkeypatch, capsys, background) -> None:
    it = bench(background)
    monkeypatch.setattr(publish, "publish", lambda *_: {}["oops"])
    it.saver.begin(it.trainer, 1, must=False)
    with pytest.raises(RunError, match="KeyError: 'oops'"):
        while it.saver.pending:
            it.saver.advance()
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("background", [False, True])
def test_old_checkpoints_are_deleted_completely(bench, background) -> None:
    it = bench(background)
    for step in range(1, 6):
        it.saver.begin(it.trainer, step, must=step == 5)
        while it.saver.pending:
            it.saver.advance()
    assert it.steps == ["step-5", "step-4"]
    assert sorted(path.name for path in (it.run / "checkpoints").iterdir()) == ["step-4", "step-5"]


@pytest.mark.parametrize("progresses", [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]])
def test_agreed_progress_is_the_smallest_of_all_ranks(progresses: list[int]) -> None:
    """The messages of two ranks, added by hand."""
    messages: list[torch.Tensor] = []

    class Two:
        size = 2

        def sum_async(self, counters: torch.Tensor) -> Any:
            messages.append(counters)
            return SimpleNamespace(wait=lambda: None)

    ranks: Any = Two()
    first, second = Agreement(ranks), Agreement(ranks)
    for agreement, progress in zip((first, second), progresses, strict=True):
        agreement.exchange(1, stop=False, save=False, progress=progress, samples=0)
    messages[0] += messages[1]
    agreed = first.settle()
    assert agreed is not None and agreed.progress == min(progresses)
