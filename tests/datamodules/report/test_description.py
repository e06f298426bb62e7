"""What `megabase data` says, against counts made by hand from the records."""

import json
from pathlib import Path

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.report import description as report

LETTERS = b"ACGTacgt"


def parts_of(records: dict[str, bytes]) -> dict[str, list[bytes]]:
    """Split -> its segments: `gappy_shards` has valid=0.2 and test="r3"."""
    parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    for name, bases in records.items():
        cut = 0 if name == "r3" else len(bases) - round(0.2 * len(bases))
        parts["test" if name == "r3" else "valid"].append(bases[cut:])
        parts["train"].append(bases[:cut])
    return {split: [part for part in segments if part] for split, segments in parts.items()}


def letters_in(bases: bytes) -> int:
    return sum(base in LETTERS for base in bases)


def windows_in(segment: bytes, length: int) -> int:
    starts = range(0, len(segment) - length + 1, length)
    return sum(letters_in(segment[start : start + length]) >= length / 2 for start in starts)


def test_numbers_are_those_counted_by_hand(gappy_shards: ShardIndex, gappy_records: dict[str, bytes]) -> None:
    found = report.describe(gappy_shards)
    assert found.alphabet == "dna"
    assert found.records == sum(1 for bases in gappy_records.values() if bases)
    tars = list(Path(found.directory).glob("*.tar"))
    assert found.shards == len(tars)
    assert found.bytes == sum(tar.stat().st_size for tar in tars)
    assert found.longest == report.RecordReport("r0", 5000)
    assert found.shortest == report.RecordReport("r2", 1)
    assert [part.split for part in found.splits] == ["train", "valid", "test"]
    parts = parts_of(gappy_records)
    for part in found.splits:
        segments = parts[part.split]
        assert part.segments == len(segments)
        assert part.bases == sum(map(len, segments))
        assert part.letters == sum(map(letters_in, segments))
        for name, length in report.LENGTHS.items():
            assert part.windows[name] == sum(windows_in(segment, length) for segment in segments)
    assert found.splits[0].windows["1k"] > 0
    assert found.splits[0].leakage is None
    assert found.splits[1].leakage == 0
    assert sum(found.sources.values()) == sum(map(len, gappy_records.values()))


def test_json_is_plain(gappy_shards: ShardIndex) -> None:
    found = report.describe(gappy_shards)
    assert json.loads(json.dumps(found.as_dict()))["splits"][0]["windows"] == found.splits[0].windows
