"""Small shard sets, made once per session."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.prepare.run import prepare

DATA = Path(__file__).parents[1] / "data"
ECOLI = Path(__file__).parents[2] / "examples" / "data" / "ecoli_536.fna.gz"


@pytest.fixture(scope="session")
def lambda_fasta() -> Path:
    return DATA / "lambda_phage.fna.gz"


@pytest.fixture(scope="session")
def lambda_bases(lambda_fasta: Path) -> bytes:
    """The genome as a few lines read it, without the code under test."""
    lines = gzip.decompress(lambda_fasta.read_bytes()).split(b"\n")
    return b"".join(line for line in lines if not line.startswith(b">"))


@pytest.fixture(scope="session")
def lambda_shards(lambda_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    output = tmp_path_factory.mktemp("lambda") / "shards"
    return prepare([lambda_fasta], output, valid=0.2, test=0.1, progress=False)


@pytest.fixture(scope="session")
def ecoli_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    output = tmp_path_factory.mktemp("ecoli") / "shards"
    return prepare([ECOLI], output, valid=0.1, progress=False)


@pytest.fixture(scope="session")
def gappy_records() -> dict[str, bytes]:
    """Records of many lengths with runs of N, ambiguity codes and lower case."""
    generator = np.random.default_rng(3)
    records = {}
    for number, length in enumerate((5000, 64, 1, 777, 0, 4096, 130)):
        bases: NDArray[np.uint8] = generator.choice(np.frombuffer(b"ACGTacgt", np.uint8), length)
        for start in generator.integers(0, max(length, 1), length // 300):
            bases[start : start + generator.integers(1, 250)] = ord("N")
        bases[generator.integers(0, max(length, 1), length // 500)] = ord("r")
        records[f"r{number}"] = bases.tobytes()
    return records


@pytest.fixture(scope="session")
def write_fasta() -> Callable[[Path, dict[str, bytes]], Path]:
    def write(path: Path, records: dict[str, bytes]) -> Path:
        with path.open("wb") as file:
            for name, bases in records.items():
                file.write(b">" + name.encode() + b" made up\n")
                for start in range(0, len(bases), 60):
                    file.write(bases[start : start + 60] + b"\n")
        return path

    return write


@pytest.fixture(scope="session")
def gappy_shards(
    gappy_records: dict[str, bytes],
    write_fasta: Callable[[Path, dict[str, bytes]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ShardIndex:
    """`gappy_records` in shards of few records each."""
    folder = tmp_path_factory.mktemp("gappy")
    fasta = write_fasta(folder / "gappy.fa", gappy_records)
    return prepare([fasta], folder / "shards", valid=0.2, test="r3", shard_bytes=8192, progress=False)


def random_bases(length: int) -> bytes:
    """Both cases, and a run of N over a twentieth."""
    bases = np.random.default_rng(length).choice(np.frombuffer(b"ACGTacgt", np.uint8), length)
    bases[length // 3 : length // 3 + length // 20] = ord("N")
    return bases.tobytes()


@pytest.fixture(scope="session")
def genomes(
    write_fasta: Callable[[Path, dict[str, bytes]], Path], tmp_path_factory: pytest.TempPathFactory
) -> ShardIndex:
    """Two genomes, with scaffolds of 20 to 90 bases beside longer records."""
    folder = tmp_path_factory.mktemp("genomes")
    one = {f"a{n}": random_bases(length) for n, length in enumerate([3000, 50, 20, 700, 90, 33])}
    two = {f"b{n}": random_bases(length) for n, length in enumerate([40, 900, 61, 25])}
    inputs = [write_fasta(folder / "a.fa", one), write_fasta(folder / "b.fa", two)]
    return prepare(inputs, folder / "shards", valid=0.1, progress=False)
