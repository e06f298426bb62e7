"""A pretrained body with a new head, and what of it is trained: the head (probe), low-rank additions, or everything.

Weights that stay as they are become buffers that no checkpoint holds: ZeRO neither shards nor steps them, the optimizer
has no states for them, and a checkpoint of a probe is a few kilobytes. Every rank holds all of them.

Low-rank additions (LoRA, Hu et al. 2021) are those of `peft`, on every projection of attention. They work in reversible
blocks because a block's backward pass is one of autograd over its modules (models/reversible.py). Their products are
computed again in it, bit for bit, so inversion stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megabase.datamodules.batches.collate import IGNORE
from megabase.models.chance import Seeds
from megabase.models.layers import Linear
from megabase.models.reformer import Body
from megabase.pipeline.finetune.examples import Problem
from megabase.pipeline.finetune.extras import require
from megabase.pipeline.finetune.layout import Layout, layout_of

PROBE, LORA, FULL = MODES = ("probe", "lora", "full")
MEAN, LAST = POOLS = ("mean", "last")
NAMED = "lora_"
"""In the names of the weights of low-rank additions, and in no others."""


@dataclass(frozen=True)
class Method:
    """How a model is fine-tuned.

    Attributes:
        mode: PROBE, LORA or FULL.
        pool: of the hidden states of a sequence: MEAN of all letters, or that of the LAST one.
        rank: of low-rank additions.
    """

    mode: str = PROBE
    pool: str = MEAN
    rank: int = 8


class FineTuned(nn.Module):
    """Body, pooling, head: tokens -> numbers for each sequence, or for each of its letters.

    Args:
        body: pretrained; `prepared` with a method.
        problem: what is to be predicted.
        method: how.
    """

    def __init__(self, body: Body, problem: Problem, method: Method) -> None:
        super().__init__()
        self.body, self.problem, self.method = body, problem, method
        self.head = Linear(2 * body.config.dim, problem.outputs, gain=0.1, bias=True)
        self.layout: Layout = layout_of(body.config, 0)

    def train(self, mode: bool = True) -> FineTuned:
        """Dropout in the body only if the body is trained."""
        super().train(mode)
        if self.method.mode == PROBE:
            self.body.eval()
        return self

    def forward(self, codes: Tensor, lengths: Tensor, seeds: Seeds) -> Tensor:
        """Run the model.

        Args:
            codes: (batch, length) tokens of any integer type, PAD after the end.
            lengths: (batch,) tokens of each sequence.
            seeds: of dropout and hashing.

        Returns:
            (batch, outputs) fp32; per base (batch, letters, outputs).
        """
        tokens = codes.long()
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        mask = None if self.layout.strict else real
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method.mode != PROBE):
            hidden = self.body(tokens, seeds=seeds, mask=mask)
        letters = slice(self.layout.before, None)
        if self.problem.per_base:
            return self.head(hidden[:, letters].to(self.head.weight.dtype)).float()
        if self.method.pool == LAST:
            last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
            pooled = hidden.gather(1, last).squeeze(1)
        else:
            weight = real[:, letters, None]
            total = hidden[:, letters].float().where(weight, 0.0).sum(dim=1)
            pooled = total / weight.sum(dim=1).clamp(min=1)
        return self.head(pooled.to(self.head.weight.dtype)).float()

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses of all labels, their number, and how many were predicted right (classes only).

        Args:
            outputs: of `forward`.
            labels: see ExampleBatch.

        Returns:
            fp32 scalars. The loss is nats of the cross-entropy, or half the squared error in units of `problem.scale`.
        """
        if self.problem.classes:
            flat, targets = outputs.flatten(0, -2), labels.flatten()
            known = targets != IGNORE
            total = F.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="sum")
            return total, known.sum().float(), (flat.argmax(dim=-1) == targets)[known].sum().float()
        numbers = labels.view(torch.float32)
        known = ~numbers.isnan()
        errors = (outputs.squeeze(-1) - numbers.where(known, 0.0)).where(known, 0.0)
        return errors.square().sum() / 2, known.sum().float(), torch.zeros_like(known.sum().float())

    @torch.no_grad()
    def predict(self, codes: Tensor, lengths: Tensor, seeds: Seeds) -> Tensor:
        """Probabilities of the classes, or numbers in their own unit: the shape of `forward`."""
        outputs = self(codes, lengths, seeds)
        if self.problem.classes:
            return outputs.softmax(dim=-1)
        return outputs * self.problem.scale + self.problem.mean


def prepared(body: Body, method: Method, seed: int) -> Body:
    """Make of a pretrained body what a method trains; only for PROBE and LORA.

    Args:
        body: with its weights.
        method: how it is fine-tuned.
        seed: of the start of low-rank additions. They add nothing at the start.
    """
    if method.mode == LORA:
        peft: Any = require("peft")
        torch.manual_seed(seed)
        targets = [name for name, each in body.named_modules() if isinstance(each, Linear)]
        settings = peft.LoraConfig(r=method.rank, lora_alpha=2 * method.rank, target_modules=targets)
        peft.inject_adapter_in_model(settings, body)
    return freeze(body)


def freeze(module: nn.Module) -> Any:
    """Turn every weight, except for low-rank additions, into a buffer that no checkpoint holds."""
    for name, each in module.named_modules():
        for key, weight in list(each.named_parameters(recurse=False)):
            if NAMED not in f"{name}.{key}":
                delattr(each, key)
                each.register_buffer(key, weight.detach(), persistent=False)
    return module
