"""Shell commands that correct an input file, for messages: so that the way out of an error can be copied."""

import shlex
from pathlib import Path

from megabase.datamodules.prepare.annotated import SUFFIXES as ANNOTATED

PIPES = ".pipes-"
"""How the directory of the copies of pipes begins: it is removed at the end, so no command can name a file in it."""

_READERS = {".gz": "zcat", ".bgz": "zcat", ".zst": "zstdcat", ".zstd": "zstdcat"}


def with_t_for_u(path: Path) -> str:
    """How to write the sequences of a file with T for U."""
    return _rewritten(path, "dna", "sed '/^>/!y/Uu/Tt/'", "sed '2~4y/Uu/Tt/'") or "change it in the sequences"


def with_numbers(path: Path) -> str:
    """How to give every record of a file a name of its own."""
    fasta = """awk '/^>/ {sub(/^>/, ">" ++n ".")} 1'"""
    fastq = """awk 'NR % 4 == 1 {sub(/^@/, "@" ++n ".")} 1'"""
    return _rewritten(path, "numbered", fasta, fastq) or "rename one"


def _rewritten(path: Path, ending: str, fasta: str, fastq: str) -> str:
    """The command that writes a file through a filter into NAME.ENDING.fa; empty if it is no file of FASTA or FASTQ."""
    plain = path.with_suffix("") if path.suffix in _READERS else path
    suffix = plain.suffix.lower()
    if suffix in (".tar", ".jsonl", ".ndjson", *ANNOTATED) or path.parent.name.startswith(PIPES):
        return ""
    program = fastq if suffix in (".fq", ".fastq") else fasta
    target = plain.with_name(f"{plain.stem}.{ending}{plain.suffix}")
    reader = _READERS.get(path.suffix, "cat")
    return f"`{reader} {shlex.quote(str(path))} | {program} > {shlex.quote(str(target))}`"
