import numpy as np
import pytest
import torch

from megabase.datamodules.alphabet import FIRST_LETTER, MASK, OTHER, PAD, SEP, Alphabet
from megabase.datamodules.batches.collate import Batch, Raw, Special, causal_batch, masked_batch, masked_count
from megabase.datamodules.order.hashing import visit_keys

DNA = Alphabet.named("dna")


def windows(*texts: bytes) -> np.ndarray:
    return np.stack([np.frombuffer(text, np.uint8) for text in texts])


def raw(sequences: np.ndarray, samples: list[int] | None = None, specials: tuple[Special, ...] = ()) -> Raw:
    """Windows as they come from the shards; a sample of -1 is filler."""
    ids = np.arange(len(sequences)) if samples is None else np.array(samples)
    return Raw(np.pad(sequences, ((0, 0), (1, 0))), ids, ids < 0, specials)


def test_labels_are_the_bases_and_tokens_the_ones_before() -> None:
    batch = causal_batch(raw(windows(b"ACgN", b"TTRA"), [7, 3]), DNA, 99)
    wide = batch.widened()
    assert wide.tokens.tolist() == [[1, 5, 6, 7], [1, 8, 8, 4]]
    assert wide.labels.tolist() == [[5, 6, 7, -100], [8, 8, -100, 5]]
    assert wide.weights is None
    assert batch.samples.tolist() == [7, 3]
    assert (batch.targets, batch.skipped) == (99.0, 0)
    assert {wide.tokens.dtype, wide.labels.dtype, batch.samples.dtype} == {torch.int64}


def test_a_batch_for_the_next_base_is_one_byte_a_token() -> None:
    batch = causal_batch(raw(windows(b"ACgN", b"TTRA")), DNA, 99)
    assert batch.codes.dtype == torch.uint8 and batch.codes.shape == (2, 5)
    assert (batch.hidden, batch.soft) == (None, None)
    assert batch.tokens.data_ptr() + 1 == batch.labels.data_ptr()


def test_filler_has_no_label() -> None:
    wide = causal_batch(raw(windows(b"ACGT", b"ACGT"), [-1, 0]), DNA, 4).widened()
    assert wide.tokens.tolist() == [[1, 0, 0, 0], [1, 5, 6, 7]]
    assert wide.labels.tolist() == [[-100] * 4, [5, 6, 7, 8]]


def test_separators_and_padding_are_tokens_but_no_labels() -> None:
    specials = (Special(0, 1, 2, SEP), Special(0, 4, 6, PAD))
    wide = causal_batch(raw(windows(b"A\0GT\0\0"), specials=specials), DNA, 3).widened()
    assert wide.tokens.tolist() == [[1, 5, SEP, 7, 8, PAD]]
    assert wide.labels.tolist() == [[5, -100, 7, 8, -100, -100]]
    sequences = raw(windows(b"A\0GT\0\0"), specials=specials)
    wide = masked_batch(
        sequences, DNA, 3, keys=visit_keys(0, *np.zeros((2, 1), np.int64)), rate=1.0
    ).widened()
    assert wide.labels.tolist() == [[5, -100, 7, 8, -100, -100]]
    assert wide.tokens[0, [1, 4, 5]].tolist() == [SEP, PAD, PAD]


def test_soft_masked_letters_weigh_less_whatever_the_objective() -> None:
    sequences = raw(windows(b"ACgnT", b"aNttG"), [3, -1])
    wide = causal_batch(sequences, DNA, 4, 0.25).widened()
    assert wide.weights is not None and wide.weights.dtype == torch.float32
    scored = wide.labels != -100
    assert scored.tolist() == [[True, True, True, False, True], [False] * 5]
    assert wide.weights[scored].tolist() == [1, 1, 0.25, 1]
    batch = masked_batch(sequences, DNA, 4, 0.0, keys=np.zeros(2, np.uint64), rate=1.0)
    wide = batch.widened()
    assert wide.weights is not None and wide.weights[wide.labels != -100].tolist() == [1, 1, 0, 1]
    assert wide.weights.shape == wide.labels.shape == wide.tokens.shape


def test_every_byte_of_a_text_is_a_label() -> None:
    batch = causal_batch(raw(windows(bytes(range(256)))), Alphabet.named("bytes"), 256)
    assert batch.codes.dtype == torch.int16
    assert batch.widened().labels[0].tolist() == list(range(5, 261))


def masked(
    sequences: np.ndarray, rate: float = 0.15, seed: int = 1, epoch: int = 0, alphabet: str = "dna"
) -> Batch:
    samples = np.arange(len(sequences))
    keys = visit_keys(seed, np.full_like(samples, epoch), samples)
    return masked_batch(raw(sequences), Alphabet.named(alphabet), 99, keys=keys, rate=rate)


def random_dna(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).choice(np.frombuffer(b"ACGTacgt", np.uint8), shape)


def test_masked_labels_are_the_bases_that_were_chosen() -> None:
    sequences = random_dna(3, 1000)
    sequences[1, 100:700] = ord("N")
    bases = torch.from_numpy(DNA.encode(sequences))
    batch = masked(sequences)
    chosen = batch.labels != PAD
    assert chosen.sum(1).tolist() == [150, 60, 150]
    assert torch.equal(batch.labels[chosen], bases[chosen])
    assert torch.equal(batch.tokens[~chosen], bases[~chosen])
    assert (batch.labels[chosen] >= FIRST_LETTER).all()
    assert (batch.tokens[1, 100:700] == OTHER).all()
    assert batch.targets == 99.0
    assert {batch.tokens.dtype, batch.labels.dtype} == {torch.uint8}
    wide = batch.widened()
    assert {wide.tokens.dtype, wide.labels.dtype, batch.samples.dtype} == {torch.int64}
    assert torch.equal(wide.labels != -100, chosen)


@pytest.mark.parametrize(("alphabet", "letters"), [("dna", 4), ("bytes", 256)])
def test_of_the_chosen_bases_80_percent_are_masked_10_random_10_unchanged(
    alphabet: str, letters: int
) -> None:
    batch = masked(random_dna(50, 8000), alphabet=alphabet)
    chosen = batch.labels != PAD
    labels, tokens = batch.labels[chosen], batch.tokens[chosen]
    n = len(labels)
    assert n == 60_000
    # A random letter is the one that was there once in so many times.
    expected = {"mask": 0.8, "same": 0.1 + 0.1 / letters, "other": 0.1 * (1 - 1 / letters)}
    found = {
        "mask": (tokens == MASK).sum().item() / n,
        "same": (tokens == labels).sum().item() / n,
        "other": ((tokens != MASK) & (tokens != labels)).sum().item() / n,
    }
    for kind, share in expected.items():
        assert abs(found[kind] - share) < 4.5 * (share * (1 - share) / n) ** 0.5, kind
    replaced = tokens[(tokens != MASK) & (tokens != labels)]
    assert set(replaced.tolist()) == set(range(FIRST_LETTER, FIRST_LETTER + letters))


def test_every_letter_is_as_likely_to_be_chosen_and_apart_from_the_others() -> None:
    chosen = (masked(random_dna(4000, 100), rate=0.2).labels != PAD).double()
    assert (chosen.mean(0) - 0.2).abs().max() < 4.5 * (0.2 * 0.8 / 4000) ** 0.5
    # With a fixed number in a window, two positions are very slightly against each other: -1 / 99.
    together = torch.corrcoef(chosen.T).fill_diagonal_(0)
    assert together.abs().max() < 5 / 4000**0.5 + 1 / 99


def test_masks_are_a_function_of_seed_epoch_and_window() -> None:
    sequences = random_dna(4, 500)
    first = masked(sequences)
    again = masked(sequences)
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.labels, first.labels)
    for other in (masked(sequences, seed=2), masked(sequences, epoch=1)):
        assert not torch.equal(other.labels, first.labels)
    # Not of the place in the batch, nor of the others in it.
    keys = visit_keys(1, np.array([0]), np.array([2]))
    alone = masked_batch(raw(sequences[2:3], [2]), DNA, 1, keys=keys, rate=0.15)
    assert torch.equal(alone.tokens[0], first.tokens[2])
    assert not torch.equal(first.labels[0] != PAD, first.labels[1] != PAD)


def test_masks_never_change() -> None:
    """A run resumed by a later version must see the same: these numbers never change."""
    batch = masked(windows(*[b"ACGTACGTACGTACGTACGT"] * 2), rate=0.4, seed=5, epoch=3)
    assert ["".join("   *nACGT"[token] for token in row) for row in batch.tokens.tolist()] == [
        "A*GT*C*C***TACGTAC*T",
        "A*GT*CGT*C**ACGT*C*T",
    ]
    chosen = (batch.labels != PAD).int().tolist()
    assert ["".join(map(str, row)) for row in chosen] == [
        "01001011111000000010",
        "01001000101100011010",
    ]


def test_filler_and_windows_without_letters_have_no_label() -> None:
    sequences = windows(b"ACGT", b"NNRN", b"ACNN")
    samples = [-1, 0, 1]
    keys = visit_keys(0, np.zeros(3, np.int64), np.array(samples))
    batch = masked_batch(raw(sequences, samples), DNA, 1, keys=keys, rate=0.15)
    assert batch.tokens[0].tolist() == [PAD] * 4
    assert (batch.labels != PAD).sum(1).tolist() == [0, 0, 1]


def test_every_window_with_a_letter_has_a_label_and_none_more_than_letters() -> None:
    letters = np.array([0, 1, 2, 3, 10, 100, 8192])
    assert masked_count(letters, 0.15).tolist() == [0, 1, 1, 1, 2, 15, 1229]
    assert masked_count(letters, 1e-9).tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert masked_count(letters, 1.0).tolist() == letters.tolist()
