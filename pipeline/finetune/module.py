"""The LightningModule of a fine-tuning: another model and another loss, all else as in pretraining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megabase.models.chance import Seeds
from megabase.models.reformer import Body
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.finetune.examples import Problem
from megabase.pipeline.finetune.model import FineTuned, Method
from megabase.pipeline.training.module import PretrainModule


class FinetuneModule(PretrainModule):
    """Trains a FineTuned model; see PretrainModule.

    Args:
        config: of the run.
        initial: puts the pretrained weights into the body of a FULL model at step 0.
        problem: what is to be predicted.
        method: how.
        body: the pretrained body, `prepared`; None for FULL. It is made before DeepSpeed shards what is built.
    """

    def __init__(
        self,
        config: RunConfig,
        initial: Callable[[Any], None] | None,
        problem: Problem,
        method: Method,
        body: Body | None,
    ) -> None:
        super().__init__(config, initial, log=False)
        self.problem, self.method = problem, method
        self._body = (body,)  # in a tuple, so that it is no submodule before the model is built

    def build(self) -> Any:
        """The model; the same head on every rank."""
        (body,) = self._body
        return FineTuned(Body(self.config.model) if body is None else body, self.problem, self.method)

    def micro_loss(self, batch: Any, seeds: Seeds) -> tuple[Tensor, Tensor | None]:
        """The sum of the losses of a micro batch."""
        model: Any = self.model
        total, _, _ = model.loss(model(batch.codes, batch.lengths, seeds), batch.labels)
        return total, None

    def validation_step(self, batch: Any, batch_index: int) -> dict[str, Tensor]:
        """Sums over the labels of a batch: loss, count, correct."""
        model: Any = self.model
        with torch.no_grad():
            outputs = model(batch.codes, batch.lengths, Seeds(run=self.config.run.seed))
            total, count, correct = model.loss(outputs, batch.labels)
        return {"loss": total, "count": count, "correct": correct}
