"""Inputs of `prepare` as files: patterns and directories become the sequence files in them, pipes become files."""

import glob
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megabase.datamodules.errors import DataError
from megabase.datamodules.index.index_file import INDEX_NAME
from megabase.datamodules.prepare.annotated import SUFFIXES as ANNOTATED
from megabase.datamodules.prepare.records import check_compression, plain_name
from megabase.datamodules.prepare.rewrite import PIPES

log = logging.getLogger(__name__)

STDIN = "-"
_SEQUENCES = (".fa", ".fasta", ".fna", ".ffn", ".frn", ".fas", ".fsa", ".fq", ".fastq", ".jsonl", ".ndjson")
_SUFFIXES = {"dna": (*_SEQUENCES, *ANNOTATED), "protein": (*_SEQUENCES, ".faa", ".pep")}
"""What a name must end in, before the suffix of a compression, for `expand` to take the file out of a directory."""

_SHOWN = 3
_COPY_BYTES = 1 << 20


def expand(inputs: Sequence[str | Path], alphabet: str = "dna") -> list[Path]:
    """Inputs as paths, in their order; a directory becomes its sequence files, a pattern its files, each sorted.

    A pattern has `*`, `?`, `[` or `**`. A name that exists is not taken as a pattern. Of a directory, subdirectories
    and hidden files are left out; for bytes every other file is taken, else those with a suffix of sequence files.

    Args:
        inputs: files, directories or patterns; "-" is the standard input.
        alphabet: decides which files of a directory are taken.

    Raises:
        DataError: no file matches a pattern, or a directory cannot be read, is a shard set or has no sequence file.
    """
    paths: list[Path] = []
    for name in map(str, inputs):
        if name == STDIN:
            paths.append(Path("/dev/stdin"))
        elif Path(name).is_dir():
            paths.extend(_files_of(Path(name), alphabet))
        elif not glob.has_magic(name) or Path(name).exists():
            paths.append(Path(name))
        else:
            paths.extend(_matching(name))
    return paths


def check_inputs(paths: Sequence[Path]) -> None:
    """Raise DataError if there is no path, or one is given twice, not a readable file, or compressed in another way."""
    if not paths:
        raise DataError("no input files: name at least one")
    known: set[Path] = set()
    for path in paths:
        if (place := path.absolute()) in known:
            raise DataError(f"{path}: is given twice: give every input once")
        known.add(place)
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if path.is_file():
            check_compression(path)
        elif not is_pipe(path):
            raise DataError(f"{path}: neither a file, a directory nor a pipe")


@contextmanager
def pipes_as_files(paths: Sequence[Path], folder: Path) -> Iterator[list[Path]]:
    """The paths, with every pipe replaced by a file with its content: an input is read more than once.

    The files are named pipe-1, pipe-2, ... or stdin, lie in a new directory in `folder`, and are removed at the end.

    Raises:
        DataError: a pipe cannot be read, or there is no room for its content.
    """
    if not any(map(is_pipe, paths)):
        yield list(paths)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=PIPES, dir=folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}): choose another output") from error
    with temporary as name:
        found: list[Path] = []
        for path in paths:
            found.append(_copied(path, Path(name), len(found) + 1) if is_pipe(path) else path)
            check_compression(found[-1])
        yield found


def is_pipe(path: Path) -> bool:
    """Whether a path is a pipe, a terminal or another device that gives its bytes once."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def prefixes(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each file that tells it from the others: its own without suffixes, and directories if necessary."""
    parts = {path: (*path.absolute().parent.parts[1:], _stem(path)) for path in paths}
    used, names = 1, {path: part[-1] for path, part in parts.items()}
    while clashing := {name for name, count in Counter(names.values()).items() if count > 1}:
        used += 1
        if used > max(map(len, parts.values())):  # a.fa and a.fa.gz
            return {path: str(path) if names[path] in clashing else names[path] for path in paths}
        names = {
            path: "/".join(parts[path][-used:]) if name in clashing else name for path, name in names.items()
        }
    return names


def prefixed(prefix: str, path: Path, name: str) -> str:
    """The name of a record of a file, with the file's prefix before it, or in place of the file's own name in it."""
    plain = plain_name(path)
    if name == plain or name.startswith(f"{plain}:"):  # a text, or a line of JSON without a name
        return prefix + name[len(Path(plain).stem) :]
    return f"{prefix}.{name}"


def _stem(path: Path) -> str:
    return Path(plain_name(path)).stem


def _files_of(directory: Path, alphabet: str) -> list[Path]:
    """The sequence files of a directory, sorted; says which files it leaves out."""
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{directory}: cannot be read ({error.strerror})") from error
    files = [path for path in entries if path.is_file() and not path.name.startswith(".")]
    if directory / INDEX_NAME in files:
        raise DataError(
            f"{directory}: holds shards, which are prepared already: give the sequence files that they were made of"
        )
    suffixes = _SUFFIXES.get(alphabet)
    taken = [path for path in files if _ends_in(path, suffixes)]
    left = [path.name for path in files if not _ends_in(path, suffixes)]
    if not taken:
        wanted = f" that ends in {', '.join(suffixes)}, plain or compressed" if suffixes else ""
        raise DataError(
            f"{directory}: a directory without a file{wanted}: give the files themselves, or a quoted pattern such as "
            f"'{directory}/**/*.fa'"
        )
    if left:
        more = f" and {len(left) - _SHOWN:,} more" if len(left) > _SHOWN else ""
        log.warning(
            "%s: left out %s%s: not sequence files by name", directory, ", ".join(left[:_SHOWN]), more
        )
    if deeper := [path.name for path in entries if path.is_dir()]:
        log.warning(
            "%s: its directories are left out (%s): a quoted pattern such as '%s/**/*.fa' takes their files too",
            *(directory, ", ".join(deeper[:_SHOWN]), directory),
        )
    return taken


def _ends_in(path: Path, suffixes: tuple[str, ...] | None) -> bool:
    return not suffixes or plain_name(path).lower().endswith(suffixes)


def _matching(pattern: str) -> list[Path]:
    matches = glob.iglob(pattern, recursive=True)  # noqa: PTH207 - pathlib takes no absolute pattern
    found = sorted(path for path in map(Path, matches) if path.is_file())
    if not found:
        raise DataError(f"{pattern}: no file matches this pattern: correct it, or name the files themselves")
    return found


def _copied(path: Path, folder: Path, number: int) -> Path:
    """Copy what a pipe gives into a file."""
    target = folder / ("stdin" if path == Path("/dev/stdin") else f"pipe-{number}")
    if path == Path("/dev/stdin") and sys.stdin is not None and os.isatty(0):
        log.warning("reading sequences from the terminal: end them with Ctrl-D")
    try:
        with path.open("rb") as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _COPY_BYTES)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be copied to a file beside the output ({error.strerror}): a pipe's content needs "
            "room there"
        ) from error
    return target
