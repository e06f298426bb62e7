"""Windows that measure recall: what is planted, what is scored, and that both are functions of (seed, sample)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, MASK, OTHER, PAD, Alphabet
from megabase.datamodules.batches.numbered import Place
from megabase.datamodules.batches.visits import evaluation_windows
from megabase.datamodules.config import DataConfig
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report import recall
from megabase.datamodules.report.recall import Source

DNA = Alphabet.named("dna")
SAMPLES = np.arange(20)


def test_random_windows_are_a_function_of_seed_and_sample() -> None:
    windows = recall.random_windows(DNA, 1000, 3, SAMPLES)
    assert windows.dtype == DNA.table.dtype and windows.shape == (20, 1000)
    assert np.array_equal(recall.random_windows(DNA, 1000, 3, SAMPLES[5:7]), windows[5:7])
    assert not np.array_equal(recall.random_windows(DNA, 1000, 4, SAMPLES), windows)
    counts = np.bincount(windows.reshape(-1), minlength=9)
    assert counts[:FIRST_LETTER].sum() == 0 and np.all(abs(counts[FIRST_LETTER:] - 5000) < 300)
    # Neighbours are independent: every pair of letters is equally frequent.
    pairs = np.bincount((windows[:, :-1] * 9 + windows[:, 1:]).reshape(-1))
    assert np.all(abs(pairs[pairs > 0] - 20 * 999 / 16) < 200)


@given(
    copy=st.integers(1, 60),
    gap=st.integers(0, 60),
    end=st.integers(180, 200),
    seed=st.integers(0, 2**40),
    inverted=st.booleans(),
)
def test_the_source_is_the_copy_and_nothing_else_changes(
    copy: int, gap: int, end: int, seed: int, inverted: bool
) -> None:
    windows = recall.random_windows(DNA, 200, seed, SAMPLES)
    gaps, ends = np.full(20, gap), np.full(20, end)
    result = recall.planted(
        windows, DNA, Source(copy, inverted=inverted), gaps, ends, seed=seed, samples=SAMPLES
    )
    start = end - 2 * copy - gap
    found, expected = result[:, start : start + copy], windows[:, end - copy : end]
    for source, stretch in zip(found, expected, strict=True):
        letters = np.frombuffer(DNA.decode(stretch), np.uint8)
        wanted = DNA.reverse_complement(letters) if inverted else letters
        assert DNA.decode(source) == wanted.tobytes()
    elsewhere = np.ones(200, bool)
    elsewhere[start : start + copy] = False
    assert np.array_equal(result[:, elsewhere], windows[:, elsewhere])


def test_changed_bases_are_other_letters_in_the_share_that_was_asked_for() -> None:
    samples = np.arange(200)
    windows = recall.random_windows(DNA, 600, 1, samples)
    gaps = samples % 80
    changed = recall.planted(windows, DNA, Source(256, 0.03), gaps, seed=1, samples=samples)
    exact = recall.planted(windows, DNA, Source(256), gaps, seed=1, samples=samples)
    differs = changed != exact
    assert differs.sum() / (200 * 256) == pytest.approx(0.03, abs=0.003)
    assert changed[differs].min() >= FIRST_LETTER
    # Each of the three other letters is as likely.
    steps = np.bincount((changed[differs].astype(int) - exact[differs]) % 4)
    assert steps[0] == 0 and np.all(abs(steps[1:] - differs.sum() / 3) < 90)
    again = recall.planted(windows[7:9], DNA, Source(256, 0.03), gaps[7:9], seed=1, samples=samples[7:9])
    assert np.array_equal(again, changed[7:9])
    everything = recall.planted(windows, DNA, Source(256, 1.0), gaps, seed=1, samples=samples)
    start = 600 - 512 - gaps[3]
    assert np.all(everything[3, start : start + 256] != exact[3, start : start + 256])


def test_what_is_not_a_letter_is_neither_changed_nor_scored() -> None:
    windows = recall.random_windows(DNA, 200, 1, SAMPLES)
    windows[:, 190] = OTHER
    result = recall.planted(windows, DNA, Source(50, 1.0), np.full(20, 30), seed=1, samples=SAMPLES)
    assert np.all(result[:, 70 + 40] == OTHER)
    labels = recall.scored(windows, 50)
    assert np.flatnonzero(labels[0]).tolist() == [*range(150 + recall.WARM_UP, 190), *range(191, 200)]
    ends = np.where(SAMPLES % 2, 200, 100)
    assert np.flatnonzero(recall.scored(windows, 50, ends)[0]).tolist() == [*range(50 + recall.WARM_UP, 100)]


def test_a_batch_predicts_the_scored_bases_only() -> None:
    windows = recall.random_windows(DNA, 200, 1, SAMPLES)
    labels = recall.scored(windows, 60)
    wide = recall.recall_batch(windows, labels, SAMPLES).widened()
    assert np.all(wide.tokens[:, 0].numpy() == BOS)
    assert np.array_equal(wide.tokens[:, 1:].numpy(), windows[:, :-1])
    assert np.array_equal(wide.labels.numpy() != -100, labels)
    assert np.array_equal(wide.labels.numpy()[labels], windows[labels])

    batch = recall.recall_batch(windows, labels, SAMPLES, mask_rate=0.5)
    wide = batch.widened()
    masked = wide.tokens.numpy() == MASK
    assert np.array_equal(wide.labels.numpy() != -100, masked) and batch.targets == masked.sum()
    assert np.array_equal(wide.labels.numpy()[masked], windows[masked])
    assert np.all(labels[masked]) and masked.sum() / labels.sum() == pytest.approx(0.5, abs=0.08)
    # The same bases are masked with a source and without one.
    other = recall.planted(windows, DNA, Source(60), np.full(20, 10), seed=1, samples=SAMPLES)
    tokens = recall.recall_batch(other, labels, SAMPLES, mask_rate=0.5).widened().tokens
    assert np.array_equal(tokens.numpy() == MASK, masked)


def test_distances_are_powers_of_two_that_fit() -> None:
    assert recall.copy_length(8192) == 256 and recall.copy_length(1024) == 128
    assert recall.distances(1024, 128) == [64, 128, 256, 512]
    assert recall.distances(1 << 16, 256)[-1] == 1 << 15
    assert recall.copy_length(159) is None and recall.copy_length(160) == 48
    assert recall.distances(160, 48) == [64] and recall.distances(159, 48) == []


def test_a_copy_that_does_not_fit_and_an_alphabet_without_two_strands() -> None:
    windows = recall.random_windows(DNA, 200, 1, SAMPLES)
    with pytest.raises(DataError, match="copy of 90 bases does not fit 30 bases after its source"):
        recall.planted(windows, DNA, Source(90), np.full(20, 30), seed=1, samples=SAMPLES)
    protein = Alphabet.named("protein")
    windows = recall.random_windows(protein, 200, 1, SAMPLES)
    with pytest.raises(DataError, match="no reverse complement"):
        recall.planted(windows, protein, Source(50, inverted=True), np.full(20, 30), seed=1, samples=SAMPLES)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_probes_of_held_out_windows_are_the_same_on_any_number_of_ranks(
    gappy_shards: ShardIndex, objective: str
) -> None:
    config = DataConfig(length=256, objective=objective, mask_rate=0.3, min_real=0.1)
    windows = evaluation_windows(config, gappy_shards, "valid")

    def probes(ranks: int, source: Source | None) -> dict[int, tuple[list[int], list[int]]]:
        found = {}
        for rank in range(ranks):
            for batch in recall.probe_batches(windows, Place(rank, ranks, 2), 5, 48, source, [64, 128]):
                wide = batch.widened()
                for sample, tokens, labels in zip(batch.samples, wide.tokens, wide.labels, strict=True):
                    found[int(sample)] = (tokens.tolist(), labels.tolist())
        found.pop(-1, None)
        return found

    one = probes(1, Source(48, 0.03))
    assert len(one) == min(5, len(windows.plan)) and one == probes(3, Source(48, 0.03))
    without = probes(1, None)
    assert {sample: labels for sample, (_, labels) in one.items()} == {
        sample: labels for sample, (_, labels) in without.items()
    }
    differing = [np.flatnonzero(np.not_equal(one[sample][0], without[sample][0])) for sample in sorted(one)]
    for turn, places in enumerate(differing):  # tokens follow bos in causal batches
        start = 256 - 96 - [64, 128][turn % 2] + (objective == "causal")
        assert np.all((places >= start) & (places < start + 48))
    assert sum(map(len, differing)) > 30
    assert PAD not in one[0][0]
