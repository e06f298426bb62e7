from pathlib import Path

import numpy as np
import pytest

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.segments import Part
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare
from megabase.datamodules.report.markov import bits_of_parts, bits_per_base


def test_e_coli_s_published_figures(ecoli_shards: ShardIndex) -> None:
    measured = bits_per_base(ecoli_shards, orders=(0, 1, 2, 3, 5, 8))
    expected = {0: 2.0002, 1: 1.9844, 2: 1.9654, 3: 1.9529, 5: 1.9407, 8: 1.9552}
    assert measured == pytest.approx(expected, abs=1e-4)


def naive(train: list[str], valid: list[str], order: int) -> float:
    """Order-k model with Laplace's rule, one base at a time."""
    counts: dict[str, dict[str, int]] = {}

    def words(texts: list[str]) -> list[str]:
        found = [text[i : i + order + 1].upper() for text in texts for i in range(len(text) - order)]
        return [word for word in found if set(word) <= set("ACGT")]

    for word in words(train):
        context = counts.setdefault(word[:-1], dict.fromkeys("ACGT", 1))
        context[word[-1]] += 1
    scored = [counts.get(word[:-1], dict.fromkeys("ACGT", 1)) for word in words(valid)]
    nats = [-np.log2(c[word[-1]] / sum(c.values())) for c, word in zip(scored, words(valid), strict=True)]
    return float(np.mean(nats))


@pytest.mark.parametrize("order", range(6))
def test_contexts_cross_neither_gaps_nor_segments(gappy_shards: ShardIndex, order: int) -> None:
    segments = gappy_shards.segments
    texts: dict[str, list[str]] = {}
    for row in range(len(segments)):
        bases = gappy_shards.read(row, 0, int(segments.length[row])).tobytes().decode()
        texts.setdefault(segments.split[row], []).append(bases)
    assert bits_per_base(gappy_shards, [order])[order] == pytest.approx(
        naive(texts["train"], texts["valid"], order)
    )


def test_counts_continue_across_blocks(ecoli_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bits_per_base(ecoli_shards, [3])
    monkeypatch.setattr("megabase.datamodules.report.markov._BLOCK", 100_003)
    assert bits_per_base(ecoli_shards, [3]) == whole


def test_limit_on_bases_spreads_the_sample_evenly(
    ecoli_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cap, far fewer bases are read, from the whole split, and the answer stays near."""
    monkeypatch.setattr("megabase.datamodules.report.markov._BLOCK", 10_000)
    read: list[tuple[int, int]] = []
    original = ShardIndex.read

    def spy(index: ShardIndex, row: int, start: int, length: int) -> np.ndarray:
        read.append((start, length))
        return original(index, row, start, length)

    monkeypatch.setattr(ShardIndex, "read", spy)
    capped = bits_per_base(ecoli_shards, [2], fit_bases=400_000, score="train", score_bases=400_000)
    starts, lengths = np.array(read).T
    assert 800_000 <= lengths.sum() <= 840_000
    assert np.histogram(starts, bins=10, range=(0, 4_445_000))[0].min() >= 6
    assert capped[2] == pytest.approx(1.9654, abs=0.01)


@pytest.mark.slow
def test_orders_that_cannot_be_counted_are_refused(ecoli_shards: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'test' holds no run of 3 letters"):
        bits_per_base(ecoli_shards, [2], score="test")
    with pytest.raises(DataError, match="Markov order 12 with 4 letters"):
        bits_per_base(ecoli_shards, [12])
    (tmp_path / "a.txt").write_bytes(b"abab" * 100)
    text = prepare([tmp_path / "a.txt"], tmp_path / "out", "bytes", valid=0.1, jobs=1, progress=False)
    measured = bits_per_base(text)
    assert list(measured) == [0, 1, 2]  # as many as can be counted with 256 letters
    assert measured[1] < measured[0] < 8
    with pytest.raises(DataError, match="Markov order 3 with 256 letters"):
        bits_per_base(text, [3])


def test_unreadable_bases_are_left_out_on_request(lambda_fasta: Path, tmp_path: Path) -> None:
    index = prepare([lambda_fasta], tmp_path / "shards", valid=0.4, progress=False)
    whole = bits_per_base(index, [2])
    shard = index.directory / index.segments.shard[0]
    content = bytearray(shard.read_bytes())
    content[index.segments.offset[0]] ^= 1
    shard.write_bytes(content)
    damaged = ShardIndex.open(index.directory)
    with pytest.raises(DataError, match="differ from their checksum"):
        bits_per_base(damaged, [2])
    partial = bits_per_base(damaged, [2], skip=True)
    assert partial != whole
    assert partial[2] == pytest.approx(whole[2], abs=0.05)


def test_parts_are_scored_with_the_letters_before_them(gappy_shards: ShardIndex) -> None:
    row = int(gappy_shards.segments.rows_of("train")[0])
    train = [
        gappy_shards.read(each, 0, int(gappy_shards.segments.length[each])).tobytes().decode()
        for each in gappy_shards.segments.rows_of("train")
    ]
    first = next(text for text in train)
    parts = {"two": [Part(row, 0, 40), Part(row, 60, 30)], "one": [Part(row, 60, 30)]}
    found = bits_of_parts(gappy_shards, parts, [2])
    assert found["two"][2] == pytest.approx(naive(train, [first[:40], first[58:90]], 2))
    assert found["one"][2] == pytest.approx(naive(train, [first[58:90]], 2))
    with pytest.raises(DataError, match="nothing holds no run of 3 letters"):
        bits_of_parts(gappy_shards, {"nothing": []}, [2])
