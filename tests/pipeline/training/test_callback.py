"""What the callback does within an optimizer step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from megabase.pipeline.config.load import load
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.training.callback import TrainingCallback
from megabase.pipeline.training.module import PretrainModule
from megabase.pipeline.training.pretraining import Pretraining


def test_every_micro_batch_within_a_step_is_shown(ranks: Group) -> None:
    config = load([], ["run.name=x", "data.shards=s"])
    config.model.vocab_size = 9
    groups = cast(Any, SimpleNamespace(world=ranks))
    callback = TrainingCallback(Pretraining(config), groups, StopRequest(), None)
    shown: list[tuple[int, int, int]] = []
    callback._recorder = cast(Any, SimpleNamespace(within=lambda *figures: shown.append(figures)))
    callback.step = 5
    module = PretrainModule(config)
    trainer = cast(Any, SimpleNamespace(global_step=5, accumulate_grad_batches=3, should_stop=False))
    for number in range(2):
        module.micro_nats.append(torch.zeros(()))
        callback.on_train_batch_end(trainer, module, None, None, number)
    assert shown == [(6, 1, 3), (6, 2, 3)]


def test_a_callback_that_sets_should_stop_stops_the_run_as_a_stop_file_does(
    ranks: Group, tmp_path: Path
) -> None:
    config = load([], ["run.name=x", f"run.root={tmp_path}", "data.shards=s"])
    config.model.vocab_size = 9
    config.directory.mkdir()
    stop = StopRequest()
    groups = cast(Any, SimpleNamespace(world=ranks))
    callback = TrainingCallback(Pretraining(config), groups, stop, None)
    callback._recorder = None
    trainer = cast(Any, SimpleNamespace(global_step=0, should_stop=True))
    callback.on_train_batch_end(trainer, cast(Any, None), None, None, 0)
    assert not trainer.should_stop and stop.by_person and "should_stop" in stop.reason
    assert (config.directory / "STOP").exists()
