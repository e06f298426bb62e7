"""Scores of edits are differences between passes over whole sequences, on both strands, however they are read."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, Alphabet
from megabase.models import LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.pipeline.errors import RunError
from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.variants.edits import Edit, Strand, edit_of
from megabase.pipeline.inference.variants.reading import TERMS, Reader, batches
from megabase.pipeline.inference.variants.walk import groups, walk, walk_size
from megabase.pipeline.inference.variants.windows import windows, windows_size

DNA = Alphabet.named("dna")
SEEDS = Seeds(run=7)
RECORD = b"ACGTTGCANNNRacgtaccgattacagattGGCATCA" * 6
LENGTH = len(RECORD)
EDITS = [
    Edit("r", 0, 1, b"C"),  # the first base
    Edit("r", 0, 0, b"GATTACA"),  # before the first base
    Edit("r", 40, 41, b"T"),
    Edit("r", 40, 41, b"g"),
    Edit("r", 41, 44, b"CCC"),
    Edit("r", 41, 101, b""),
    Edit("r", 60, 60, b"ACGT" * 20),
    Edit("r", 100, 107, b"TNT"),
    Edit("r", LENGTH - 1, LENGTH, b"G"),  # the last base
    Edit("r", LENGTH - 3, LENGTH, b""),
    Edit("r", LENGTH, LENGTH, b"TT"),  # after the last base
]


@pytest.fixture(scope="module")
def model() -> Reformer:
    torch.manual_seed(3)
    config = ReformerConfig(
        vocab_size=9,
        dim=16,
        depth=3,
        heads=2,
        max_length=64,
        lsh=LSHConfig(chunk_length=8),
        local=LocalConfig(window=16),
    )
    made = Reformer(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return made


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    path = tmp_path_factory.mktemp("walk") / "genome.fa"
    path.write_bytes(b">other\nACGT\n>r\n" + RECORD + b"\n")
    return Genome(path)


def passed(model: Reformer, letters: bytes, reverse: bool) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probabilities of all bases of a sequence from one pass, and whether they are letters."""
    codes = np.frombuffer(letters, np.uint8)
    tokens = torch.tensor([[BOS, *DNA.encode(DNA.reverse_complement(codes) if reverse else codes).tolist()]])
    with torch.no_grad():
        log_probs = model(tokens, seeds=SEEDS).double().log_softmax(-1)[0, :-1]
    found = log_probs.gather(1, tokens[0, 1:, None]).squeeze(1).numpy()
    letter = (tokens[0, 1:] >= FIRST_LETTER).numpy()
    return np.where(letter, found, 0.0), letter


def expected(
    model: Reformer, edit: Edit, downstream: int, reverse: bool, context: int | None = None
) -> tuple:
    """The terms of one edit from two passes over whole sequences."""
    changed = RECORD[: edit.start] + edit.bases + RECORD[edit.end :]
    start = LENGTH - edit.end if reverse else edit.start
    first = 0 if context is None else max(0, start - context)
    found = []
    for letters, length in ((changed, len(edit.bases)), (RECORD, edit.end - edit.start)):
        letters = letters[: len(letters) - first] if reverse else letters[first:]
        log_probs, letter = passed(model, letters, reverse)
        a, b = start - first, start - first + length
        c = b + downstream
        found.append((log_probs[a:b].sum(), log_probs[b:c].sum(), letter[a:b].sum(), letter[b:c].sum()))
    (alternate, after, bases, n), (reference, reference_after, reference_bases, _) = found
    return alternate, reference, after, reference_after, bases, reference_bases, n


def close(found: NDArray[np.void], wanted: Sequence[tuple]) -> None:
    for row, values in zip(found, wanted, strict=True):
        for name, value in zip(TERMS.names, values, strict=True):  # type: ignore[arg-type]
            assert row[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("reverse", [False, True])
def test_walks_and_windows_give_what_passes_over_both_sequences_give(
    model: Reformer, genome: Genome, reverse: bool
) -> None:
    strand = Strand(genome, "r", DNA, reverse)
    wanted = [expected(model, edit, 20, reverse) for edit in EDITS]
    assert max(abs(values[2] - values[3]) for values in wanted) > 0.1  # variants change what follows
    for block, spread in ((1 << 14, 64), (50, 1)):
        done: list[int] = []
        reader = Reader(model, SEEDS, block=block, downstream=20, spread=spread)
        close(walk(reader, strand, EDITS, done.append), wanted)
        assert sum(done) == walk_size(strand, EDITS, 20)
    wanted = [expected(model, edit, 20, reverse, context=30) for edit in EDITS]
    for block in (1 << 14, 40):
        done = []
        reader = Reader(model, SEEDS, block=block, downstream=20)
        close(windows(reader, strand, EDITS, 30, done.append), wanted)
        assert sum(done) == windows_size(strand, EDITS, 30, 20)


def test_a_walk_ends_where_no_edit_needs_it(model: Reformer, genome: Genome) -> None:
    done: list[int] = []
    reader = Reader(model, SEEDS, downstream=0)
    found = walk(reader, Strand(genome, "r", DNA, False), EDITS[2:4], done.append)
    assert sum(done) == 41 + 2 and not found["downstream_bases"].any()
    assert walk(reader, Strand(genome, "r", DNA, False), [], done.append).shape == (0,)


def test_numbers_that_are_not_finite_are_an_error(model: Reformer, genome: Genome) -> None:
    broken = Reformer(dataclasses.replace(model.body.config, head_bias=True)).eval()
    with torch.no_grad():
        broken.head.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(RunError, match="not finite"):
        walk(Reader(broken, SEEDS), Strand(genome, "r", DNA, False), EDITS[:1], lambda _: None)


@pytest.mark.parametrize(
    ("start", "reference", "alternate", "edit", "kind"),
    [
        (5, b"A", b"C", (5, 6, b"C"), "snv"),
        (5, b"ACG", b"ATG", (6, 7, b"T"), "snv"),
        (5, b"ACGT", b"ATCT", (6, 8, b"TC"), "mnv"),
        (5, b"TT", b"T", (5, 6, b""), "deletion"),
        (5, b"T", b"TT", (5, 5, b"T"), "insertion"),
        (5, b"CTT", b"CT", (6, 7, b""), "deletion"),  # left-aligned, as it came
        (5, b"GCA", b"GA", (6, 7, b""), "deletion"),
        (5, b"TGC", b"TTGG", (6, 8, b"TGG"), "indel"),
        (5, b"ac", b"AG", (6, 7, b"G"), "snv"),
    ],
)
def test_what_ref_and_alt_share_is_cut_off(
    start: int, reference: bytes, alternate: bytes, edit: tuple, kind: str
) -> None:
    found = edit_of("r", start, reference, alternate)
    assert found == Edit("r", *edit) and found.kind == kind


def test_groups_and_batches_hold_every_edit_once(genome: Genome) -> None:
    strand = Strand(genome, "r", DNA, True)
    placed = [strand.place(number, edit) for number, edit in enumerate(EDITS)]
    for spread in (0, 1, 30, 1000):
        found = list(groups(placed, spread))
        assert sorted(edit.number for group in found for edit in group) == list(range(len(EDITS)))
        assert all(group[-1].start - group[0].start < max(1, spread) for group in found)
        assert all(a[-1].start < b[0].start for a, b in itertools.pairwise(found))
    lengths = [5, 0, 70, 3, 9, 9, 0]
    assert list(batches(lengths, 20, 2)) == [[3, 0], [4, 5], [2]]
