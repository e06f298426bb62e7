import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.alphabet import BOS, MASK, OTHER, PAD, SEP, Alphabet
from megabase.datamodules.errors import DataError

NAMES = ["dna", "protein", "bytes"]


def array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def test_the_vocabulary_is_the_contract() -> None:
    assert (PAD, BOS, SEP, MASK, OTHER) == (0, 1, 2, 3, 4)
    assert Alphabet.named("dna").encode(array(b"ACGTacgtNRU-")).tolist() == [5, 6, 7, 8] * 2 + [4] * 4
    assert {name: Alphabet.named(name).vocab_size for name in NAMES} == {
        "dna": 9,
        "protein": 25,
        "bytes": 261,
    }


@pytest.mark.parametrize("name", NAMES)
@given(text=st.binary())
def test_decode_undoes_encode_for_letters_and_marks_the_rest(name: str, text: bytes) -> None:
    alphabet = Alphabet.named(name)
    fold = bytes if name == "bytes" else bytes.upper
    expected = bytes(ord(alphabet.unknown) if byte not in alphabet.letters else byte for byte in fold(text))
    assert alphabet.decode(alphabet.encode(array(text))) == expected


def test_decode_leaves_special_tokens_out() -> None:
    dna = Alphabet.named("dna")
    assert dna.decode(np.array([BOS, 5, SEP, 6, MASK, OTHER, 8, PAD, PAD])) == b"ACNNT"
    for outside in (9, -1):
        with pytest.raises(IndexError):
            dna.decode(np.array([5, outside]))


def test_the_complement_pairs_iupac_codes_and_keeps_case() -> None:
    dna = Alphabet.named("dna")
    assert dna.reverse_complement(array(b"AACGTTRYKMBVDHSWN")).tobytes() == b"NWSDHBVKMRYAACGTT"
    assert dna.reverse_complement(array(b"acgtrykmbvdhswnu-")).tobytes() == b"-unwsdhbvkmryacgt"
    # Every code stands for a set of bases, and its complement for their partners.
    sets = {
        "A": "A",
        "C": "C",
        "G": "G",
        "T": "T",
        "R": "AG",
        "Y": "CT",
        "S": "CG",
        "W": "AT",
        "K": "GT",
        "M": "AC",
    }
    sets |= {"B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"}
    for code, stands_for in sets.items():
        partner = chr(dna.reverse_complement(array(code.encode()))[0])
        assert set(sets[partner]) == {"TGCA"["ACGT".index(base)] for base in stands_for}


@given(text=st.text(alphabet="ACGTRYSWKMBDHVNacgtryswkmbdhvn-.*").map(str.encode))
def test_the_reverse_complement_is_its_own_inverse(text: bytes) -> None:
    dna = Alphabet.named("dna")
    assert dna.reverse_complement(dna.reverse_complement(array(text))).tobytes() == text


@given(text=st.text(alphabet="ACgtNNNNrX").map(str.encode))
def test_gaps_are_the_maximal_runs_of_non_letters(text: bytes) -> None:
    gaps = Alphabet.named("dna").gaps(array(text))
    inside = np.zeros(len(text), bool)
    for start, length in gaps:
        assert length > 0
        inside[start : start + length] = True
    assert (inside == ~np.isin(array(text), array(b"ACGTacgt"))).all()
    assert (gaps[1:, 0] > gaps[:-1].sum(axis=1)).all()  # apart: neighbours would be one run


def test_an_alphabet_without_strands_has_no_complement() -> None:
    with pytest.raises(DataError, match="protein has no reverse complement"):
        Alphabet.named("protein").reverse_complement(array(b"MK"))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(DataError, match=r"unknown alphabet 'rna': choose one of dna, protein, bytes"):
        Alphabet.named("rna")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_as_narrow_as_they_can_be_and_any_shape_is_encoded(name: str) -> None:
    alphabet = Alphabet.named(name)
    every = np.arange(256, dtype=np.uint8).reshape(4, 64)
    tokens = alphabet.encode(every[:, ::2])  # not contiguous
    assert np.array_equal(tokens, alphabet.table[every[:, ::2]])
    assert tokens.dtype == alphabet.table.dtype == (np.int16 if name == "bytes" else np.uint8)
    many = np.resize(every, (3, 700_001))
    assert np.array_equal(alphabet.encode(many), alphabet.table[many])
    tokens[:] = 0  # belongs to the caller
    assert alphabet.encode(every).max() == alphabet.vocab_size - 1


def test_soft_masked_letters_are_those_in_lower_case() -> None:
    marked = Alphabet.named("dna").soft_masked(array(b"AacgtnrNT-"))
    assert marked.tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert Alphabet.named("protein").soft_masked(array(b"mMxX")).tolist() == [1, 0, 0, 0]
    with pytest.raises(DataError, match="bytes has no soft-masked letters: its upper and lower case differ"):
        Alphabet.named("bytes").soft_masked(array(b"a"))


def test_a_worker_gets_the_same_alphabet() -> None:
    assert pickle.loads(pickle.dumps(Alphabet.named("dna"))) is Alphabet.named("dna")


def test_the_other_strand_has_as_many_letters() -> None:
    dna = Alphabet.named("dna")
    every = np.arange(256, dtype=np.uint8)
    assert ((dna.encode(dna.reverse_complement(every)) >= 5)[::-1] == (dna.encode(every) >= 5)).all()
