"""What MLflow loads of a logged model: sequences in, log-likelihoods out, tokenisation inside.

`mlflow.pyfunc.load_model` imports this module and calls `_load_pyfunc`. The model carries a copy of this package, so
this imports only what `mlflow_model.REQUIREMENTS` lists: neither DeepSpeed nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from megabase.datamodules.alphabet import PAD
from megabase.models.generation import start
from megabase.pipeline.inference.model import LoadedModel, load_model
from megabase.pipeline.inference.walk import Walk, batches, walk_over

# The column of sequences in the table that the model is given.
SEQUENCE = "sequence"
# Bases that are read at a time, as in `megabase score`.
BLOCK = 1 << 14


class SequenceModel:
    """Scores sequences, each base given all bases before it.

    Args:
        loaded: the model, whose alphabet turns letters into tokens.

    Raises:
        ConfigError: the model cannot read a sequence from left to right.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        start(loaded.model, 1)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded.model.to(self._device)
        self._loaded = loaded

    def predict(self, model_input: Any) -> Any:
        """Score each row of a table.

        Args:
            model_input: a pandas DataFrame with the column SEQUENCE.

        Returns:
            A DataFrame with the same index and the columns of `megabase score`. nats: −log-probability of all bases;
            bases: letters, which are scored; other: N and all else; bits_per_base: NaN without bases.

        Raises:
            ConfigError: a sequence is longer than the model can read.
            RunError: a log-probability is not finite.
        """
        import pandas as pd

        walks = self.score([str(text).encode() for text in model_input[SEQUENCE]])
        columns = {
            "nats": [walk.nats for walk in walks],
            "bases": [walk.bases for walk in walks],
            "other": [walk.other for walk in walks],
            "bits_per_base": [
                walk.nats / walk.bases / math.log(2) if walk.bases else np.nan for walk in walks
            ],
        }
        return pd.DataFrame(columns, index=model_input.index)

    def score(self, sequences: Sequence[bytes]) -> list[Walk]:
        """What a walk over each sequence found. Raises as `predict`."""
        self._loaded.model.body.config.validate(1 + max(map(len, sequences), default=0))
        found = [Walk(0.0, 0, 0) for _ in sequences]
        if filled := [place for place, letters in enumerate(sequences) if letters]:
            for places in batches(filled, sequences, BLOCK):
                rows = [sequences[place] for place in places]
                tokens = pad_sequence(
                    [self._tokens(row) for row in rows], batch_first=True, padding_value=PAD
                )
                blocks = iter(tokens.to(self._device).split(BLOCK, dim=1))
                for place, walk in zip(
                    places, walk_over(self._loaded, blocks, rows, lambda _: None), strict=True
                ):
                    found[place] = walk
        return found

    def _tokens(self, letters: bytes) -> torch.Tensor:
        return torch.from_numpy(self._loaded.alphabet.encode(np.frombuffer(letters, dtype=np.uint8))).long()


def _load_pyfunc(path: str) -> SequenceModel:
    """The model of an export, for MLflow."""
    return SequenceModel(load_model(Path(path)))
