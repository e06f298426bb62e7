"""The task of `megabase finetune`: see `training.task`."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.files import publish, publish_json
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.files import read_object
from megabase.pipeline.finetune import base
from megabase.pipeline.finetune.examples import SPLITS, Examples
from megabase.pipeline.finetune.layout import layout_of
from megabase.pipeline.finetune.model import FULL, Method, prepared
from megabase.pipeline.finetune.settings import Pretrained
from megabase.pipeline.ranks.groups import Group, Groups
from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.rundir.status import FINISHED, read_status
from megabase.pipeline.tracking.mirror import is_complete
from megabase.pipeline.training.check import check_newest_checkpoint, check_settings
from megabase.pipeline.training.task import Initial, Task, Trial

if TYPE_CHECKING:
    from megabase.pipeline.finetune.batches import ExampleData
    from megabase.pipeline.training.module import PretrainModule

logger = logging.getLogger(__name__)

SPLIT_TABLE = "splits.tsv"


@dataclass(frozen=True, eq=False)
class Work:
    """A fine-tuning.

    Attributes:
        model: to start from.
        step: of its checkpoint: a number, `best`, or None for the newest.
        examples: labelled sequences.
        method: how.
    """

    model: Pretrained
    step: int | str | None
    examples: Examples
    method: Method

    @property
    def record(self) -> dict[str, Any]:
        """What `finetune.json` says: with it the run can be repeated, and its model loaded."""
        return {
            "model": str(self.model.path),
            "model_step": self.step,
            "alphabet": self.model.alphabet,
            "method": asdict(self.method),
            "problem": asdict(self.examples.problem) | {"classes": list(self.examples.problem.classes)},
            "examples": self.examples.identity,
        }


class Finetuning(Task):
    """Fine-tuning of a pretrained model on labelled sequences; see Task.

    Args:
        config: of the run.
        work: what is fine-tuned.
    """

    command = "finetune"

    def __init__(self, config: RunConfig, work: Work) -> None:
        super().__init__(config)
        self.work = work

    def check(self, ranks: int) -> None:
        self._check_call()
        check_settings(self.config, ranks)
        if self.config.data.reverse_complement and Alphabet.named(self.alphabet).complement is None:
            raise UserError(f"data.reverse_complement: {self.alphabet} has no other strand: leave it out")
        if (parts := self.config.trainer.sequence_ranks) > 1:
            raise UserError(
                f"trainer.sequence_ranks={parts}: the ranks of a fine-tuning do not share examples: leave it out"
            )
        self.config.model.validate(self.config.data.length)
        check_newest_checkpoint(self.config, ranks, self.identity, self.alphabet)

    def _check_call(self) -> None:
        """Raise UserError if the run directory is of another call."""
        directory, now = self.config.directory, self.work.record
        path = RunPaths(directory).finetune
        if not path.exists():
            if RunPaths(directory).config.exists():
                raise UserError(f"{directory} is the run of another command: choose another RUN with -o")
            return
        before = read_object(path)
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            differences = [
                "the examples or their splits"
                if key == "examples"
                else f"{key} {before.get(key)} -> {now[key]}"
                for key in changed
            ]
            raise UserError(
                f"{directory} is the run of another call, which differs in {'; '.join(differences)}: repeat that call,"
                " or choose another RUN with -o"
            )

    def warning(self, ranks: int) -> str | None:
        trained, longest = self.work.model.length, self.config.data.length
        if trained is None or longest <= trained + 1:
            return None
        return (
            f"the longest sequence has {longest:,} tokens, but {self.work.model.path} was trained on windows of"
            f" {trained:,}: it has not learned to use more context"
        )

    def has_finished(self, ranks: int) -> bool:
        state, step = read_status(self.config.directory)
        done = state == FINISHED and (step or 0) >= self.config.trainer.max_steps
        if not done or (self.config.tracking.enabled and not is_complete(self.config)):
            return False
        logger.info(
            f"{self.config.run.name} is finished at step {step}: a larger trainer.max_steps trains it further"
        )
        return True

    @cached_property
    def data(self) -> ExampleData:
        from megabase.pipeline.finetune.batches import Encoder, ExampleData

        model, examples = self.config.model, self.work.examples
        layout = layout_of(model, len(examples.sequences[examples.longest]))
        return ExampleData(Encoder(examples, Alphabet.named(self.alphabet), layout), self.config)

    @property
    def identity(self) -> str:
        return self.work.examples.identity

    @property
    def alphabet(self) -> str:
        return self.work.model.alphabet

    @property
    def has_validation(self) -> bool:
        return True

    def initial(self, world: Group) -> Initial | None:
        """Copy the pretrained weights into the run directory, so that it needs no other file from now on."""
        error = None
        if world.rank == 0:
            try:
                base.copy(self.work.model.path, self.work.step, self.config.directory)
            except (UserError, RunError) as caught:
                error = str(caught)
        world.check(error)
        return None if self.work.method.mode != FULL else base.filler(self.config.directory)

    def module(self, groups: Groups, initial: Initial | None) -> PretrainModule:
        from megabase.pipeline.finetune.module import FinetuneModule

        method, body = self.work.method, None
        if method.mode != FULL:
            body = base.load_body(self.config.directory, self.config.model)
            body = prepared(body, method, self.config.run.seed)
        return FinetuneModule(self.config, initial, self.work.examples.problem, method, body)

    def describe_data(self) -> None:
        """Write `finetune.json`, and `splits.tsv`: which example is in which split."""
        directory, examples = self.config.directory, self.work.examples
        publish_json(RunPaths(directory).finetune, self.work.record, indent=1)
        lines = ["example\tsplit\n"]
        lines += [f"{name}\t{split}\n" for name, split in zip(examples.names, examples.splits, strict=True)]
        publish(directory / SPLIT_TABLE, "".join(lines).encode())
        splits = {split: {"records": examples.splits.count(split)} for split in SPLITS}
        about = {"shards": self.config.data.shards, "identity": self.identity, "alphabet": self.alphabet}
        publish_json(RunPaths(directory).dataset, about | {"splits": splits}, indent=1)

    def measure(self, trial: Trial, step: int) -> tuple[dict[str, float], dict[str, float] | None] | None:
        """The mean loss of the validation split, and the accuracy if there are classes."""
        import torch

        total = torch.zeros(3, dtype=torch.float64, device=trial.device)
        with torch.no_grad():
            for batch in self.data.validation():
                if trial.stop():
                    return None
                sums = trial.score(batch)
                total += torch.stack([sums[name].double() for name in ("loss", "count", "correct")])
        if trial.group is not None:
            dist.all_reduce(total, group=trial.group)
        loss, count, correct = total.tolist()
        found = {"valid_loss": loss / max(count, 1)}
        if self.work.examples.problem.classes:
            found["valid_accuracy"] = correct / max(count, 1)
        return found | {"valid_examples": int(count)}, None

    def evaluation_row(self, step: int, subset: dict[str, float], full: dict[str, float] | None) -> Row:
        return {"step": step, **subset}

    def windows_of(self, step: int) -> list[dict[str, Any]]:
        examples = self.work.examples
        samples, turned = self.data.training().of_step(step - 1)
        return [
            {
                "sample": sample,
                "places": [
                    {"record": examples.names[sample], "start": 0, "end": len(examples.sequences[sample])}
                ],
                "reverse_complement": turn,
            }
            for sample, turn in zip(samples.tolist(), turned.tolist(), strict=True)
        ]


def read_record(run: Path) -> dict[str, Any]:
    """The content of `finetune.json`. Raises UserError if the directory is not of a fine-tuning."""
    path = RunPaths(run).finetune
    if not path.exists():
        raise UserError(f"{run} is not the run of a fine-tuning: it has no {path.name}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    assert isinstance(content, dict)
    return content
