"""The LightningModule around the Reformer: the loss of a global batch, the optimizer, the learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from datamodules.collate import Wide
from models import Reformer
from models.chance import Seeds
from models.reversible import ReversibleStack
from pipeline.config import OptimConfig, RunConfig
from pipeline.errors import UserError


class PretrainModule(pl.LightningModule):
    """Pretraining of `config.model` on the next base or on masked ones, as `data.objective` says.

    The loss that is differentiated is the sum of nats over the scored bases of the micro batch, divided by the
    number of scored bases in the whole global batch: every real base weighs the same, whatever rank, micro batch
    or run of N it falls into. Where letters weigh differently (`data.softmask_weight`), or windows that cannot be read
    are skipped, the divisor stays that number: the index knows it, so no rank must ask another.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.model: Reformer | None = None
        # Of the optimizer step under way, on the device: nats of this rank so far. Read by `loop.Boundary`.
        self.step_nats: Tensor | None = None
        # Likewise (2,) fp64: the weight of the labels and the skipped windows, where `step_targets` does not tell.
        self.step_scored: Tensor | None = None
        self.step_samples: list[int] = []
        self.step_targets = 0

    def configure_model(self) -> None:
        """Build the Reformer, sharded from the start under ZeRO stage 3; the same weights on every rank."""
        if self.model is None:
            torch.manual_seed(self.config.run.seed)
            self.model = Reformer(self.config.model)
            refuse_shared_blocks(self.model, self.config.zero.stage)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the samples while they are on the host: reading them later would wait for the device."""
        if self.trainer.training:
            self.step_samples += batch.samples.tolist()
        return batch

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Loss of one micro batch as described above; fp32 scalar, nats per scored base of the global batch."""
        assert self.model is not None
        seeds = Seeds(run=self.config.run.seed, step=self.global_step, samples=batch.samples)
        wide = batch.widened()
        nats = self.model.loss(wide.tokens, wide.labels, weights=wide.weights, seeds=seeds)
        self.step_nats = nats.detach() if self.step_nats is None else self.step_nats + nats.detach()
        self.step_targets = batch.targets
        if self.config.data.uneven:
            scored = _scored(wide, batch.skipped)
            self.step_scored = scored if self.step_scored is None else self.step_scored + scored
        # Gradients are averaged over ranks, and Lightning divides the loss by the micro batches of a step.
        averaged = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return nats * (averaged / max(batch.targets, 1))

    def validation_step(self, batch: Any, batch_index: int) -> dict[str, Tensor]:
        """Of one batch of windows: sum of `nats`, number of scored `bases`, and of `skipped` windows."""
        assert self.model is not None
        wide = batch.widened()
        nats = self.model.loss(wide.tokens, wide.labels, seeds=Seeds(run=self.config.run.seed))
        bases, skipped = _scored(wide._replace(weights=None), batch.skipped)
        return {"nats": nats, "bases": bases, "skipped": skipped}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices only (norms, biases and scales are vectors)."""
        optim = self.config.optim
        parameters = [p for p in self.parameters() if p.requires_grad]
        # Under ZeRO stage 3 a parameter is an empty placeholder here; its real shape is kept beside it.
        shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]
        groups = [
            {
                "params": [p for p, s in zip(parameters, shapes, strict=True) if len(s) >= 2],
                "weight_decay": optim.weight_decay,
            },
            {
                "params": [p for p, s in zip(parameters, shapes, strict=True) if len(s) < 2],
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Set the learning rate of the step: a function of its number, so there is no schedule to restore."""
        rate = learning_rate(self.global_step, self.config.optim, self.config.trainer.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate


def _scored(wide: Wide, skipped: int) -> Tensor:
    """(2,) fp64 on the device of the batch: sum of its labels' weights, and `skipped`. Waits for nothing."""
    labelled = wide.labels != -100
    weight = labelled.sum() if wide.weights is None else wide.weights.double().where(labelled, 0.0).sum()
    return torch.stack([weight.double(), torch.full_like(weight, skipped, dtype=torch.float64)])


def refuse_shared_blocks(model: nn.Module, stage: int) -> None:
    """Raise UserError if two blocks of a reversible stack use one parameter and ZeRO cannot handle that.

    Stage 2 reduces a gradient when it comes for the first time in a backward pass and stops at the second;
    stage 3 silently keeps one of them.
    """
    if stage < 2:
        return
    for stack in (module for module in model.modules() if isinstance(module, ReversibleStack)):
        users: dict[int, int] = {}
        for depth, block in enumerate(stack.blocks):
            for name, parameter in block.named_parameters():
                first = users.setdefault(id(parameter), depth)
                if first != depth:
                    raise UserError(
                        f"blocks {first} and {depth} share the parameter {name}, which zero.stage={stage} cannot"
                        " train: give each block its own, or set zero.stage=1"
                    )


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Learning rate of the optimizer step with number `step` (from 0): linear warm-up, then a cosine.

    The cosine falls from `optim.lr` to `optim.min_lr * optim.lr` at `max_steps`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(max_steps - optim.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.lr * (optim.min_lr + (1 - optim.min_lr) * cosine)
