"""prepare: the same bytes however many processes did it and however often it was killed; and its check."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from megabase.datamodules.errors import DataError
from megabase.datamodules.prepare import unfinished
from megabase.datamodules.prepare.call import units_of
from megabase.datamodules.prepare.check import check
from megabase.datamodules.prepare.run import prepare

LENGTHS = (9000, 5000, 3000, 200, 100, 1)


OPTIONS: dict[str, Any] = {"valid": 0.2, "shard_bytes": 4096, "progress": False}


BLOCKED = """
import os, signal, sys, time
from pathlib import Path
import megabase.datamodules.prepare.run as module

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts in the background without
read, blocked, doing = module.read_file, Path(sys.argv[1]), sys.argv[2]

def read_and_stop(path, *rest):
    for record in read(path, *rest):
        yield record
        if path.name == "f1.fa" and doing == "wait":
            blocked.touch()
            time.sleep(600)
        if path.name == "f1.fa" and doing == "die":
            os.kill(os.getpid(), signal.SIGKILL)

module.read_file = read_and_stop

if __name__ == "__main__":
    module.prepare(sys.argv[5:], sys.argv[3], valid=0.2, shard_bytes=4096, jobs=int(sys.argv[4]), progress=False)
"""


@pytest.fixture
def fastas(tmp_path: Path, write_fasta: Callable[[Path, dict[str, bytes]], Path]) -> list[Path]:
    """Files of three records each, the first the largest; the last ones are small enough to share a unit."""
    generator = np.random.default_rng(1)
    bases = np.frombuffer(b"ACGTNacgt", np.uint8)
    paths = []
    for number, length in enumerate(LENGTHS):
        records = {f"r{number}.{part}": generator.choice(bases, length).tobytes() for part in range(3)}
        paths.append(write_fasta(tmp_path / f"f{number}.fa", records))
    return paths


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def undisturbed(fastas: list[Path], tmp_path: Path) -> dict[str, bytes]:
    prepare(fastas, tmp_path / "whole", jobs=1, **OPTIONS)
    return content(tmp_path / "whole")


class Blocked:
    """A prepare in a process of its own that stops, or dies, in the middle of the second file."""

    def __init__(self, fastas: list[Path], output: Path, jobs: int, doing: str = "wait") -> None:
        script, mark = output.with_suffix(".py"), output.with_suffix(".blocked")
        script.write_text(BLOCKED)
        command = [sys.executable, str(script), str(mark), doing, str(output), str(jobs), *map(str, fastas)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._mark = mark
        self._manifest = output.with_name(output.name + ".partial") / "part-00000.parquet"

    def wait(self) -> None:
        """Until the first file is done and the second is being read."""
        until = time.monotonic() + 60
        while not (self._mark.exists() and self._manifest.exists()):
            assert self.process.poll() is None and time.monotonic() < until
            time.sleep(0.01)

    def end(self, number: signal.Signals) -> str:
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[1]


def test_text_becomes_shards(tmp_path: Path) -> None:
    text = b"In the beginning " * 100
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "other.txt").write_bytes(text[:50])
    index = prepare(
        [tmp_path / "book.txt.gz", tmp_path / "other.txt"],
        tmp_path / "new" / "out",
        "bytes",
        valid="other.txt",
    )
    assert index.segments.record.tolist() == ["book.txt", "other.txt"]
    assert index.segments.split.tolist() == ["train", "valid"]
    assert index.read(0, 0, len(text)).tobytes() == text
    assert len(index.segments.gaps) == 0


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b">a\nACGT\n>a\nACGT\n", {}, "in.fa: a second record is named 'a'"),
        (b">a\nACGT\n", {"valid": "b"}, "--valid: no record is named 'b'; the records are a$"),
        (b">a\nACGT\n", {"valid": "a"}, "--valid a name every record: leave one to train on"),
        (b">a\n>b\n", {}, "hold no base at all"),
        (b">a\nACGT\n", {"alphabet": "rna"}, "unknown alphabet 'rna'"),
        (gzip.compress(b">a\nACGT\n", mtime=0)[:-4], {}, "cut off or damaged"),
        (b">a\nACGT\n", {"jobs": 0}, "--jobs 0: must be at least 1"),
    ],
)
def test_bad_input_leaves_no_output(
    tmp_path: Path, text: bytes, options: dict[str, Any], message: str
) -> None:
    fasta = tmp_path / "in.fa"
    fasta.write_bytes(text)
    with pytest.raises(DataError, match=message):
        prepare([fasta], tmp_path / "out", progress=False, **options)
    assert list(tmp_path.iterdir()) == [fasta]


def test_intervals_are_the_splits(tmp_path: Path, lambda_fasta: Path, lambda_bases: bytes) -> None:
    bed = tmp_path / "split.bed"
    name = gzip.decompress(lambda_fasta.read_bytes()).split()[0][1:].decode()
    bed.write_text(f"{name}\t100\t20000\ttrain\n{name}\t20100\t30000\tvalid\n")
    index = prepare([lambda_fasta], tmp_path / "out", intervals=bed, progress=False)
    assert index.segments.split.tolist() == ["train", "valid"]
    assert index.segments.start.tolist() == [0, 20050]
    assert index.segments.intervals.tolist() == [[100, 19900], [50, 9900]]
    assert index.read(1, 50, 9900).tobytes() == lambda_bases[20100:30000]
    bed.write_text("lambda\t100\t20000\ttrain\n")  # so no unit holds a 31-mer
    with pytest.raises(
        DataError, match=rf"split.bed: line 1: no record is named 'lambda'; the records are {re.escape(name)}"
    ):
        prepare([lambda_fasta], tmp_path / "none", intervals=bed, progress=False)
    bed.write_text(f"{name}\t100\t20000\ttest\n")
    with pytest.raises(DataError, match=r"split.bed: no interval is for training"):
        prepare([lambda_fasta], tmp_path / "none", intervals=bed, progress=False)


def test_reads_are_split_whole(tmp_path: Path) -> None:
    reads, chance = tmp_path / "reads.fa", np.random.default_rng(2)
    bases = np.frombuffer(b"ACGT", np.uint8)
    reads.write_bytes(b"".join(b">%d\n%s\n" % (n, chance.choice(bases, 50).tobytes()) for n in range(300)))
    index = prepare([reads], tmp_path / "out", valid=0.2, split_by="record", progress=False)
    assert set(index.segments.length) == {50}
    assert 30 < (index.segments.split == "valid").sum() < 90
    reads.write_bytes(b">a\nACGT\n>b\nCCGT\n")
    with pytest.raises(
        DataError,
        match=r"--split-by record gives no record to valid: there are too few",
    ):
        prepare([reads], tmp_path / "none", valid=0.001, split_by="record", progress=False)


def test_the_bar_reaches_the_input_s_bytes(
    lambda_fasta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    prepare([lambda_fasta], tmp_path / "out")
    shown = capsys.readouterr()
    assert "Preparing" in shown.err
    assert "15.4/15.4 kB" in shown.err
    assert shown.out == ""


def test_neighbours_that_are_small_share_a_unit() -> None:
    paths = [Path(name) for name in "abcdef"]
    units = units_of(paths, [100, 4, 4, 4, 9, 1], shard_bytes=80)
    assert [(unit.number, [path.name for path in unit.paths]) for unit in units] == [
        (0, ["a"]),
        (1, ["b", "c"]),
        (3, ["d"]),
        (4, ["e", "f"]),
    ]


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(
    fastas: list[Path], undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(fastas, tmp_path / "three", jobs=3, valid=0.2, shard_bytes=4096)
    assert content(tmp_path / "three") == undisturbed
    assert len(undisturbed) > 5
    total = sum(path.stat().st_size for path in fastas) / 1000
    assert f"{total:.1f}/{total:.1f} kB" in capsys.readouterr().err


def test_webdataset_reads_every_record_of_prepare_once(fastas: list[Path], tmp_path: Path) -> None:
    index = prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)
    urls = [str(Path(index.directory) / name) for name in index.sizes]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    names = [json.loads(sample["json"])["record"] for sample in found]
    assert names == [f"r{number}.{part}" for number in range(len(LENGTHS)) for part in range(3)]
    assert len({sample["__key__"] for sample in found}) == len(found)
    assert index.segments.source.tolist()[:2] == ["f0.fa", "f0.fa"]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_prepare_continues(
    fastas: list[Path], undisturbed: dict[str, bytes], tmp_path: Path, jobs: int
) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    killed = Blocked(fastas, output, jobs)
    killed.wait()
    assert killed.end(signal.SIGKILL) == ""
    assert not output.exists()
    made = (partial / "part-00000-00000.tar").stat().st_mtime_ns
    prepare(fastas, output, jobs=2, **OPTIONS)
    assert content(output) == undisturbed
    assert (output / "shard-00000.tar").stat().st_mtime_ns == made  # kept, not written again
    assert not partial.exists()


@pytest.mark.slow
def test_prepare_killed_at_any_rename_continues(
    fastas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file in OUTPUT.partial that matters comes there by a rename."""
    options = {**OPTIONS, "shard_bytes": 3000, "jobs": 1}
    rename, renamed = Path.rename, 0

    def stopping(path: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += 1
        if renamed == stop:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopping)
    stop = 0
    prepare(fastas[2:], tmp_path / "whole", **options)
    undisturbed, total = content(tmp_path / "whole"), renamed
    assert total > 8
    for stop in range(1, total + 1):
        renamed = 0
        output = tmp_path / f"out{stop}"
        with pytest.raises(KeyboardInterrupt):
            prepare(fastas[2:], output, **options)
        assert not output.exists()
        prepare(fastas[2:], output, **options)
        assert content(output) == undisturbed


@pytest.mark.slow
def test_interrupted_prepare_ends_its_workers_and_keeps_finishedunits_of(
    fastas: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    stopped = Blocked(fastas, tmp_path / "out", 2)
    stopped.wait()
    said = stopped.end(signal.SIGINT)
    assert said.count("Traceback") == 1 and said.endswith("KeyboardInterrupt\n")
    prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_file_of_a_killed_worker_is_named(fastas: list[Path], tmp_path: Path) -> None:
    died = Blocked(fastas, tmp_path / "out", 2, "die").process
    said = died.communicate(timeout=60)[1]
    assert died.returncode == 1
    assert re.search(
        r"DataError: .*f1.fa: the process that worked on it was killed by signal 9 \(out of", said
    )


@pytest.mark.slow
def test_second_prepare_on_the_same_output_is_refused(
    fastas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Blocked(fastas, tmp_path / "out", 1)
    first.wait()
    monkeypatch.setattr(unfinished, "_LOCK_TRIES", 2)
    with pytest.raises(DataError, match=r"out\.partial: another prepare is writing it"):
        prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)
    first.end(signal.SIGKILL)


def break_second(fastas: list[Path], output: Path) -> bytes:
    """A prepare that fails at the second file, the first being done; returns what the file held before."""
    before = fastas[1].read_bytes()
    fastas[1].write_bytes(b"no genome")
    with pytest.raises(DataError, match=r"f1.fa: not FASTA .*; what is finished stays in .*out\.partial"):
        prepare(fastas, output, jobs=1, **OPTIONS)
    assert (output.parent / "out.partial" / "part-00000.parquet").exists()
    return before


def test_after_a_bad_file_is_corrected_finished_files_are_kept(
    fastas: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    fastas[1].write_bytes(break_second(fastas, tmp_path / "out"))
    prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)
    assert content(tmp_path / "out") == undisturbed


def test_shards_that_were_cut_short_are_made_again(
    fastas: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    fastas[1].write_bytes(break_second(fastas, tmp_path / "out"))
    shard = tmp_path / "out.partial" / "part-00000-00000.tar"
    os.truncate(shard, shard.stat().st_size - 1)
    prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)
    assert content(tmp_path / "out") == undisturbed


def test_other_inputs_or_arguments_do_not_continue(fastas: list[Path], tmp_path: Path) -> None:
    fastas[1].write_bytes(break_second(fastas, tmp_path / "out"))
    for options, what in (({"valid": 0.3}, "--valid"), ({"field": "x", "valid": 0.2}, "--field")):
        with pytest.raises(DataError, match=rf"out\.partial: was begun with other arguments \({what}\)"):
            prepare(fastas, tmp_path / "out", jobs=1, **{**OPTIONS, **options})
    with pytest.raises(DataError, match=r"other arguments \(INPUT\)"):
        prepare(fastas[1:], tmp_path / "out", jobs=1, **OPTIONS)
    fastas[0].write_bytes(fastas[0].read_bytes() + b">more\nACGT\n")
    with pytest.raises(
        DataError, match=r"f0.fa: has changed since .*out\.partial: remove that directory to start again$"
    ):
        prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)


def test_name_in_two_files_is_an_error_that_a_rename_fixes(fastas: list[Path], tmp_path: Path) -> None:
    text = fastas[1].read_text()
    fastas[1].write_text(text.replace(">r1.2", ">r0.1"))
    with pytest.raises(
        DataError, match=r"f1.fa: a second record is named 'r0.1' \(the first is in .*f0.fa\)"
    ):
        prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)
    fastas[1].write_text(text)
    index = prepare(fastas, tmp_path / "out", jobs=1, **OPTIONS)
    assert len(set(index.segments.source)) == len(LENGTHS)


def test_existing_outputs_are_never_changed(fastas: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out already exists: delete it or choose another output"):
        prepare(fastas, tmp_path / "out", **OPTIONS)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").touch()
    with pytest.raises(DataError, match=r"new\.partial: exists and holds mine"):
        prepare(fastas, tmp_path / "new", **OPTIONS)
    assert (tmp_path / "new.partial" / "mine").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_the_slurm_script_passes_arguments_and_exit_code(tmp_path: Path, code: int) -> None:
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\necho "$SRUN_CPUS_PER_TASK: $@"\nexit {code}\n')
    srun.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "3",
    }
    script = Path(__file__).parents[3] / "slurm" / "prepare.sbatch"
    done = subprocess.run(
        ["bash", script, "a b.fa", "out", "--valid", "0.1"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stdout == "3: --export=ALL megabase prepare a b.fa out --valid 0.1 --jobs 3\n"


@pytest.mark.slow
def test_output_that_appears_meanwhile_keeps_the_finished_work(
    fastas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    publish = unfinished.Unfinished.publish

    def late(*arguments: Any) -> None:
        output.mkdir()
        publish(*arguments)

    monkeypatch.setattr(unfinished.Unfinished, "publish", late)
    with pytest.raises(DataError, match="out already exists: delete it or choose another output"):
        prepare(fastas, output, jobs=1, **OPTIONS)
    monkeypatch.undo()
    assert list((tmp_path / "out.partial").glob("part-*.parquet"))
    output.rmdir()
    assert check(prepare(fastas, output, jobs=1, **OPTIONS).directory, progress=False) > 0


def test_output_may_have_an_unusual_name(
    fastas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check(prepare(fastas, "hg38:v2", jobs=1, **OPTIONS).directory, progress=False) > 0
    for output, message in ((".", "already exists"), ("s3://bucket/out", "written to a local directory")):
        with pytest.raises(DataError, match=message):
            prepare(fastas, output, **OPTIONS)


def test_a_split_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(f">one\n{'ACGT' * 1000}\n")
    with pytest.raises(
        DataError, match="--valid 1e-05 takes no base of any record for valid: every record is too"
    ):
        prepare([tmp_path / "a.fa"], tmp_path / "none", valid="1e-05", progress=False)
