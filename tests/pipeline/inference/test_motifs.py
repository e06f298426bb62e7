"""Masks of letters: what can be drawn under them is exactly what a search through all sequences finds."""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pytest

from megabase.datamodules.alphabet import Alphabet
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference import motifs
from megabase.pipeline.inference.motifs import IUPAC, Automaton, Guide, Motif, share_bounds

DNA, PROTEIN = Alphabet.named("dna"), Alphabet.named("protein")
GC = np.array([False, True, True, False])
BOTH_STRANDS = str.maketrans("ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN")


def numbers(letters: str) -> np.ndarray:
    return np.array(["ACGT".index(letter) for letter in letters], dtype=np.int64)


def guide(
    forbidden: Sequence[str],
    length: int,
    *,
    stops: Sequence[str] = (),
    prompt: str = "",
    bounds: tuple[int, int] | None = None,
) -> Guide:
    automaton = Automaton(
        [Motif.parse(text, DNA, "--forbid") for text in forbidden],
        [Motif.parse(text, DNA, "--stop") for text in stops],
        4,
    )
    return Guide(automaton.table([automaton.after(numbers(prompt))]), length, bounds, GC)


def drawable(of: Guide) -> set[str]:
    """All sequences that the masks allow, letter by letter; no sequence may get stuck."""
    found, rows, state = set(), [""], of.start([0])
    for step in range(of.length):
        allowed = of.allowed(state, step)
        assert allowed.any(1).all()
        row, letter = allowed.nonzero(as_tuple=True)
        state, stopped = of.advance(state[row], letter)
        rows = [rows[i] + "ACGT"[k] for i, k in zip(row.tolist(), letter.tolist(), strict=True)]
        found |= {rows[i] for i in stopped.nonzero().flatten().tolist()}
        state = state[~stopped]
        rows = [text for text, end in zip(rows, stopped.tolist(), strict=True) if not end]
    return found | set(rows)


def searched(forbidden: Sequence[str], length: int, prompt: str, bounds: tuple[int, int]) -> set[str]:
    """All sequences that complete no forbidden motif after the prompt, by regular expressions."""
    patterns = [re.compile(f"(?=({''.join(f'[{IUPAC[code]}]' for code in text)}))") for text in forbidden]
    found = set()
    for letters in map("".join, itertools.product("ACGT", repeat=length)):
        ends = [hit.end(1) for pattern in patterns for hit in pattern.finditer(prompt + letters)]
        count = sum(letter in "GC" for letter in letters)
        if all(end <= len(prompt) for end in ends) and bounds[0] <= count <= bounds[1]:
            found.add(letters)
    return found


@pytest.mark.parametrize(
    ("forbidden", "prompt", "bounds"),
    [
        (["GA"], "", (0, 6)),
        (["GATC", "AA", "CNNG"], "TTGAT", (0, 6)),
        (["GATC", "AA", "CNNG"], "TTGAT", (2, 3)),
        (["N"], "", (0, 6)),
        (["AA", "AC", "AG", "AT"], "", (0, 6)),  # A leads nowhere, but may be the last letter
        (["AN", "CAN"], "GATTACA", (0, 6)),
        (["WW", "SS"], "A", (3, 3)),
        (["WWW", "ACGTACGTACGT"], "WWW".replace("W", "A"), (0, 2)),
        ([], "", (3, 4)),
    ],
)
def test_exactly_the_sequences_without_a_motif_can_be_drawn(
    forbidden: list[str], prompt: str, bounds: tuple[int, int]
) -> None:
    expected = searched(forbidden, 6, prompt, bounds)
    of = guide(forbidden, 6, prompt=prompt, bounds=None if bounds == (0, 6) else bounds)
    if expected:
        assert drawable(of) == expected
    else:
        assert not of.allowed(of.start([0]), 0).any()


def test_a_sequence_ends_after_a_stop_motif_also_across_the_border_of_the_prompt() -> None:
    found = drawable(guide(["CC"], 4, stops=["TAR", "TGA"], prompt="TA"))
    assert {"A", "G"} <= found
    for letters in found:
        stop = re.search("TA[AG]|TGA", f"TA{letters}")
        assert len(letters) == 4 if stop is None else stop.end() == 2 + len(letters)
        assert "CC" not in letters
    assert "CTGA" in found and "TTAA" in found and "CTTT" in found


def test_a_gap_between_the_bounds_that_no_sequence_fills_is_found_while_drawing() -> None:
    """Only sequences of G and C, or of A and T, avoid these motifs; the bounds of both kinds enclose one half."""
    of = guide(["WS", "SW"], 4, bounds=(2, 2))
    assert not of.allowed(of.start([0]), 0).any()


def test_a_row_has_the_state_of_its_prompt() -> None:
    automaton = Automaton([Motif.parse("GAT", DNA, "--forbid")], [], 4)
    table = automaton.table([automaton.after(numbers(prompt)) for prompt in ("CGA", "", "TTG")])
    of = Guide(table, 5, None, GC)
    assert of.allowed(of.start([0, 1, 2, 0]), 0)[:, 3].tolist() == [False, True, True, False]


def test_the_reverse_complement_of_a_motif() -> None:
    for text in ("GATTACA", "RYSWKMBDHVN", "A"):
        opposite = Motif.parse(text.translate(BOTH_STRANDS)[::-1], DNA, "--forbid")
        assert Motif.parse(text, DNA, "--forbid").reverse_complement().places == opposite.places


def test_a_motif_of_residues() -> None:
    motif = Motif.parse("nX", PROTEIN, "--forbid")
    assert [len(place) for place in motif.places] == [1, 20]
    assert PROTEIN.letters[next(iter(motif.places[0]))] == ord("N")


@pytest.mark.parametrize("text", ["", "GAXC", "GA C", "G-C", "Ä"])
def test_motifs_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match=f"--stop {text!r}: "):
        Motif.parse(text, DNA, "--stop")


def test_too_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motifs, "MOST_STATES", 100)
    with pytest.raises(UserError, match="more than 100 states"):
        guide(["ANNNNNNNNNNA"], 5)
    monkeypatch.setattr(motifs, "MOST_COUNTS", 100)
    with pytest.raises(UserError, match="--gc with --forbid"):
        guide(["AAAAA"], 50, bounds=(0, 3))


def test_shares_become_numbers() -> None:
    assert share_bounds(0.4, 0.6, 10) == (4, 6)
    assert share_bounds(0.3, 0.3, 10) == (3, 3)  # 0.3 * 10 is 3.0000000000000004 in some orders of rounding
    assert share_bounds(0.1 + 0.2, 0.7, 100_000) == (30_000, 70_000)
    assert share_bounds(0.4, 0.45, 3) == (2, 1)
    assert share_bounds(0.0, 1.0, 7) == (0, 7)
