"""RNA, proteins, masked and damaged files are told by their letters; genomes with IUPAC codes and runs of N pass."""

import gzip
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare.composition import Composition
from megabase.datamodules.prepare.foreign import index_tars
from megabase.datamodules.prepare.run import prepare

DNA, PROTEIN, BYTES = map(Alphabet.named, ("dna", "protein", "bytes"))
HEMOGLOBIN = b"MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLR"


def check(alphabet: Alphabet, *sequences: bytes) -> None:
    found = Composition("in.fa", alphabet)
    for sequence in sequences:
        found.add("r", sequence)
    found.check()


@pytest.mark.parametrize("at", [0, 1, (1 << 20) - 1, 1 << 20, 2 << 20])
def test_unknown_character_is_found_at_any_position(at: int) -> None:
    bases = bytearray(b"ACGTN" * ((2 << 20) // 5 + 1))
    check(DNA, bytes(bases))
    bases[at] = ord("!")
    for sequence in (bytes(bases), memoryview(bases)):
        with pytest.raises(DataError, match=f"here: record 'r' has '!' at base {at + 1}, "):
            Composition("in.fa", DNA).add("r", sequence, "here")


@pytest.mark.parametrize("alphabet", [DNA, PROTEIN, BYTES], ids=lambda alphabet: alphabet.name)
def test_just_the_known_characters_pass(alphabet: Alphabet) -> None:
    for byte in range(256):
        found = Composition("in.fa", alphabet)
        if alphabet.known[byte]:
            found.add("r", bytes([byte]))
        else:
            with pytest.raises(DataError):
                found.add("r", bytes([byte]))
    assert np.count_nonzero(alphabet.known) > 10


def test_protein_for_dna_is_named() -> None:
    with pytest.raises(DataError, match=r"has .L. at base 3, which is an amino acid .* --alphabet protein"):
        check(DNA, HEMOGLOBIN)
    with pytest.raises(
        DataError, match=r"has 'L' at base 3, which is not in the alphabet dna: correct the file"
    ):
        check(DNA, HEMOGLOBIN + b"!")
    check(PROTEIN, HEMOGLOBIN)


def test_dna_for_protein_is_refused() -> None:
    with pytest.raises(DataError, match=r"in.fa: is DNA: 100% of its letters are A, C, G, T or N: leave"):
        check(PROTEIN, b"ACGTNacgtn" * 9)
    check(PROTEIN, b"GATTACA")  # a peptide


def test_rna_for_protein_is_called_rna() -> None:
    with pytest.raises(
        DataError, match=r"in.fa: is RNA: 100% .* A, C, G, U or N: .* write U as T: `cat .*in.fa"
    ):
        check(PROTEIN, b"ACGUNacgun" * 9)
    with pytest.raises(DataError, match="has '!' at residue 3"):
        check(PROTEIN, b"MK!V")


def test_rna_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    rna = tmp_path / "my rna.fa.gz"
    rna.write_bytes(gzip.compress(b">UUU r\nACGUacgu\n>b\nGGCUU\n"))
    with pytest.raises(DataError, match=r"my rna.fa.gz: is RNA: 4 of its 13 letters are U") as error:
        prepare([rna], tmp_path / "out", progress=False)
    assert not (tmp_path / "out.partial").exists()
    command = str(error.value).split("`")[1]
    subprocess.run(["bash", "-c", command], check=True)
    converted = tmp_path / "my rna.dna.fa"
    assert converted.read_bytes() == b">UUU r\nACGTacgt\n>b\nGGCTT\n"
    assert prepare([converted], tmp_path / "out", progress=False).segments.letters.tolist() == [8, 5]
    kept = prepare([rna], tmp_path / "kept", progress=False, allow_other=True)
    assert kept.segments.letters.tolist() == [6, 3]
    check(DNA, b"ACGT" * 100 + b"U")  # one letter is a typing error


def test_masked_files_are_refused_above_the_stated_share() -> None:
    check(DNA, b"ACGT" * 100, b"N" * 599)
    with pytest.raises(
        DataError,
        match=r"in.fa: 601 of its 1,001 letters are not A, C, G or T \(N 590, R 11\), more than 60%",
    ):
        check(DNA, b"ACGT" * 100, b"N" * 590 + b"R" * 11)
    check(DNA, b"N" * 1000, b"ACGT" * 200)  # a record of N among others
    with pytest.raises(DataError, match=r"are not one of the 20 amino acids .X 500"):
        check(PROTEIN, b"X" * 500, HEMOGLOBIN)
    check(BYTES, b"N" * 1000)
    check(DNA)
    check(DNA, b"")


def test_an_index_of_foreign_tars_checks_likewise(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "seq": b"ACGU" * 9})
    with pytest.raises(DataError, match=r"a.tar: is RNA: 9 of its 36 letters are U"):
        index_tars(tmp_path, progress=False)
    assert index_tars(tmp_path, allow_other=True, progress=False).segments.letters.tolist() == [27]
