"""`megabase score --track`: what the model finds at every base, as bigWig files that genome browsers open.

    OUTPUT.tracks/hub.txt            a track hub in one file (UCSC "useOneFile on"), for the UCSC browser and IGV
    OUTPUT.tracks/logp.forward.bw    one file for each track and strand

All positions and letters are those of the forward strand: the reverse strand's file of A is the probability of T where
the reverse strand is read. A base that is not scored (N, or outside of the regions) has no value. While scoring, the
values of a task are rows of fp32 in a file of `partial`; NaN stands for no value.
"""

from __future__ import annotations

import errno
import itertools
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyBigWig
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabase.datamodules.alphabet import FIRST_LETTER, Alphabet
from megabase.models.generation import Reading
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.genome import Genome, Region
from megabase.pipeline.inference.model import Source
from megabase.pipeline.inference.partial import check_beside
from megabase.pipeline.readable import readable_size

LOGP, ENTROPY, ACGT = "logp", "entropy", "acgt"
NAMES = (LOGP, ENTROPY, ACGT)
ROWS_AT_ONCE = 1 << 18
"""Bases whose values are in memory at once while the bigWig files are written."""
BYTES_OF_VALUE = 6
"""In a bigWig file of values that cannot be compressed, zoom levels included (5.2 were measured)."""
COLORS = {
    LOGP: "31,119,180",
    ENTROPY: "127,127,127",
    "A": "44,160,44",
    "C": "31,119,180",
    "G": "255,165,0",
    "T": "214,39,40",
}
DESCRIPTIONS = {
    LOGP: "log-probability of the base, natural logarithm",
    ENTROPY: "entropy of the prediction, in nats",
    ACGT: "probability of each base",
}


@dataclass(frozen=True)
class Tracks:
    """What `--track` asks for.

    Attributes:
        names: of NAMES, in their order.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Tracks:
        """Read names with commas between them; None: no tracks. Raises UserError."""
        given = [] if text is None else [name.strip() for name in text.split(",")]
        unknown = [name for name in given if name not in NAMES]
        if unknown:
            raise UserError(f"--track {text}: {unknown[0]!r} is no track: choose from {', '.join(NAMES)}")
        return cls(tuple(name for name in NAMES if name in given))

    def check(self, alphabet: Alphabet, genome: Genome, regions: Sequence[Region]) -> None:
        """Raise UserError if the tracks cannot be made of this alphabet, or of these regions."""
        if ACGT in self.names and alphabet.name != "dna":
            raise UserError(
                f"--track {ACGT}: the model's alphabet is {alphabet.name!r}, without bases: leave it out"
            )
        if not self.names:
            return
        for one, other in itertools.pairwise(in_order(genome, regions)):
            if one.record == other.record and other.start < one.end:
                raise UserError(
                    f"--track: the regions {one.record}:{one.start}-{one.end} and {other.start}-{other.end} overlap, "
                    "and a base has one value in a track: merge them (bedtools merge), or leave --track out"
                )

    def check_directory(self, output: Path) -> None:
        """Raise UserError if the directory of the tracks is of another call, or has the table's own name."""
        if self.names:
            if directory_of(output) == output:
                raise UserError(
                    f"--output {output}: the tracks go to a directory of this name: take x.parquet"
                )
            check_beside(output, directory_of(output))

    @property
    def columns(self) -> list[str]:
        """The files of a strand: the tracks, with a file for each base in place of `acgt`."""
        return [name for name in self.names if name != ACGT] + (list("ACGT") if ACGT in self.names else [])

    @property
    def every_token(self) -> bool:
        """Whether the log-probabilities of all tokens are needed."""
        return ENTROPY in self.names or ACGT in self.names

    def values(self, found: Reading, tokens: Tensor, *, reverse: bool) -> Tensor:
        """The values (rows, n, columns) fp32 of tokens (rows, n), the last ones of `found`, NaN where there is none."""
        n, values = tokens.shape[1], []
        if LOGP in self.names:
            values.append(found.log_probs[:, -n:, None])
        if found.every_token is not None:
            every = found.every_token[:, -n:]
            if ENTROPY in self.names:
                values.append(-(every.exp() * every).where(every > -torch.inf, 0.0).sum(-1, keepdim=True))
            if ACGT in self.names:
                letters = every[..., FIRST_LETTER : FIRST_LETTER + 4].exp()
                values.append(letters.flip(-1) if reverse else letters)  # A and T, C and G are complements
        return torch.cat(values, dim=-1).where((tokens >= FIRST_LETTER)[..., None], torch.nan).float()


@dataclass(frozen=True)
class TrackRows:
    """The file of a task while it is written.

    Attributes:
        tracks: what to write.
        file: rows of all regions of the task, one after the other.
        reverse: whether the strand is the reverse one, which is read from the end.
        firsts: the row of the first base of each region that is read.
    """

    tracks: Tracks
    file: BinaryIO
    reverse: bool
    firsts: Sequence[int]

    def add(self, regions: Sequence[Sized], read: int, found: Reading, tokens: Tensor) -> None:
        """Write the values of a block.

        Args:
            regions: that are read together.
            read: bases of each that were read before.
            found: in the block, at its end.
            tokens: (rows, n) of the block.
        """
        values = self.tracks.values(found, tokens, reverse=self.reverse).cpu().numpy()
        for region, first, of_region in zip(regions, self.firsts, values, strict=True):
            n = min(tokens.shape[1], len(region) - read)
            position = len(region) - read - n if self.reverse else read
            self.file.seek((first + position) * row_bytes(self.tracks))
            self.file.write((of_region[:n][::-1] if self.reverse else of_region[:n]).astype("<f4").tobytes())


def row_bytes(tracks: Tracks) -> int:
    """Bytes of the values of a base."""
    return 4 * len(tracks.columns)


def in_order(genome: Genome, regions: Sequence[Region]) -> list[Region]:
    """The regions in the order of the genome."""
    order = {name: number for number, name in enumerate(genome.lengths)}
    return sorted(regions, key=lambda region: (order[region.record], region.start))


def directory_of(output: Path) -> Path:
    """The directory of the tracks beside the table."""
    return output.with_suffix(".tracks")


@dataclass(frozen=True)
class Hub:
    """What hub.txt says.

    Attributes:
        name: of the hub: letters, digits and _.
        assembly: the genome as the browser calls it.
        model: where the values come from.
    """

    name: str
    assembly: str
    model: str

    @classmethod
    def of(cls, output: Path, assembly: str, source: Source) -> Hub:
        """The hub of the tracks of a model."""
        return cls(re.sub(r"\W", "_", output.stem), assembly, f"{Path(source.path).name}, step {source.step}")

    def text(self, tracks: Tracks, strands: Sequence[str]) -> str:
        """The file, as UCSC's documentation of track hubs describes it."""
        stanzas = [
            {
                "hub": self.name,
                "shortLabel": self.name,
                "longLabel": f"megabase score of {self.model}",
                "useOneFile": "on",
                "email": "not.given@example.org",
            },
            {"genome": self.assembly},
        ]
        for name, strand in itertools.product(tracks.names, strands):
            label = {"shortLabel": f"{name} {strand}", "longLabel": f"{DESCRIPTIONS[name]}, {strand} strand"}
            shown = {"visibility": "full", "maxHeightPixels": "100:40:8"}
            if name != ACGT:
                limits = {LOGP: "-4:0", ENTROPY: f"0:{math.log(4):.3f}"}[name]
                stanzas.append(_track(name, strand) | label | shown | {"viewLimits": limits})
                continue
            parent = f"{ACGT}_{strand}"
            container = {"container": "multiWig", "aggregate": "stacked", "showSubtrackColorOnUi": "on"}
            stanzas.append(
                {"track": parent, "type": "bigWig", **container, **label, **shown, "viewLimits": "0:1"}
            )
            for base in "ACGT":
                of_base = {
                    "shortLabel": f"{base} {strand}",
                    "longLabel": f"probability of {base}, {strand} strand",
                }
                stanzas.append(_track(base, strand) | of_base | {"parent": parent})
        return "\n".join("".join(f"{key} {value}\n" for key, value in stanza.items()) for stanza in stanzas)


def _track(column: str, strand: str) -> dict[str, str]:
    return {
        "track": f"{column}_{strand}",
        "type": "bigWig",
        "bigDataUrl": f"{column}.{strand}.bw",
        "color": COLORS[column],
    }


def write_tracks(
    directory: Path,
    hub: Hub,
    tracks: Tracks,
    lengths: Mapping[str, int],
    regions: Sequence[Region],
    files: Mapping[str, Mapping[Region, tuple[Path, int]]],
) -> None:
    """Write hub.txt and the bigWig files into a new directory.

    Args:
        lengths: of all records of the genome, in its order.
        regions: those that were scored, in the same order.
        files: strand -> region -> the file of its values, and the row of its first base.

    Raises:
        OSError: they cannot be written.
    """
    # pyBigWig crashes if the disk is full.
    needed = BYTES_OF_VALUE * len(tracks.columns) * len(files) * sum(map(len, regions))
    if shutil.disk_usage(directory.parent).free < needed:
        raise OSError(errno.ENOSPC, f"the tracks need up to {readable_size(needed)} of free space")
    directory.mkdir()
    (directory / "hub.txt").write_text(hub.text(tracks, list(files)))
    for strand, of_strand in files.items():
        with ExitStack() as stack:
            outputs = []
            for column in tracks.columns:
                output = pyBigWig.open(str(directory / f"{column}.{strand}.bw"), "w")
                stack.callback(output.close)
                output.addHeader(list(lengths.items()))
                outputs.append(output)
            for region in regions:
                path, first = of_strand[region]
                for start, values in pieces(path, first, len(region), tracks):
                    add_values(outputs, region.record, region.start + start, values)


def pieces(path: Path, first: int, length: int, tracks: Tracks) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Position of the first base, and the values (n, columns), of pieces of a region."""
    columns = len(tracks.columns)
    for start in range(0, length, ROWS_AT_ONCE):
        n = min(ROWS_AT_ONCE, length - start)
        values = np.fromfile(path, "<f4", n * columns, offset=(first + start) * row_bytes(tracks))
        yield start, values.reshape(n, columns)


def add_values(outputs: Sequence[Any], record: str, start: int, values: NDArray[np.float32]) -> None:
    """Add the values (n, columns) of bases from `start` on to one bigWig file for each column, without NaN."""
    known = np.zeros(len(values) + 2, dtype=bool)
    known[1:-1] = ~np.isnan(values[:, 0])
    for begin, end in np.flatnonzero(known[1:] != known[:-1]).reshape(-1, 2).tolist():
        for output, column in zip(outputs, values.T, strict=True):
            output.addEntries(
                record, start + begin, values=np.ascontiguousarray(column[begin:end]), span=1, step=1
            )
