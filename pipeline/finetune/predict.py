"""Load a fine-tuned model from its run directory, and predict with it; `megabase finetune --predict`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.batches.numbered import Place
from megabase.models.chance import Seeds
from megabase.models.reformer import Body
from megabase.pipeline.checkpoint.identity import model_config, saved_layout
from megabase.pipeline.checkpoint.manifest import Manifest, read_manifest
from megabase.pipeline.errors import RunError, UserError
from megabase.pipeline.finetune import base
from megabase.pipeline.finetune.batches import Encoder, EvalExamples
from megabase.pipeline.finetune.examples import Examples, Problem
from megabase.pipeline.finetune.layout import layout_of, most_letters
from megabase.pipeline.finetune.model import FULL, FineTuned, Method, prepared
from megabase.pipeline.finetune.task import read_record
from megabase.pipeline.inference.weights import PREFIX, read_checkpoint
from megabase.pipeline.log import console
from megabase.pipeline.zero.states import Shards

TOKENS = 1 << 16
"""A batch has about so many tokens."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A fine-tuned model.

    Attributes:
        model: on the device that predicts, with fp32 weights, in evaluation mode.
        alphabet: of its tokens.
        seed: of the rotations of LSH attention, `run.seed`.
        precision: of the training: 32, bf16 or 16. On a CPU it predicts in fp32.
        step: optimizer steps of the fine-tuning.
        path: the run directory.
    """

    model: FineTuned
    alphabet: Alphabet
    seed: int
    precision: str
    step: int
    path: Path

    @property
    def problem(self) -> Problem:
        """What it predicts."""
        return self.model.problem

    def predict(self, examples: Examples, chosen: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """The prediction for each of the chosen examples, in their order.

        Args:
            examples: their labels are not used.
            chosen: numbers of examples.

        Returns:
            Probabilities (classes,) or a number (1,); per base (letters, classes) or (letters, 1).

        Raises:
            UserError: a sequence is longer than the model can read.
        """
        config = self.model.body.config
        letters = np.array([len(examples.sequences[each]) for each in chosen], np.int64)
        longest, most = int(letters.max(initial=1)), most_letters(config)
        if most is not None and longest > most:
            name = examples.names[int(chosen[int(letters.argmax())])]
            raise UserError(f"{name}: {longest:,} letters, but {self.path} reads {most:,} at most")
        layout = layout_of(config, longest)
        encoder = Encoder(examples, self.alphabet, layout)
        batches = EvalExamples(encoder, Place(0, 1, max(TOKENS // layout.length, 1)), chosen)
        device = self.model.head.weight.device
        shown = (
            track(batches, "predicting", console=console(), transient=True)
            if sys.stderr.isatty()
            else batches
        )
        half = self.precision != "32" and device.type == "cuda"
        dtype = torch.float16 if self.precision == "16" else torch.bfloat16
        found = []
        with torch.autocast(device.type, dtype, enabled=half):
            for batch in shown:
                values = self.model.predict(
                    batch.codes.to(device), batch.lengths.to(device), Seeds(run=self.seed)
                )
                for sample, row in zip(batch.samples.tolist(), values.double().cpu().numpy(), strict=True):
                    if sample >= 0:
                        per_base = self.problem.per_base
                        found.append(row[: len(examples.sequences[sample])] if per_base else row)
        return found


def load_finetuned(run: Path, step: int | None = None) -> Loaded:
    """Load the model of a fine-tuning.

    Args:
        run: its run directory.
        step: of the checkpoint; None: that with the lowest validation loss, which `result.json` is of.

    Raises:
        UserError: it is not the directory of a fine-tuning, or has no such checkpoint.
        RunError: the checkpoint cannot be read.
    """
    record = read_record(run)
    problem = Problem(**(record["problem"] | {"classes": tuple(record["problem"]["classes"])}))
    method = Method(**record["method"])

    def read(checkpoint: Path) -> Loaded:
        manifest = read_manifest(checkpoint)
        model = _filled(run, checkpoint, manifest, problem, method)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        seed = int(manifest.config["run.seed"])
        alphabet = Alphabet.named(record["alphabet"])
        return Loaded(model.eval().to(device), alphabet, seed, manifest.precision, manifest.step, run)

    return read_checkpoint(run, step if step is not None else best_or_none(run), read)[1]


def best_or_none(run: Path) -> int | None:
    """The step of the checkpoint with the lowest validation loss; None if none was evaluated."""
    from megabase.pipeline.inference.model import best_step

    try:
        return best_step(run)
    except UserError:
        return None


def _filled(run: Path, checkpoint: Path, manifest: Manifest, problem: Problem, method: Method) -> FineTuned:
    """The model with the weights of a checkpoint. Raises RunError if they are those of another model."""
    config = model_config(manifest)
    body = Body(config) if method.mode == FULL else prepared(base.load_body(run, config), method, 0)
    model = FineTuned(body, problem, method)
    shards = Shards.open(checkpoint, saved_layout(manifest))
    weights: dict[str, Any] = dict(model.named_parameters())
    saved = {name.removeprefix(PREFIX) for name in shards.names}
    if saved != set(weights):
        differing = sorted(saved.symmetric_difference(weights))
        raise RunError(
            f"checkpoint {checkpoint} is not of the model that finetune.json describes: {differing[0]}"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(shards.read(PREFIX + name).view(weight.shape))
    return model


def unlabelled(names: Sequence[str], sequences: Sequence[bytes], problem: Problem) -> Examples:
    """Sequences without labels, all of one split."""
    return Examples(problem, list(names), list(sequences), np.zeros(len(names)), ["test"] * len(names))
