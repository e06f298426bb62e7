"""The report on a bad step names the windows that each rank read."""

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.batches.numbered import Place, TrainBatches
from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.ranks.groups import Groups
from megabase.pipeline.training.bad_windows import report, windows_of
from megabase.pipeline.training.guard import Trouble


def settings(*more: str, root: Path = Path("/nowhere")) -> RunConfig:
    run = load(
        [], ["run.name=x", f"run.root={root}", "data.shards=s", "data.length=8", "data.global_batch=8", *more]
    )
    run.model.vocab_size = 9
    return run


class Others:
    """Replaces the Group of several ranks, on rank 0. gathered: the value of each rank."""

    rank = 0

    def __init__(self, gathered: list[list[float]]) -> None:
        self.gathered, self.size = gathered, len(gathered)

    def gather(self, value: Any) -> list[Any]:
        assert repr(value) == repr(self.gathered[0])
        return self.gathered

    def broadcast(self, value: Any) -> Any:
        return value


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Shards of one long record and some short ones, and their bases."""
    folder = tmp_path_factory.mktemp("genome")
    random = np.random.default_rng(5)
    bases = {
        f"r{i}": bytes(random.choice(list(b"ACGT"), size).tolist())
        for i, size in enumerate([900, 9, 7, 11, 6])
    }
    fasta = folder / "g.fa"
    fasta.write_bytes(b"".join(b">" + name.encode() + b"\n" + text + b"\n" for name, text in bases.items()))
    prepare([fasta], folder / "shards", progress=False)
    return folder / "shards", bases


@pytest.mark.parametrize("how", [(), ("data.shift=3", "data.reverse_complement=0.5"), ("data.pack=true",)])
def test_a_report_names_the_windows_that_each_rank_read(
    genome: tuple[Path, dict[str, bytes]], how: tuple[str, ...], tmp_path: Path
) -> None:
    shards, bases = genome
    run = settings(f"data.shards={shards}", "data.micro_batch=2", f"run.root={tmp_path}", *how)
    run.directory.mkdir()
    data = SequenceDataModule(run.data, 1)
    ranks, turns = 2, 2
    nats = [[5.0, 5.0], [5.0, math.nan]]
    step = 40 if not how else 13
    loaders = [
        TrainBatches(data.training_windows(), Place(rank, ranks, 2), 1, turns, step - 1)
        for rank in range(ranks)
    ]
    message = report(
        run, Trouble(step, "the loss"), Groups(Others(nats)), nats[0], partial(windows_of, run, loaders[0])
    )  # type: ignore[arg-type]

    path = run.directory / "logs" / f"bad-step-{step}.json"
    content = json.loads(path.read_text())
    assert content["step"] == step and content["why"] == "the loss"
    windows = content["windows"]
    assert [window["stands_out"] for window in windows] == [True] * 2 + [False] * 6
    alphabet = Alphabet.named("dna")
    for rank, turn in itertools.product(range(ranks), range(turns)):
        batch = loaders[rank].batch((step - 1) * turns + turn)
        mine = [w for w in windows if (w["rank"], w["micro_batch"]) == (rank, turn)]
        assert [w["sample"] for w in mine] == batch.samples.tolist()
        assert {str(w["micro_batch_nats"]) for w in mine} == {str(nats[rank][turn])}
        for window, codes in zip(mine, batch.labels, strict=True):
            pieces = []
            for place in window["places"]:
                assert place["source"] == "g.fa"
                piece = np.frombuffer(bases[place["record"]][place["start"] : place["end"]], np.uint8)
                pieces.append(alphabet.reverse_complement(piece) if window["reverse_complement"] else piece)
            read_then = codes.numpy()[
                codes.numpy() >= alphabet.encode(np.frombuffer(b"ACGT", np.uint8)).min()
            ]
            assert alphabet.encode(np.concatenate(pieces)).tolist() == read_then.tolist()
    first = windows[0]["places"][0]
    assert f"window {windows[0]['sample']} ({first['record']}:{first['start']}-{first['end']}" in message
    assert message.startswith("the loss stands out in window ") and message.endswith(f"all are in {path}")


def test_a_report_without_file_or_outliers_says_so(
    genome: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    run = settings(f"data.shards={genome[0]}", "data.micro_batch=2", f"run.root={tmp_path}")
    data = SequenceDataModule(run.data, 1)
    batches = TrainBatches(data.training_windows(), Place(0, 2, 2), 1, 2)

    def message_for(nats: list[list[float]]) -> str:
        return report(
            run, Trouble(3, "the loss"), Groups(Others(nats)), nats[0], partial(windows_of, run, batches)
        )  # type: ignore[arg-type]

    assert "cannot be written" in message_for([[5.0, 5.0], [5.0, 5.0]])  # there is no run directory
    run.directory.mkdir()
    no_outlier = message_for([[5.0, 5.0], [5.0, 5.0]])
    assert no_outlier.startswith("windows of this step: window ") and " and 5 more; all are in " in no_outlier
    assert message_for([[5.0, 5.0], [11.0, 5.0]]).startswith("the loss stands out in window ")
    assert message_for([[math.nan] * 2] * 2).startswith(
        "every micro batch of this step is bad, so the weights may have been bad"
    )
