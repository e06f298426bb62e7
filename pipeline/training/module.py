"""The LightningModule around the Reformer: the loss of a global batch, the optimizer, the learning rate.

Its losses stay on the device; `callback.py` reads them when it writes the journal. Under a Trainer of the user's own,
without that callback, the module logs them as Lightning modules do (docs/lightning.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.config import accumulation
from megabase.models import Reformer
from megabase.models.chance import Seeds
from megabase.models.reversible import ReversibleStack
from megabase.models.sequence import Part
from megabase.pipeline.config.schema import OptimConfig, RunConfig
from megabase.pipeline.config.trainer import HOST
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.inference.scoring import score_batch, scored
from megabase.pipeline.training.guard import Guard, recent_rows, step_loss
from megabase.pipeline.zero.adamw import PlainAdamW
from megabase.pipeline.zero.construction import gather_whole_branches
from megabase.pipeline.zero.parameters import full_shape

# A parameter and its name.
Named = tuple[str, nn.Parameter]


class PretrainModule(pl.LightningModule):
    """Pretraining of `config.model` on the next base or on masked ones, as `data.objective` says.

    The differentiated loss is the sum of nats over the scored bases of the micro batch, divided by the number of scored
    bases in the whole global batch: every base has the same weight, whatever its rank, micro batch or window. The
    divisor comes from the index, so ranks need not exchange it. It stays the same if letters have other weights
    (`data.softmask_weight`) or windows that cannot be read are skipped.

    Args:
        config: of the run; `model.vocab_size` is set.
        initial: puts the weights of step 0 into the model that was built, on every rank; None: they are random.
        part: the part of every window that this rank holds; None: all of it.
        log: log train/loss at each step, and valid/loss and valid/bits_per_base at each validation, for the loggers
            and callbacks of a Trainer; `guard.*` then has no effect. False where `TrainingCallback` records the run.

    Attributes:
        step_nats: sum of nats of this rank in the optimizer step under way; fp32 scalar on the device.
        micro_nats: the same for each micro batch of the step.
        step_scored: (2,) fp64 on the device, the weight of this rank's labels and the number of its skipped windows;
            None if every label weighs 1 and no window is skipped: then `step_targets` is that weight.
        step_samples: ids of the windows that this rank has trained on in the step.
        step_targets: number of labels in the global batch.
        guard: judges the numbers of each step.
    """

    def __init__(
        self,
        config: RunConfig,
        initial: Callable[[Reformer], None] | None = None,
        *,
        part: Part | None = None,
        log: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.model: Reformer | None = None
        self.step_nats: Tensor | None = None
        self.micro_nats: list[Tensor] = []
        self.step_scored: Tensor | None = None
        self.step_samples: list[int] = []
        self.step_targets: float = 0
        self.guard = Guard(config)
        self._part = part
        self._initial = initial
        self._logs = log
        self._valid_sums: Tensor | None = None  # (2,) fp64: nats and scored bases of this rank
        self._logged_step = -1
        self._totals: tuple[Tensor, Tensor | None] | None = None

    def configure_model(self) -> None:
        """Build the Reformer, sharded from the start under ZeRO stage 3; the same weights on every rank."""
        if self.model is None:
            torch.manual_seed(self.config.run.seed)
            self.model = self.build()
            refuse_shared_blocks(self.model, self.config.zero.stage)
            gather_whole_branches(self.model)
            for stack in stacks(self.model):
                stack.offload = self.config.trainer.offload_streams == HOST
            if self._initial is not None:
                self._initial(self.model)

    def build(self) -> Any:
        """The model, with random weights."""
        return Reformer(self.config.model, first_label=FIRST_LETTER)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the ids of the samples while they are on the host: later that would synchronise the device."""
        if self.trainer.training:
            self.step_samples += batch.samples.tolist()
        return batch

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Loss of one micro batch as the class describes it: fp32 scalar, nats per scored base of the global batch."""
        seeds = Seeds(run=self.config.run.seed, step=self.global_step, samples=batch.samples)
        nats, micro_scored = self.micro_loss(batch, seeds)
        self.step_nats = nats.detach() if self.step_nats is None else self.step_nats + nats.detach()
        self.micro_nats.append(nats.detach())
        self.step_targets = batch.targets
        if micro_scored is not None:
            self.step_scored = micro_scored if self.step_scored is None else self.step_scored + micro_scored
        # Undo that DeepSpeed averages gradients over all ranks, and Lightning the loss over the micro batches of a
        # step. The gradients of ranks that share a window add up like those of different windows.
        averaged = self.trainer.world_size * self.trainer.accumulate_grad_batches
        loss = nats * (averaged / max(batch.targets, 1))
        if self._logs:
            if self._is_last_micro_batch():
                self._log_step()
        elif self.guard.skips and self._is_last_micro_batch():
            total, _ = step_loss(*self.totals(), self.step_targets)
            if self.guard.is_bad(total):
                loss = loss * math.nan  # makes DeepSpeed skip the update of the step on every rank
        return loss

    def micro_loss(self, batch: Any, seeds: Seeds) -> tuple[Tensor, Tensor | None]:
        """The sum of the losses of a micro batch, and what `step_scored` sums up if its labels weigh differently."""
        assert self.model is not None
        wide = batch.widened()
        nats = self.model.loss(wide.tokens, wide.labels, weights=wide.weights, seeds=seeds, part=self._part)
        return nats, scored(wide, batch.skipped) if self.config.data.uneven else None

    def totals(self) -> tuple[Tensor, Tensor | None]:
        """`step_nats` and `step_scored` summed over all ranks, on the device.

        The first call in a step communicates: all ranks must make it.
        """
        if self._totals is None:
            assert self.step_nats is not None
            # A copy, because `micro_nats` holds the same tensor if the step has one micro batch.
            self._totals = self.step_nats.float().clone(), self.step_scored
            if self.trainer.world_size > 1:
                for total in self._totals:
                    if total is not None:
                        dist.all_reduce(total)
        return self._totals

    def next_step(self) -> None:
        """Begin the next optimizer step with empty sums."""
        self.step_nats, self.step_scored, self._totals = None, None, None
        self.step_samples, self.micro_nats = [], []

    def on_train_start(self) -> None:
        """With `guard.on_bad=skip`, give every rank the last rows of the journal, to judge the next losses.

        Raises:
            UserError, DataError: the user's own Trainer would not make steps of `data.global_batch` windows.
        """
        if self._logs:
            self._check_trainer()
        elif self.guard.skips:
            rows = recent_rows(self.config, self.global_step) if self.trainer.is_global_zero else []
            self.guard.resume(self.trainer.strategy.broadcast(rows))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Stage 0 in fp32: note the gradient norm before clipping, as DeepSpeed does in all other cases."""
        if isinstance(optimizer, PlainAdamW) and self._is_last_micro_batch():
            optimizer.measure()

    def _is_last_micro_batch(self) -> bool:
        return len(self.micro_nats) == self.trainer.accumulate_grad_batches

    def _log_step(self) -> None:
        """Log the loss of the step, summed over all ranks and divided by the weight of their labels."""
        nats, scored = self.totals()
        weight = max(self.step_targets, 1) if scored is None else scored[0].clamp(min=1)
        self.log("train/loss", (nats / weight).float(), prog_bar=True, batch_size=1)

    def _check_trainer(self) -> None:
        data = self.config.data
        needed = accumulation(data.global_batch, data.micro_batch, self.trainer.world_size)
        if needed != (given := self.trainer.accumulate_grad_batches):
            raise UserError(
                f"accumulate_grad_batches={given}: with {self.trainer.world_size} ranks and data.micro_batch="
                f"{data.micro_batch}, steps of data.global_batch={data.global_batch} windows need"
                f" Trainer(accumulate_grad_batches={needed})"
            )

    def on_validation_epoch_start(self) -> None:
        """Begin with empty sums."""
        self._valid_sums = None

    def validation_step(self, batch: Any, batch_index: int) -> dict[str, Tensor]:
        """The `Score` of one batch, as a dictionary."""
        assert self.model is not None
        score = score_batch(self.model, batch, self.config.run.seed, self._part)
        if self._logs:
            sums = torch.stack([score.nats.double(), score.bases.double()])
            self._valid_sums = sums if self._valid_sums is None else self._valid_sums + sums
        return score._asdict()

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all scored bases of all ranks. All ranks have equally many batches."""
        if self._valid_sums is None:
            return
        total = self.trainer.strategy.reduce(self._valid_sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        loss = (total[0] / total[1]).float()
        # Lightning advises to average over ranks, but each has the same value already.
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True")
        self.log("valid/loss", loss, batch_size=1)
        self.log("valid/bits_per_base", loss / math.log(2), prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        """AdamW, with weight decay on matrices only, not on norms, biases and scales.

        A Trainer of the user's own also gets the learning rate as a scheduler, which its LearningRateMonitor reads.
        """
        optim = self.config.optim
        decays = (optim.weight_decay, 0.0)
        groups = [
            {"params": [parameter for _, parameter in group], "weight_decay": decay}
            for group, decay in zip(self._parameter_groups(), decays, strict=True)
            if group
        ]
        # In every other case DeepSpeed wraps the optimizer and measures the gradient norm itself.
        plain = (
            not self._logs
            and self.config.zero.stage == 0
            and precision_of(self.config.trainer.precision) == "32"
        )
        kind = PlainAdamW if plain else torch.optim.AdamW
        adam = kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        if isinstance(adam, PlainAdamW):
            adam.drops = self.guard.skips
        if not self._logs:
            return adam
        steps = self.config.trainer.max_steps
        rate = LambdaLR(adam, lambda step: learning_rate(step, optim, steps) / optim.lr)
        return [adam], [{"scheduler": rate, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add `parameters`: their names in the order of the optimizer's groups, by which its states are numbered."""
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
        """Set the learning rate, a function of the step's number: there is no schedule to restore on resume."""
        if self._logs:
            if self.global_step != self._logged_step:
                self.next_step()
                self._logged_step = self.global_step
            return
        rate = learning_rate(self.global_step, self.config.optim, self.config.trainer.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate


def refuse_shared_blocks(model: nn.Module, stage: int) -> None:
    """Raise UserError if two blocks of a reversible stack use one parameter and ZeRO cannot handle that.

    The backward pass produces two gradients of such a parameter. Stage 2 reduces the first and fails at the second;
    stage 3 silently keeps only one of them.
    """
    if stage < 2:
        return
    for stack in stacks(model):
        users: dict[int, int] = {}
        for depth, block in enumerate(stack.blocks):
            for name, parameter in block.named_parameters():
                first = users.setdefault(id(parameter), depth)
                if first != depth:
                    raise UserError(
                        f"blocks {first} and {depth} share the parameter {name}, which zero.stage={stage} cannot"
                        " train: give each block its own, or set zero.stage=1"
                    )


def stacks(model: nn.Module) -> Iterator[ReversibleStack]:
    """The reversible stacks of a model."""
    return (module for module in model.modules() if isinstance(module, ReversibleStack))


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Learning rate of an optimizer step: linear warm-up, then a cosine.

    Args:
        step: number of the step, from 0.
        optim: the cosine falls from `optim.lr` to `optim.min_lr * optim.lr`.
        max_steps: the step at which the cosine reaches its end.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(max_steps - optim.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.lr * (optim.min_lr + (1 - optim.min_lr) * cosine)
