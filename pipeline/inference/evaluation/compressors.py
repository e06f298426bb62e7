"""Bits per base of known compressors, for those whose program is installed.

A compressor starts without knowledge and learns from the split itself while it reads it. A model has learned from the
training split and does not change. So the numbers describe the sequence; they do not rank the model. Each program gets
the letters of the split, upper case, one byte a base.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.datamodules.errors import DataError
from megabase.datamodules.index.shard_index import ShardIndex

logger = logging.getLogger(__name__)

MOST_BASES = 16_000_000
TIMEOUT_S = 60.0
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Program:
    """A compressor.

    Attributes:
        name: of the program.
        arguments: its command line; IN and OUT stand for the files.
        output: the file that it writes; IN stands for its input.
    """

    name: str
    arguments: tuple[str, ...]
    output: str = "OUT"


PROGRAMS = (
    Program("GeCo3", ("-l", "3", "IN"), "IN.co"),
    Program("GeCo2", ("-l", "3", "IN"), "IN.co"),
    Program("cmix", ("-c", "IN", "OUT")),
    Program("brotli", ("--best", "--large_window=28", "--output=OUT", "IN")),
    Program("zstd", ("--ultra", "-22", "--long=27", "--quiet", "-o", "OUT", "IN")),
    Program("xz", ("-9e", "--keep", "--quiet", "IN"), "IN.xz"),
)


@dataclass(frozen=True)
class Compressed:
    """What a compressor reached: bits per base of `bases` bases."""

    name: str
    bits_per_base: float
    bases: int


def compress(index: ShardIndex, split: str, *, skip: bool = False) -> list[Compressed]:
    """The letters of a split with every compressor that is installed.

    A program that fails or takes longer than TIMEOUT_S is left out, with a message. Of a large split the first
    MOST_BASES letters are used.

    Args:
        index: the shards.
        split: its name.
        skip: leave out bases that cannot be read, instead of raising DataError.
    """
    programs = [program for program in PROGRAMS if shutil.which(program.name)]
    if not programs:
        return []
    with tempfile.TemporaryDirectory(prefix="megabase-") as directory:
        letters = Path(directory) / "letters"
        bases = _write_letters(index, split, letters, skip)
        results = [_run(program, letters) for program in programs] if bases else []
    return [
        Compressed(program.name, 8 * size / bases, bases)
        for program, size in zip(programs, results, strict=False)
        if size is not None
    ]


def _write_letters(index: ShardIndex, split: str, path: Path, skip: bool) -> int:
    """Write at most MOST_BASES letters of a split to a file; returns their number."""
    written = 0
    letters = np.frombuffer(index.alphabet.letters, np.uint8)
    with path.open("wb") as file:
        for row in index.segments.rows_of(split).tolist():
            length = int(index.segments.length[row])
            for start in range(0, length, _BLOCK):
                if written >= MOST_BASES:
                    return written
                try:
                    tokens = index.alphabet.encode(index.read(row, start, min(_BLOCK, length - start)))
                except DataError:
                    if not skip:
                        raise
                    continue
                found = letters[tokens[tokens >= FIRST_LETTER] - FIRST_LETTER][: MOST_BASES - written]
                written += file.write(found.tobytes())
    return written


def _run(program: Program, letters: Path) -> int | None:
    """Compress a file; returns the size of the result in bytes, or None if the program failed."""
    work = Path(tempfile.mkdtemp(dir=letters.parent))
    source, output = work / "bases", work / "compressed"
    source.hardlink_to(letters)
    names = {"IN": str(source), "OUT": str(output)}

    def filled(text: str) -> str:
        for short, path in names.items():
            text = text.replace(short, path)
        return text

    command = [program.name, *map(filled, program.arguments)]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, timeout=TIMEOUT_S)
        if done.returncode == 0:
            return Path(filled(program.output)).stat().st_size
        reason = f"it ended with code {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it took more than {TIMEOUT_S:g} s"
    except OSError as error:
        reason = str(error)
    logger.info(f"{program.name} is left out: {reason}")
    return None
