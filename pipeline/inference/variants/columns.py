"""The numbers that are written for each ALT: their names, their meaning, and how they follow from log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabase.pipeline.inference.score import FORWARD, REVERSE


@dataclass(frozen=True)
class Column:
    """A column of the table, and an INFO field of the VCF, there in upper case.

    Attributes:
        name: of the column.
        whole: whether it holds integers.
        text: what it means, for the header of the VCF.
    """

    name: str
    whole: bool
    text: str


_STRAND = {FORWARD: "forward strand", REVERSE: "reverse strand"}
SKIPPED = Column("llr_skipped", False, "Why there is no score")


def columns(strands: Sequence[str], rotations: int, null: int = 0) -> list[Column]:
    """The columns with numbers.

    Args:
        strands: that were read.
        rotations: how many rotations of the hashes were used.
        null: with how many random variants each one is compared.
    """
    mean = "mean of both strands" if len(strands) == 2 else _STRAND[strands[0]]
    found = [
        Column(
            "llr",
            False,
            f"Log-probability with ALT minus with REF, in nats; above 0: ALT is likelier; {mean}",
        )
    ]
    for strand in strands:
        found += [
            Column(f"llr_{strand}", False, f"LLR of the {_STRAND[strand]}"),
            Column(f"llr_allele_{strand}", False, f"Part of LLR_{strand.upper()} from the replaced bases"),
            Column(
                f"llr_downstream_{strand}", False, f"Part of LLR_{strand.upper()} from the bases after them"
            ),
        ]
    found += [
        Column("llr_ref_bases", True, "Scored bases that only REF has"),
        Column("llr_alt_bases", True, "Scored bases that only ALT has"),
    ]
    for strand in strands:
        found.append(
            Column(f"llr_downstream_bases_{strand}", True, f"Scored bases after them, {_STRAND[strand]}")
        )
    if rotations > 1:
        found.append(
            Column("llr_sd", False, f"Standard deviation of LLR over {rotations} rotations of the hashes")
        )
    if null:
        others = f"the LLR of {null} random variants of the same lengths"
        found += [
            Column("llr_null_z", False, f"Standard deviations of LLR above the mean of {others}"),
            Column("llr_null_p", False, f"Share of {others}, and of this one, that are no higher"),
        ]
    return found


def values(terms: Mapping[str, NDArray[np.void]]) -> dict[str, NDArray[Any]]:
    """The numbers of all edits by column, (edits,) each.

    Args:
        terms: (rotations, edits) of TERMS for each strand.
    """
    found, totals = {}, []
    for strand, of in terms.items():
        allele = of["alternate"] - of["reference"]
        downstream = of["alternate_downstream"] - of["reference_downstream"]
        totals.append(allele + downstream)
        found[f"llr_allele_{strand}"] = allele.mean(0)
        found[f"llr_downstream_{strand}"] = downstream.mean(0)
        found[f"llr_{strand}"] = totals[-1].mean(0)
        found[f"llr_downstream_bases_{strand}"] = of["downstream_bases"][0]
        found["llr_ref_bases"], found["llr_alt_bases"] = of["reference_bases"][0], of["alternate_bases"][0]
    total = np.mean(totals, axis=0)
    found["llr"] = total.mean(0)
    if len(total) > 1:
        found["llr_sd"] = total.std(0, ddof=1)
    return found
