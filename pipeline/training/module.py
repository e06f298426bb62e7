"""The LightningModule around the Reformer: the loss of a global batch, the optimizer, the learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabase.datamodules.batches.collate import Wide
from megabase.models import Reformer
from megabase.models.chance import Seeds
from megabase.models.reversible import ReversibleStack
from megabase.pipeline.config.schema import OptimConfig, RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.training.guard import Guard, recent_rows, step_loss
from megabase.pipeline.zero.adamw import PlainAdamW
from megabase.pipeline.zero.parameters import full_shape

# A parameter and its name.
Named = tuple[str, nn.Parameter]


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
        # The same, of each of its micro batches.
        self.micro_nats: list[Tensor] = []
        # Likewise (2,) fp64: the weight of the labels and the skipped windows, where `step_targets` does not tell.
        self.step_scored: Tensor | None = None
        self.step_samples: list[int] = []
        self.step_targets = 0
        self.guard = Guard(config)
        self._totals: tuple[Tensor, Tensor | None] | None = None

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
        self.micro_nats.append(nats.detach())
        self.step_targets = batch.targets
        if self.config.data.uneven:
            scored = _scored(wide, batch.skipped)
            self.step_scored = scored if self.step_scored is None else self.step_scored + scored
        # Gradients are averaged over ranks, and Lightning divides the loss by the micro batches of a step.
        averaged = self.trainer.world_size * self.trainer.accumulate_grad_batches
        loss = nats * (averaged / max(batch.targets, 1))
        if self.guard.skips and self._step_is_whole():
            total, _ = step_loss(*self.totals(), self.step_targets)
            if self.guard.drops(total):
                loss = loss * math.nan  # which makes DeepSpeed drop the gradients of the step on every rank
        return loss

    def totals(self) -> tuple[Tensor, Tensor | None]:
        """Nats (fp32 scalar) and `step_scored` of the step over all ranks, on the device.

        The first call in a step is a collective one.
        """
        if self._totals is None:
            assert self.step_nats is not None
            # A copy: the only micro batch of a step is what `micro_nats` holds, too.
            self._totals = self.step_nats.float().clone(), self.step_scored
            if self.trainer.world_size > 1:
                for total in self._totals:
                    if total is not None:
                        dist.all_reduce(total)
        return self._totals

    def next_step(self) -> None:
        """Forget the step that is finished."""
        self.step_nats, self.step_scored, self._totals = None, None, None
        self.step_samples, self.micro_nats = [], []

    def on_train_start(self) -> None:
        """Where updates may be skipped, every rank judges by what the run's journal says."""
        if self.guard.skips:
            rows = recent_rows(self.config, self.global_step) if self.trainer.is_global_zero else []
            self.guard.resume(self.trainer.strategy.broadcast(rows))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Stage 0 in fp32: note the gradient norm before it is clipped, as DeepSpeed does in all other cases."""
        if isinstance(optimizer, PlainAdamW) and self._step_is_whole():
            optimizer.measure()

    def _step_is_whole(self) -> bool:
        return len(self.micro_nats) == self.trainer.accumulate_grad_batches

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
        decays = (optim.weight_decay, 0.0)
        groups = [
            {"params": [parameter for _, parameter in group], "weight_decay": decay}
            for group, decay in zip(self._parameter_groups(), decays, strict=True)
            if group
        ]
        # DeepSpeed wraps the optimizer in every case but this one.
        plain = self.config.zero.stage == 0 and precision_of(self.config.trainer.precision) == "32"
        kind = PlainAdamW if plain else torch.optim.AdamW
        adam = kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        if isinstance(adam, PlainAdamW):
            adam.drops = self.guard.skips
        return adam

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add `parameters`: names in the order of the optimizer's groups, which its states are numbered by."""
        checkpoint["parameters"] = [
            [name for name, _ in group] for group in self._parameter_groups() if group
        ]

    def _parameter_groups(self) -> tuple[list[Named], list[Named]]:
        """Trainable parameters with their names: matrices, and vectors."""
        matrices: list[Named] = []
        vectors: list[Named] = []
        for name, parameter in self.named_parameters():
            shape = full_shape(parameter)
            if parameter.requires_grad:
                (matrices if len(shape) >= 2 else vectors).append((name, parameter))
        return matrices, vectors

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
