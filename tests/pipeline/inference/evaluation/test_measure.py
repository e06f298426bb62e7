"""What is scored: with models whose predictions are known, and with a real one."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megabase.datamodules.alphabet import BOS, MASK
from megabase.datamodules.batches.collate import Wide
from megabase.datamodules.batches.numbered import Place
from megabase.datamodules.batches.visits import Windows, evaluation_windows
from megabase.datamodules.config import DataConfig
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.datamodules.report.classes import Classes
from megabase.datamodules.report.recall import Source
from megabase.models import Reformer
from megabase.pipeline.inference.evaluation import measure
from megabase.pipeline.inference.evaluation.measure import Scorer
from tests.pipeline.inference.test_export import CONFIG

LENGTH = 256
PLACE = Place(0, 1, 2)


@pytest.fixture(scope="module")
def index(lambda_shards: Path) -> ShardIndex:
    return ShardIndex.open(lambda_shards)


def windows(index: ShardIndex, length: int = LENGTH, objective: str = "causal") -> Windows:
    return evaluation_windows(DataConfig(length=length, objective=objective), index, "valid")


class Known(Scorer):
    """A scorer whose nats are a function of the tokens."""

    def __init__(self, nats, place: Place = PLACE) -> None:
        super().__init__(torch.nn.Module(), place, None, "32", 0)  # type: ignore[arg-type]
        self.__dict__["known"] = nats

    def nats(self, wide: Wide) -> NDArray[np.float64]:
        labelled = (wide.labels != -100).numpy()
        return np.where(labelled, self.__dict__["known"](wide.tokens.numpy(), wide.labels.numpy()), 0.0)


def real(place: Place = PLACE) -> Scorer:
    torch.manual_seed(1)
    return Scorer(Reformer(CONFIG).eval(), place, None, "32", 1)


def test_every_base_is_counted_where_it_lies(index: ShardIndex, tmp_path: Path) -> None:
    """A model whose nats are the position of the base: sums of bins and classes are then known."""
    record = index.segments.record[0]
    start = int(index.segments.start[index.segments.rows_of("valid")[0]])
    (tmp_path / "c.bed").write_text(f"{record}\t{start + 10}\t{start + 300}\tgene\n")
    classes = Classes.read(tmp_path / "c.bed", index.segments, "valid")
    scorer = Known(lambda tokens, labels: np.broadcast_to(np.arange(LENGTH), labels.shape))
    parts, tally = measure.score_windows(scorer, windows(index), 0, classes)
    count = len(windows(index).plan)
    assert len(tally.samples) == count
    assert np.all(tally.nats[:, 0] == LENGTH * (LENGTH - 1) / 2) and np.all(tally.bases[:, 0] == LENGTH)
    for (first, last), of in zip(parts.bins, parts.of_bins, strict=True):
        assert np.all(tally.nats[:, of] == sum(range(first, last)))
        assert np.all(tally.bases[:, of] == last - first)
    gene, rest = parts.of_classes
    assert tally.bases[:, gene].tolist() == [246, 44, *[0] * (count - 2)]
    assert tally.nats[:2, gene].tolist() == [sum(range(10, 256)), sum(range(44))]
    assert np.all(tally.bases[:, rest] + tally.bases[:, gene] == LENGTH)
    lower, upper = parts.of_cases
    assert not tally.bases[:, lower].any() and np.all(tally.bases[:, upper] == LENGTH)


def test_lower_case_letters_are_told_from_upper(tmp_path: Path) -> None:
    fasta = tmp_path / "case.fa"
    fasta.write_text(">a\n" + "acgtACGTNn" * 200 + "\n>b\n" + "ACgt" * 200 + "\n")
    soft = prepare([fasta], tmp_path / "shards", valid="b", progress=False)
    for objective in ("causal", "masked"):
        of_split = windows(soft, 100, objective)
        _, tally = measure.score_windows(Known(lambda tokens, labels: labels * 0.0 + 1), of_split, 0, None)
        lower, upper = tally.bases[:, -2], tally.bases[:, -1]
        assert np.all(lower + upper == tally.bases[:, 0]) and lower.sum() > 0
        if objective == "causal":
            assert np.all(lower == 50)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_contexts_score_the_same_bases_with_more_or_less_before_them(
    index: ShardIndex, objective: str
) -> None:
    lengths = [32, 50, 64, LENGTH]
    seen: dict[int, list[float]] = {}
    scored: dict[int, list[int]] = {}

    def nats(tokens: NDArray, labels: NDArray) -> NDArray:
        length = tokens.shape[1]
        before = np.broadcast_to(np.arange(length), labels.shape)
        around = before if objective == "causal" else np.minimum(before, length - 1 - before)
        seen.setdefault(length, []).extend(around[labels != -100].tolist())
        scored.setdefault(length, []).extend(labels[labels != -100].tolist())
        assert np.all(tokens[:, 0] == BOS) or objective == "masked"
        return labels * 0.0 + 1

    tally = measure.score_contexts(Known(nats), windows(index, objective=objective), 4, lengths)
    assert np.all(tally.bases == tally.bases[:, :1])
    half = LENGTH // 2
    assert np.all(tally.bases == half) if objective == "causal" else np.all(tally.bases > 0)
    for length in lengths:
        assert sorted(scored[length]) == sorted(scored[LENGTH])
        assert min(seen[length]) >= (length // 2 if objective == "causal" else length // 4 - 1)
        assert max(seen[length]) < length
    assert max(seen[32]) <= 31 and max(seen[LENGTH]) > 64


@pytest.mark.slow
def test_the_longest_context_is_the_plain_evaluation(index: ShardIndex) -> None:
    parts, plain = measure.score_windows(real(), windows(index), 6, None)
    contexts = measure.score_contexts(real(), windows(index), 6, [64, LENGTH])
    # The last bin of positions is the half of the window that all lengths score.
    assert contexts.nats[:, 1] == pytest.approx(plain.nats[:, parts.of_bins[-1]], rel=1e-6)
    assert not np.allclose(contexts.nats[:, 0], contexts.nats[:, 1], rtol=1e-4)


def looked_up(tokens: NDArray, labels: NDArray) -> NDArray:
    """A model with perfect recall: it predicts what followed the last 12 bases before; else it guesses."""
    nats = np.full(labels.shape, math.log(4))
    for row, (text, wanted) in enumerate(zip(tokens, labels, strict=True)):
        sequence = bytes(text.tolist())
        for at in np.flatnonzero(wanted != -100):
            found = sequence[:at].find(sequence[at - 11 : at + 1])
            if at >= 12 and found >= 0 and sequence[found + 12] == wanted[at]:
                nats[row, at] = 0.0
    return nats


def test_perfect_recall_gains_two_bits_on_exact_copies_and_nothing_on_inverted_ones(
    index: ShardIndex,
) -> None:
    scorer, of_split = Known(looked_up), windows(index, 512)
    without = measure.score_copies(scorer, of_split, 6, 64, None, 64)
    for gap in (64, 256):
        exact = measure.score_copies(scorer, of_split, 6, 64, Source(64), gap)
        gain = exact.gain(0, without, 0)
        assert gain is not None and gain.value > 1.9 and gain.bases == 6 * 40
    mutated = measure.score_copies(scorer, of_split, 6, 64, Source(64, 0.05), 64).gain(0, without, 0)
    inverted = measure.score_copies(scorer, of_split, 6, 64, Source(64, inverted=True), 64).gain(
        0, without, 0
    )
    assert mutated is not None and 0.5 < mutated.value < 1.9
    assert inverted is not None and abs(inverted.value) < 0.1


def test_copies_of_masked_bases(index: ShardIndex) -> None:
    masks = []

    def nats(tokens: NDArray, labels: NDArray) -> NDArray:
        assert np.all((tokens == MASK) == (labels != -100))
        masks.append((tokens == MASK).sum())
        return labels * 0.0 + 1

    tally = measure.score_copies(Known(nats), windows(index, 512, "masked"), 6, 64, Source(64), 64)
    assert tally.bases.sum() == sum(masks) > 10


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_ranks_share_out_the_windows_without_changing_a_number(index: ShardIndex, objective: str) -> None:
    config = dataclasses.replace(CONFIG, causal=objective == "causal")
    torch.manual_seed(1)
    model = Reformer(config).eval()
    of_split = windows(index, objective=objective)

    def tallies(rank: int, ranks: int) -> list[measure.Tally]:
        scorer = Scorer(model, Place(rank, ranks, 2), None, "32", 1)
        return [
            measure.score_windows(scorer, of_split, 7, None)[1],
            measure.score_contexts(scorer, of_split, 7, [64, LENGTH]),
            measure.score_copies(scorer, of_split, 7, 48, Source(48), 64),
        ]

    of_one = tallies(0, 1)
    for whole, *parts in zip(of_one, *(tallies(rank, 3) for rank in range(3)), strict=True):
        merged = measure.Tally.merged(parts)
        assert len(whole.samples) == 7 and np.array_equal(merged.samples, whole.samples)
        assert np.array_equal(merged.nats, whole.nats) and np.array_equal(merged.bases, whole.bases)


def test_bf16_is_used_where_it_is_asked_for(index: ShardIndex) -> None:
    exact = measure.score_windows(real(), windows(index), 2, None)[1]
    half = measure.score_windows(dataclasses.replace(real(), precision="bf16"), windows(index), 2, None)[1]
    assert half.nats[:, 0] == pytest.approx(exact.nats[:, 0], rel=2e-2)
    assert not np.array_equal(half.nats, exact.nats)
