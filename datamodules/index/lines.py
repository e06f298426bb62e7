"""Sequences stored in lines of one width, as in FASTA: where a base lies, and bases without the line ends."""

import numpy as np
from numpy.typing import NDArray


def byte_of(
    base: int | NDArray[np.int64], line_bases: int | NDArray[np.int64], line_bytes: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Bytes between the first base of a sequence and base number `base`; arguments broadcast.

    Args:
        base: number of a base, from 0.
        line_bases: bases per line; 0 if there are no line ends between the bases.
        line_bytes: bytes per line with its line end; 0 likewise.
    """
    lines = np.floor_divide(base, np.maximum(line_bases, 1)) * (np.asarray(line_bases) > 0)
    found: NDArray[np.int64] = base + lines * np.subtract(line_bytes, line_bases)
    return found


def without_line_ends(span: NDArray[np.uint8], column: int, line_bases: int, line_bytes: int) -> bytearray:
    """The bases in a span of bytes.

    Args:
        span: (n,) bytes of the file; they begin and end with a base.
        column: number, within its line, of the base that the span begins with.
        line_bases: bases per line, above 0.
        line_bytes: bytes per line with its line end.
    """
    head = min(line_bases - column, len(span))
    rest = span[line_bytes - column :]
    lines, left = divmod(len(rest), line_bytes)
    tail = min(left, line_bases)
    bases = bytearray(head + lines * line_bases + tail)
    out, full = np.frombuffer(bases, np.uint8), head + lines * line_bases
    out[:head] = span[:head]
    out[head:full].reshape(lines, line_bases)[:] = rest[: lines * line_bytes].reshape(lines, line_bytes)[
        :, :line_bases
    ]
    out[full:] = rest[lines * line_bytes :][:tail]
    return bases
