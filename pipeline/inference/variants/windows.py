"""Score edits with a bounded context: a new state for each edit, `context` bases before it.

Reference and alternate are both read from forks of that state. Edits that replace the same bases share it, and edits
whose contexts have the same length are read together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megabase.pipeline.inference.variants.edits import Edit, Placed, Strand
from megabase.pipeline.inference.variants.reading import TERMS, Reader, Row, read_rows

Site = list[Placed]
"""Edits that replace the same bases."""


def windows(
    reader: Reader, strand: Strand, edits: Sequence[Edit], context: int, advance: Callable[[int], None]
) -> NDArray[np.void]:
    """Score edits of one record, each given the `context` bases before it, or those that there are.

    The other arguments, results and errors are those of `walk`; `advance` gets as many tokens as `windows_size` says.
    """
    terms = np.zeros(len(edits), TERMS)
    placed = [strand.place(number, edit) for number, edit in enumerate(edits)]
    for sites in batches_of_sites(placed, context, reader.block):
        lines = [strand.tokens(max(0, site[0].start - context), site[0].start) for site in sites]
        state = reader.start(len(sites))
        if len(lines[0]):
            reader.read(np.stack(lines), state)
        rows = [row for sequence, site in enumerate(sites) for row in rows_of(reader, strand, sequence, site)]
        found = iter(read_rows(reader, state, rows))
        for site in sites:
            reference, reference_after = next(found)
            for edit in site:
                allele, after = next(found)
                nats = (allele.nats, reference.nats, after.nats, reference_after.nats)
                terms[edit.number] = (*nats, allele.bases, reference.bases, after.bases)
        advance(sum(len(line) for line in lines) + sum(len(row) for row in rows))
    return terms


def rows_of(reader: Reader, strand: Strand, sequence: int, site: Site) -> list[Row]:
    """What is read after a site's context: the reference, and each edit."""
    start, end = site[0].start, site[0].end
    after = strand.tokens(end, min(end + reader.downstream, len(strand)))
    reference = strand.tokens(start, end)
    return [Row(sequence, reference[:0], allele, after) for allele in (reference, *(e.tokens for e in site))]


def batches_of_sites(edits: Sequence[Placed], context: int, tokens: int) -> Iterator[list[Site]]:
    """Sites whose contexts have the same length, in the order of their starts, about `tokens` tokens of contexts."""
    sites: dict[tuple[int, int], Site] = {}
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end, edit.number)):
        sites.setdefault((edit.start, edit.end), []).append(edit)
    batch: list[Site] = []
    for (start, _), site in sites.items():
        length = min(start, context)
        if batch and (length != min(batch[0][0].start, context) or (len(batch) + 1) * (length + 1) > tokens):
            yield batch
            batch = []
        batch.append(site)
    if batch:
        yield batch


def windows_size(strand: Strand, edits: Sequence[Edit], context: int, downstream: int) -> int:
    """How many tokens `windows` reads."""
    sites: dict[tuple[int, int], int] = {}
    for edit in (strand.place(0, edit) for edit in edits):
        span = (edit.start, edit.end)
        after = min(edit.end + downstream, len(strand)) - edit.end
        first = min(edit.start, context) + edit.end - edit.start + after
        sites[span] = sites.get(span, first) + len(edit.tokens) + after
    return sum(sites.values())
