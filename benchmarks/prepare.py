"""The time of `megabase prepare` with its own tar writer and with webdataset's, and of copying the file.

    python benchmarks/prepare.py [--megabytes 500] [--repeats 3] [--folder DIR]

Prepares three inputs in this process: the E. coli genome of examples/data, a FASTA file of five long random records,
and one of reads of 150 bases. Each is prepared with both writers in turn, with a validation split of which the 31-mers
are compared with training, and copied with one fsync as the lower bound.
Prints wall time and CPU time, each the best of the repeats; the ratio is that of CPU time, because other work on the
machine disturbs it less. webdataset is imported before the clock starts; the time of that import is printed too, since
every worker process of `prepare` would pay it.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset

from megabase.datamodules.files import sync
from megabase.datamodules.prepare import tar_writer, writer
from megabase.datamodules.prepare.run import prepare

ECOLI = Path(__file__).parents[1] / "examples" / "data" / "ecoli_536.fna.gz"
READ_BASES = 150


class LibraryTarWriter(tar_writer.TarWriter):
    """The same tar, written by webdataset.TarWriter: owner, mode, time and format are set to those of ours."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._tar = webdataset.TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)
        self._tar.tarstream.format = tarfile.GNU_FORMAT  # the argument `format` is ignored (webdataset 1.0.2)

    def add(self, name: str, content: bytes) -> int:
        offset = self.size - tarfile.BLOCKSIZE  # the header replaces the first of the two end blocks
        key, _, kind = name.rpartition(".")
        self._tar.write({"__key__": key, kind: content})
        self.size += tar_writer.size_in_tar(len(content))
        return offset

    def finish(self) -> None:
        self._tar.close()
        self._file.truncate(self.size)  # the library pads to 10,240 bytes
        self._file.close()
        sync(self._path)


@contextmanager
def tar_writer_of(kind: type[tar_writer.TarWriter]) -> Iterator[None]:
    """Let `prepare` write its shards with another class."""
    before = writer.TarWriter
    writer.TarWriter = kind  # type: ignore[misc]
    try:
        yield
    finally:
        writer.TarWriter = before  # type: ignore[misc]


def write_fasta(path: Path, records: int, length: int) -> Path:
    """`records` records of `length` random letters each."""
    generator = np.random.default_rng(7)
    letters = np.frombuffer(b"ACGT", np.uint8)
    with path.open("wb") as file:
        for number in range(records):
            bases = letters[generator.integers(0, 4, length, np.uint8)].tobytes()
            file.write(b">record-%d\n%s\n" % (number, bases))
    return path


class Seconds(NamedTuple):
    """Wall time and CPU time of a call, in seconds."""

    wall: float
    cpu: float


def seconds(action: Callable[[], object]) -> Seconds:
    """Time a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def copied(source: Path, target: Path) -> None:
    """Copy a file and wait until it is on disk."""
    shutil.copyfile(source, target)
    sync(target)


def least(times: list[Seconds]) -> Seconds:
    """The least wall time and the least CPU time."""
    return Seconds(min(each.wall for each in times), min(each.cpu for each in times))


def measure(fasta: Path, folder: Path, repeats: int) -> dict[str, Seconds]:
    """The least times of each way; checks that both writers give the same shards."""
    times: dict[str, list[Seconds]] = defaultdict(list)
    kinds = {"own writer": tar_writer.TarWriter, "webdataset's writer": LibraryTarWriter}
    for _ in range(repeats):
        for name, kind in kinds.items():
            shards = folder / name
            shutil.rmtree(shards, ignore_errors=True)
            with tar_writer_of(kind):
                action = partial(prepare, [fasta], shards, jobs=1, progress=False)
                times[name].append(seconds(action))
        shutil.rmtree(folder / "split", ignore_errors=True)
        action = partial(prepare, [fasta], folder / "split", jobs=1, valid=0.1, progress=False)
        times["own, --valid 0.1"].append(seconds(action))  # this also samples 31-mers
        own, library = (
            {path.name: path.read_bytes() for path in (folder / name).glob("*.tar")} for name in kinds
        )
        assert own == library, "the two writers give different tars"
        times["copy"].append(seconds(partial(copied, fasta, folder / "copy")))
    return {name: least(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--megabytes", type=int, default=500, help="size of the generated inputs (default: 500)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, best counts (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    bases = options.megabytes * 10**6
    code = "import time; t = time.perf_counter(); import webdataset; print(time.perf_counter() - t)"
    print(
        f"import webdataset: {float(subprocess.check_output([sys.executable, '-c', code])):.1f} s", flush=True
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for label, make in (
            ("E. coli, 4.9 MB in gzip", lambda: ECOLI),
            (f"{options.megabytes} MB in 5 records", lambda: write_fasta(folder / "a.fa", 5, bases // 5)),
            (
                f"{options.megabytes // 10} MB in reads of {READ_BASES}",
                lambda: write_fasta(folder / "a.fa", bases // 10 // READ_BASES, READ_BASES),
            ),
        ):
            best = measure(make(), folder, options.repeats)
            ratio = best["own writer"].cpu / best["webdataset's writer"].cpu
            print(f"{label}: speed with webdataset's writer {ratio:.2f} of that with our own")
            for name, taken in best.items():
                print(f"    {name:20} wall {taken.wall:6.2f} s, CPU {taken.cpu:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
