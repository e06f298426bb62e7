"""What the callback does within an optimizer step."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from megabase.pipeline.config.load import load
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.training.callback import TrainingCallback
from megabase.pipeline.training.module import PretrainModule


def test_every_micro_batch_within_a_step_is_shown(ranks: Group) -> None:
    config = load([], ["run.name=x", "data.shards=s"])
    config.model.vocab_size = 9
    groups = cast(Any, SimpleNamespace(world=ranks))
    callback = TrainingCallback(config, cast(Any, None), groups, StopRequest(), None)
    shown: list[tuple[int, int, int]] = []
    callback._recorder = cast(Any, SimpleNamespace(within=lambda *figures: shown.append(figures)))
    callback.step = 5
    module = PretrainModule(config, 1)
    trainer = cast(Any, SimpleNamespace(global_step=5, accumulate_grad_batches=3))
    for number in range(2):
        module.micro_nats.append(torch.zeros(()))
        callback.on_train_batch_end(trainer, module, None, None, number)
    assert shown == [(6, 1, 3), (6, 2, 3)]
