"""Windows that measure recall: whether a model predicts a stretch better if it has seen that stretch before.

In a window of held-out (or random) sequence, the last bases are the *copy*. They are never changed: `planted` writes
their *source*, the same bases, some distance before them. So the same bases are scored with and without a source, and
the difference in bits per base is what the model gains from the source alone. A source can be exact,
have a share of its bases changed, or be inverted, that is the reverse complement of the copy.

The first `WARM_UP` bases of a copy are not scored: no model can know yet that a copy has begun, or of which of the many
places before. About log_A(length) bases tell (8 for 64 thousand bases of DNA), and more if a base near the start is
changed. Bases that are not letters are not scored either.

Everything is a function of (seed, sample). Arrays hold tokens of an alphabet, one row for each window, without a bos.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, MASK, PAD, Alphabet, Codes
from megabase.datamodules.batches.collate import Batch
from megabase.datamodules.batches.numbered import EVALUATION_SEED, EvalBatches, Place
from megabase.datamodules.batches.visits import Windows
from megabase.datamodules.errors import DataError
from megabase.datamodules.order.hashing import Purpose, counted, derived, mix, uniform, visit_keys

WARM_UP = 24
"""Bases at the start of a copy that are not scored."""

SHORTEST, LONGEST = 2 * WARM_UP, 256
"""Bases of the copies that `copy_length` chooses."""

NEAREST = 64
"""The smallest distance that `distances` returns, in bases."""


@dataclass(frozen=True)
class Source:
    """What `planted` writes before a copy.

    Attributes:
        copy: bases of the copy, and of its source.
        changed: share of the source's bases that are changed, 0 to 1. A changed base always becomes another letter.
        inverted: write the reverse complement. dna only.
    """

    copy: int
    changed: float = 0.0
    inverted: bool = False


def copy_length(length: int) -> int | None:
    """Bases of a copy in windows of `length` bases: an eighth, SHORTEST to LONGEST; None if no copy fits."""
    if length < 2 * SHORTEST + NEAREST:
        return None
    return min(max(length // 8, SHORTEST), LONGEST)


def distances(length: int, copy: int) -> list[int]:
    """The powers of two from NEAREST on that fit between a source and its copy in windows of `length` bases."""
    most = length - 2 * copy
    return [
        1 << power
        for power in range(NEAREST.bit_length() - 1, max(most, 1).bit_length())
        if 1 << power <= most
    ]


def random_windows(alphabet: Alphabet, length: int, seed: int, samples: NDArray[np.int64]) -> Codes:
    """Windows of independent, equally frequent letters: (windows, length), a function of (seed, sample)."""
    keys = derived(_keys(seed, samples), Purpose.LETTERS)
    drawn = counted(keys[:, None], np.arange(length)) % np.uint64(len(alphabet.letters))
    return cast(Codes, (drawn + np.uint64(FIRST_LETTER)).astype(alphabet.table.dtype))


def planted(
    windows: Codes,
    alphabet: Alphabet,
    source: Source,
    gaps: NDArray[np.int64],
    ends: NDArray[np.int64] | None = None,
    *,
    seed: int,
    samples: NDArray[np.int64],
) -> Codes:
    """Windows with a source before each copy; everything else stays as it is.

    Args:
        windows: (n, length) tokens; they are not changed.
        alphabet: of the tokens.
        source: what is written.
        gaps: (n,) bases from the end of the source to the start of the copy.
        ends: (n,) the position after the copy; None: the end of the window.
        seed: of the changed bases; any integer.
        samples: (n,) int64, the other half of the key of a window's changes.

    Returns:
        (n, length) of the same dtype.

    Raises:
        DataError: a source would begin before its window, or the alphabet has no complement.
    """
    count, length = windows.shape
    ends = np.full(count, length) if ends is None else ends
    starts = ends - 2 * source.copy - gaps
    if count and (starts.min() < 0 or ends.max() > length):
        raise DataError(
            f"a copy of {source.copy} bases does not fit {gaps.max()} bases after its source in a window of {length}"
        )
    offsets = np.arange(source.copy)
    rows = np.arange(count)[:, None]
    written = windows[rows, (ends - source.copy)[:, None] + offsets]
    written = _changed(written, alphabet, source.changed, derived(_keys(seed, samples), Purpose.CHANGES))
    if source.inverted:
        written = _complements(alphabet)[written[:, ::-1]]
    result = windows.copy()
    result[rows, starts[:, None] + offsets] = written
    return result


def scored(windows: Codes, copy: int, ends: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
    """(n, length) which bases count: the letters of each copy after its first WARM_UP.

    Args:
        windows: (n, length) tokens.
        copy: bases of the copy.
        ends: (n,) the position after the copy; None: the end of the window.
    """
    count, length = windows.shape
    ends = np.full(count, length) if ends is None else ends
    positions = np.arange(length)
    inside = (positions >= (ends - copy + WARM_UP)[:, None]) & (positions < ends[:, None])
    return inside & (windows >= FIRST_LETTER)


def recall_batch(
    windows: Codes,
    labels: NDArray[np.bool_],
    samples: NDArray[np.int64],
    *,
    mask_rate: float | None = None,
    seed: int = EVALUATION_SEED,
) -> Batch:
    """A batch in which only some bases have labels.

    Args:
        windows: (n, length) tokens.
        labels: (n, length) bool, which bases to predict.
        samples: (n,) int64.
        mask_rate: None: predict each of them from the bases before it. A number: mask this share of them, and predict
            these from both sides. The choice depends on (seed, sample) only, not on the tokens.
        seed: of that choice.
    """
    if mask_rate is None:
        tokens = np.full_like(windows, BOS)
        tokens[:, 1:] = windows[:, :-1]
    else:
        keys = derived(_keys(seed, samples), Purpose.MASKS)
        labels = labels & (uniform(counted(keys[:, None], np.arange(windows.shape[1]))) < mask_rate)
        tokens = np.where(labels, np.array(MASK, windows.dtype), windows)
    hidden = np.where(labels, windows, np.array(PAD, windows.dtype))
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(hidden),
        None,
        torch.from_numpy(samples),
        float(labels.sum()),
    )


def probe_batches(
    windows: Windows, place: Place, most: int, copy: int, source: Source | None, gaps: Sequence[int]
) -> Iterator[Batch]:
    """Batches that score the copies at the ends of held-out windows. All ranks get equally many.

    Args:
        windows: of a split; its objective, and its cut, are those of the batches.
        place: of this process.
        most: number of windows, spread evenly over the split; 0: all.
        copy: bases of the copy at the end of each window.
        source: what is written before each copy; None: nothing, so that the same bases are scored without a source.
        gaps: distances; the windows take turns with them.
    """
    read = EvalBatches(replace(windows, mask_rate=None, cut=None), place, most)
    together = place.world_size * place.micro_batch
    for number in read.numbers():
        batch = read.batch(number)
        bases, samples = batch.codes[:, 1:].numpy(), batch.samples.numpy()
        labels = scored(bases, copy)
        if source is not None:
            turns = number * together + place.rank * place.micro_batch + np.arange(len(samples))
            of_each = np.array(gaps)[turns % len(gaps)]
            bases = planted(
                bases, windows.index.alphabet, source, of_each, seed=EVALUATION_SEED, samples=samples
            )
        batch = recall_batch(bases, labels, samples, mask_rate=windows.mask_rate)
        yield batch if windows.cut is None else batch.cut(*windows.cut)


def _keys(seed: int, samples: NDArray[np.int64]) -> NDArray[np.uint64]:
    return visit_keys(seed, np.zeros_like(samples), samples)


def _changed(codes: Codes, alphabet: Alphabet, share: float, keys: NDArray[np.uint64]) -> Codes:
    """(n, copy) tokens, of which a share is replaced by other letters. What is not a letter stays."""
    drawn = counted(keys[:, None], np.arange(codes.shape[1]))
    chosen = (uniform(drawn) < share) & (codes >= FIRST_LETTER)
    letters = len(alphabet.letters)
    steps = (mix(drawn) % np.uint64(letters - 1)).astype(np.int64) + 1
    others = (codes.astype(np.int64) - FIRST_LETTER + steps) % letters + FIRST_LETTER
    return cast(Codes, np.where(chosen, others, codes).astype(codes.dtype))


def _complements(alphabet: Alphabet) -> Codes:
    """(vocabulary,) token -> token of the complementary letter. Raises DataError without a complement."""
    letters = np.frombuffer(alphabet.letters, np.uint8)
    table = cast(Codes, np.arange(alphabet.vocab_size).astype(alphabet.table.dtype))
    # `reverse_complement` reverses as well.
    table[FIRST_LETTER:] = alphabet.encode(alphabet.reverse_complement(letters))[::-1]
    return table
