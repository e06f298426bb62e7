"""One rank of test_guard.py: small trainings in which the numbers of one step are poisoned for real.

Arguments: a shard directory, a run root, and the file for rank 0's results, as JSON: for each case what it ended with,
the steps whose update changed nothing, and a digest of each rank's weights and optimizer states at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabase.pipeline.checkpoint.manifest import list_checkpoints, step_of
from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks import rendezvous
from megabase.pipeline.ranks.environment import is_rank_zero
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.ranks.stop import StopRequest
from megabase.pipeline.training import module
from megabase.pipeline.training import run as train
from megabase.pipeline.training.check import check
from megabase.pipeline.training.guard import LEAST_LOSSES
from megabase.pipeline.training.module import PretrainModule
from megabase.pipeline.training.pretraining import Pretraining
from megabase.pipeline.zero.checkpoint_engine import DIRECTORY

# BAD: a step at which a loss can count as exploded and no checkpoint is due. SAVED: steps between checkpoints.
BAD, STEPS, SAVED = LEAST_LOSSES + 2, LEAST_LOSSES + 4, LEAST_LOSSES // 2
SETTINGS = [
    "data.length=256",
    "data.global_batch=8",
    "data.micro_batch=2",
    "model.dim=16",
    "model.depth=2",
    "model.heads=2",
    "model.dropout=0.1",
    "model.lsh.rounds=2",
    "model.lsh.chunk_length=16",
    "model.local.window=32",
    "trainer.devices=2",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_steps=1",
    "trainer.eval_every_steps=0",
    f"checkpoint.every_steps={SAVED}",
    "checkpoint.keep=9",
    "optim.warmup_steps=2",
    "tracking.enabled=false",
]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        how: what goes wrong: loss (NaN), infinite (loss), gradient (infinite) or spike (a large loss). undone: nothing
            goes wrong, but this worker restores what the update changed.
        rank: of the bad micro batch.
        turn: number of the bad micro batch in its step.
        steps: the bad ones, as numbered in the journal.
        settings: besides SETTINGS.
        of: the case of which this one is a resumed copy; empty for none.
    """

    how: str
    rank: int = 0
    turn: int = 0
    steps: tuple[int, ...] = (BAD,)
    settings: tuple[str, ...] = ()
    of: str = ""


SKIP = ("guard.on_bad=skip",)
CASES: dict[str, Case] = {}
for stage in range(4):
    with_stage = (f"zero.stage={stage}",)
    CASES[f"{stage}-undone"] = Case("undone", settings=with_stage)
    CASES[f"{stage}-loss"] = Case("loss", rank=1, turn=1, settings=with_stage + SKIP)
    CASES[f"{stage}-gradient"] = Case("gradient", settings=with_stage + SKIP)
    CASES[f"{stage}-spike"] = Case("spike", rank=1, settings=with_stage + SKIP)
for stage in range(4):
    bf16 = (f"zero.stage={stage}", "trainer.precision=bf16")
    CASES[f"{stage}-bf16-undone"] = Case("undone", settings=bf16)
    CASES[f"{stage}-bf16-loss"] = Case("infinite", turn=1, settings=bf16 + SKIP)
CASES |= {
    "resumed": Case("spike", rank=1, settings=SKIP, of="2-spike"),
    "too-many": Case(
        "gradient",
        steps=tuple(range(BAD, STEPS)),
        settings=(*SKIP, "guard.max_skips=2", "trainer.max_steps=99"),
    ),
    "stopped-at-a-checkpoint": Case("gradient", steps=(2 * SAVED,), settings=("zero.stage=0",)),
    "stopped-soon": Case(
        "loss", rank=1, settings=("data.micro_batch=4", "checkpoint.every_steps=0", "trainer.max_steps=99")
    ),
}


class _Spoiled(torch.autograd.Function):
    """Returns its input, and an infinite gradient."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.inf


class Poisoned(PretrainModule):
    """The module of a case; `unchanged` lists the steps that changed no weight and no state."""

    case: Case
    last: Poisoned

    def __init__(self, config: RunConfig, *arguments: Any, **more: Any) -> None:
        super().__init__(config, *arguments, **more)
        type(self).last = self
        self.unchanged: list[int] = []
        self._before: list[Tensor] = []
        self._whole: list[Tensor] = []

    def configure_model(self) -> None:
        super().configure_model()
        assert self.model is not None
        original = self.model.loss

        def loss(*arguments: Any, **settings: Any) -> Tensor:
            return self._spoil(original(*arguments, **settings))

        self.model.loss = loss  # type: ignore[method-assign]

    def _spoil(self, nats: Tensor) -> Tensor:
        case = self.case
        here = (dist.get_rank(), len(self.micro_nats)) == (case.rank, case.turn)
        if not (self.trainer.training and here and self.global_step + 1 in case.steps):
            return nats
        if case.how == "gradient":
            return _Spoiled.apply(nats)
        return nats * {"loss": math.nan, "infinite": math.inf, "spike": 1000.0, "undone": 1.0}[case.how]

    def tensors(self) -> list[Tensor]:
        """All that an update changes on this rank: weights (under stage 3 its part), fp32 weights, AdamW's states."""
        weights = [
            getattr(parameter, "ds_tensor", parameter) for parameter in self.engine.module.parameters()
        ]
        # The optimizer inside ZeRO's: its keys are the fp32 weights of this rank.
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        states = [value for state in inner.state.values() for value in state.values()]
        return [value.detach() for value in (*weights, *inner.state, *states) if isinstance(value, Tensor)]

    def whole(self) -> list[Tensor]:
        """The parameters that are complete on this rank: in stage 3 small ones may be, besides this rank's part."""
        return [parameter.data for parameter in self.engine.module.parameters() if parameter.data.numel()]

    @property
    def engine(self) -> Any:
        return self.trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        super().on_train_batch_start(batch, batch_index)
        if not self.micro_nats:
            self._before = [tensor.clone() for tensor in self.tensors()]
            self._whole = [tensor.clone() for tensor in self.whole()]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.micro_nats:  # cleared at the end of a step
            return
        after = self.tensors()
        if self.case.how == "undone" and self.global_step in self.case.steps:
            then, now = self._before + self._whole, after + self.whole()
            for tensor, before in zip(now, then, strict=True):
                tensor.copy_(before)
        if all(torch.equal(*pair) for pair in zip(after, self._before, strict=True)):
            self.unchanged.append(self.global_step)


def run(name: str, case: Case, shards: str, root: Path, groups: Groups) -> dict[str, Any]:
    """Train a case; returns how it ended, and what each rank knows about it."""
    settings = [f"data.shards={shards}", f"run.root={root}", f"run.name={name}", *SETTINGS, *case.settings]
    config = load([], settings)
    check(config, groups.world.size)
    if is_rank_zero():
        (config.directory / "checkpoints").mkdir(parents=True)
        if case.of:
            shutil.copytree(root / case.of, config.directory, dirs_exist_ok=True)
            for checkpoint in list_checkpoints(config.directory / "checkpoints"):
                if step_of(checkpoint) > SAVED:
                    shutil.rmtree(checkpoint)
    groups.world.check(None)
    Poisoned.case = case
    try:
        ended = train.fit(Pretraining(config), groups.world.size, groups, StopRequest())
    except RunError as error:
        ended = str(error)
    trained = Poisoned.last
    digest = hashlib.sha256()
    for tensor in trained.tensors():
        digest.update(tensor.float().numpy().tobytes())
    known = {
        "digest": digest.hexdigest(),
        "unchanged": trained.unchanged,
        "finite": all(bool(tensor.isfinite().all()) for tensor in trained.tensors()),
    }
    if case.how == "undone":
        known["refused"] = [_refused(trained.engine, which, root) for which in ("", "weights", "exp_avg")]
    return {"ended": ended, "step": trained.global_step, "ranks": groups.world.gather(known)}


def _refused(engine: Any, which: str, root: Path) -> str:
    """Why this rank refuses to write its files of a checkpoint when one rank has a NaN; empty if it writes them.

    which: where the NaN is, in the fp32 weights or in a moment; empty: there is none. In stage 0 rank 0 has the NaN,
    because only rank 0 writes; in other stages rank 1.
    """
    spoiled = dist.get_rank() == (engine.zero_optimization_stage() > 0)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights, state = next(iter(inner.state.items()))
    place = state.get(which, weights).detach().view(-1)[:1]
    before = place.clone()
    if which and spoiled:
        place.fill_(math.nan)
    engine.save_checkpoint(str(root / "refused"), tag=DIRECTORY, client_state={}, save_latest=False)
    error = engine.checkpoint_engine.result().error
    place.copy_(before)
    return str(error or "")


def main(shards: str, root: str, output: str) -> None:
    """Run all cases; rank 0 writes the results."""
    from megabase.pipeline.zero import strategy

    warnings.filterwarnings("ignore")
    rendezvous.start()
    strategy.start_deepspeed()
    module.PretrainModule = Poisoned  # type: ignore[misc]
    groups = Groups.create()
    results = {}
    for name, case in CASES.items():
        results[name] = run(name, case, shards, Path(root), groups)
        if is_rank_zero():
            Path(output).write_text(json.dumps(results))
    groups.world.check(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
