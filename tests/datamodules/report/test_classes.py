"""Classes of bases from a BED file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.order.planning import plan_windows
from megabase.datamodules.report.classes import REST, Classes
from tests.datamodules.order.made import Made, made

SEGMENTS = made([Made(b"A" * 60), Made(b"A" * 40, "valid", start=60), Made(b"C" * 30, "valid", record="s")])


def read(folder: Path, text: str, split: str = "valid") -> Classes:
    path = folder / "classes.bed"
    path.write_text(text)
    return Classes.read(path, SEGMENTS, split)


def test_a_base_is_in_every_class_whose_interval_holds_it_or_in_none(tmp_path: Path) -> None:
    text = "# genes\nr\t62\t70\tgene\tx\nr\t66\t72\trepeat\nr\t65\t68\tgene\ns\t0\t4\trepeat\nelsewhere\t1\t2\tgene\n"
    classes = read(tmp_path, text)
    assert classes.names == ("gene", "repeat", REST)
    gene, repeat, rest = classes.masks("r", 60, 15)
    assert np.flatnonzero(gene).tolist() == [*range(2, 10)]
    assert np.flatnonzero(repeat).tolist() == [*range(6, 12)]
    assert np.flatnonzero(rest).tolist() == [0, 1, 12, 13, 14]
    assert classes.masks("t", 0, 5).tolist() == [[False] * 5, [False] * 5, [True] * 5]


@given(st.lists(st.tuples(st.integers(60, 98), st.integers(1, 30), st.sampled_from("ab")), min_size=1))
def test_masks_are_those_of_a_loop(tmp_path_factory: pytest.TempPathFactory, spans: list) -> None:
    text = "".join(f"r\t{start}\t{start + size}\t{name}\n" for start, size, name in spans)
    classes = read(tmp_path_factory.mktemp("bed"), text)
    for begin, length in ((60, 40), (65, 3), (90, 10)):
        masks = classes.masks("r", begin, length)
        for name, mask in zip(classes.names[:-1], masks, strict=False):
            bases = {base for start, size, of in spans if of == name for base in range(start, start + size)}
            assert mask.tolist() == [base in bases for base in range(begin, begin + length)]


def test_windows_of_every_kind(tmp_path: Path, genomes: ShardIndex) -> None:
    bed = tmp_path / "classes.bed"
    bed.write_text("".join(f"{name}\t10\t30\tearly\n" for name in sorted(set(genomes.segments.record))))
    classes = Classes.read(bed, genomes.segments, "train")
    plan = plan_windows(genomes.segments, "train", 100, pack=True)
    segments, marked = genomes.segments, 0
    for sample in range(len(plan)):
        masks = classes.of_window(plan, segments, sample)
        assert masks.shape == (2, 100) and not (masks[0] & masks[1]).any()
        marked += int(masks[0].sum())
    # Windows hold each base of the split at most once; packing leaves out none of the short records.
    in_split = [
        len(range(max(10, start), min(30, start + length)))
        for start, length in zip(
            segments.start[segments.rows_of("train")], segments.length[segments.rows_of("train")], strict=True
        )
    ]
    assert 0 < marked <= sum(in_split)
    assert not classes.of_window(plan, segments, -1).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r\t1\t2\n", "line 1: 'r.t1.t2' is not chr, start, end and class with tabs between them"),
        ("r\t1\tx\tgene\n", "line 1: end 'x' is not a non-negative integer"),
        ("r\t5\t5\tgene\n", "holds no base: BED counts from 0"),
        ("# nothing\n", "holds no interval: give GFF features, or lines of chr, start, end, class"),
        (
            "chr1\t1\t2\tgene\nchr2\t1\t2\tgene\n",
            "names 'chr1', 'chr2', but the shards hold 'r', 's': use the names",
        ),
        ("r\t1\t20\tgene\n", "no interval holds a base of split 'valid'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read .*: give --annotation a BED file"):
        Classes.read(tmp_path / "none.bed", SEGMENTS, "valid")
    (tmp_path / "zipped.bed").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(DataError, match=r"not text .*: give --annotation a BED file, uncompressed"):
        Classes.read(tmp_path / "zipped.bed", SEGMENTS, "valid")
