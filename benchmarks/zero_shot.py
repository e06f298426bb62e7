"""Does a model find the natural differences between two strains likelier than made-up ones, without being taught to?

    python -m benchmarks.zero_shot MODEL SHARDS REFERENCE OTHER [--pairs 1000] [--context 1023] [--json FILE]

The model was trained on SHARDS, which `megabase prepare REFERENCE SHARDS --valid 0.1` made; both genomes are FASTA
files. Taken are substitutions between the held-out part of REFERENCE and OTHER (minimap2's alignments, ten equal bases
on both sides). Each is paired with a decoy: the same substitution at a random place of the held-out part that both
strains share, at the same position of a codon (pyrodigal's genes, read along the gene), or also outside of genes.

Printed is in how many pairs the natural one has the higher score: `megabase variants`' LLR, with the standard error;
0.5 is chance. Beside the model: Markov models fitted to the rest of REFERENCE, both strands. A second table says how
far the effect of a random substitution reaches. Needs mappy and pyrodigal.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mappy
import numpy as np
import pyrodigal
import torch
from numpy.typing import NDArray

from megabase.datamodules.alphabet import BOS, FIRST_LETTER
from megabase.datamodules.index.segments import VALID
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.models import Seeds
from megabase.pipeline.bench.result import machine, versions
from megabase.pipeline.inference.genome import Genome
from megabase.pipeline.inference.model import LoadedModel, load_model
from megabase.pipeline.inference.variants.columns import values
from megabase.pipeline.inference.variants.edits import Edit, Strand
from megabase.pipeline.inference.variants.reading import Reader
from megabase.pipeline.inference.variants.walk import walk
from megabase.pipeline.inference.variants.windows import windows

PIECE = 20_000
"""Bases of OTHER that are aligned at a time."""
FLANK = 10
"""Equal bases that a substitution needs on both sides."""
ORDERS = (1, 2, 3, 5, 8, 10)
OUTSIDE = 0
REACHES, FARTHEST = (16, 64, 256, 512, 1024), 2048
COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")


@dataclass(frozen=True)
class Substitution:
    """The base at `place` of the held-out part becomes `base`."""

    place: int
    base: str


def sequence_of(path: Path) -> str:
    """The longest record of a FASTA file, in upper case."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    records = content.decode().split(">")[1:]
    return max(("".join(record.split("\n")[1:]) for record in records), key=len).upper()


def held_out(shards: Path) -> tuple[int, int]:
    """The longest part of the split for validation: first base, and end."""
    segments = ShardIndex.open(shards).segments
    row = max(segments.rows_of(VALID), key=lambda row: segments.length[row])
    return int(segments.start[row]), int(segments.start[row] + segments.length[row])


def compare(reference: str, other: str) -> tuple[list[Substitution], NDArray[np.bool_]]:
    """Substitutions between the held-out part and another strain, and which places both share (length,)."""
    aligner = mappy.Aligner(seq=reference, preset="asm10")
    depth = np.zeros(len(reference), np.int32)
    equal = np.zeros(len(reference), bool)
    found = {}
    for start in range(0, len(other), PIECE):
        for hit in aligner.map(other[start : start + PIECE]):
            if not hit.is_primary or hit.mapq < 60:
                continue
            depth[hit.r_st : hit.r_en] += 1
            piece = other[start : start + PIECE][hit.q_st : hit.q_en]
            if hit.strand < 0:
                piece = mappy.revcomp(piece)
            here = there = 0
            for length, operation in hit.cigar:
                if operation in (0, 7, 8):
                    for step in range(length):
                        place, base = hit.r_st + here + step, piece[there + step]
                        equal[place] = base == reference[place]
                        if not equal[place] and {base, reference[place]} <= set("ACGT"):
                            found[place] = base
                here += length * (operation in (0, 2, 3, 7, 8))
                there += length * (operation in (0, 1, 7, 8))
    equal &= depth == 1
    shared = equal.copy()  # with equal bases around
    for shift in range(1, FLANK + 1):
        shared[shift:] &= equal[:-shift]
        shared[:-shift] &= equal[shift:]
    natural = [
        Substitution(place, base)
        for place, base in sorted(found.items())
        if depth[place] == 1
        and FLANK <= place < len(reference) - FLANK
        and equal[place - FLANK : place].all()
        and equal[place + 1 : place + FLANK + 1].all()
    ]
    return natural, shared


def codons(genome: str, start: int, end: int) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """For each place of [start, end): its position in a codon, 1 to 3, or OUTSIDE; and whether its gene is on the
    reverse strand. −1: in several genes."""
    finder = pyrodigal.GeneFinder()
    finder.train(genome.encode())
    position, reverse = np.full(end - start, OUTSIDE, np.int8), np.zeros(end - start, bool)
    for gene in finder.find_genes(genome[start:end].encode()):
        places = np.arange(gene.begin - 1, gene.end)
        offset = places - places[0] if gene.strand > 0 else places[-1] - places
        again = position[places] != OUTSIDE
        position[places] = np.where(again, -1, offset % 3 + 1)
        reverse[places] = gene.strand < 0
    return position, reverse


def pairs_of(
    reference: str,
    natural: Sequence[Substitution],
    shared: NDArray[np.bool_],
    position: NDArray[np.int8],
    reverse: NDArray[np.bool_],
    number: int,
) -> list[tuple[Substitution, Substitution]]:
    """Random natural substitutions, each with a decoy of the same kind."""
    generator = np.random.default_rng(0)
    letters = np.frombuffer(reference.encode(), np.uint8)
    along_gene = np.where(reverse, np.frombuffer(reference.encode().translate(COMPLEMENT), np.uint8), letters)
    pools = {
        (codon, base): list(
            generator.permutation(np.flatnonzero(shared & (position == codon) & (along_gene == base)))
        )
        for codon in range(4)
        for base in b"ACGT"
    }
    pairs: list[tuple[Substitution, Substitution]] = []
    for one in generator.permutation(len(natural)):
        real = natural[one]
        pool = pools.get((int(position[real.place]), int(along_gene[real.place])))
        if not pool or len(pairs) == number:
            continue
        place = int(pool.pop())
        opposite = reverse[place] != reverse[real.place]
        base = real.base.encode().translate(COMPLEMENT).decode() if opposite else real.base
        pairs.append((real, Substitution(place, base)))
    return pairs


def markov(
    genome: str, start: int, end: int, order: int
) -> Callable[[str, Sequence[Substitution]], NDArray[np.float64]]:
    """A Markov model of the genome without [start, end): LLR of substitutions in a sequence, mean of both strands."""
    counts = np.ones(4 ** (order + 1), np.float64)
    for part in (genome[:start], genome[end:]):
        for strand in (part, mappy.revcomp(part)):
            counts += np.bincount(words(strand, order), minlength=len(counts))
    log_probs = np.log(counts.reshape(-1, 4) / counts.reshape(-1, 4).sum(1, keepdims=True)).reshape(-1)

    def likelihood(text: str) -> float:
        return float(np.mean([log_probs[words(s, order)].sum() for s in (text, mappy.revcomp(text))]))

    def score(reference: str, found: Sequence[Substitution]) -> NDArray[np.float64]:
        scores = []
        for one in found:
            before = reference[max(0, one.place - order) : one.place]
            after = reference[one.place + 1 : one.place + 1 + order]
            scores.append(
                likelihood(before + one.base + after) - likelihood(before + reference[one.place] + after)
            )
        return np.array(scores)

    return score


def words(text: str, order: int) -> NDArray[np.int64]:
    """All words of order + 1 bases, as numbers in base 4; those with other letters are left out."""
    table = np.full(256, -1, np.int64)
    table[np.frombuffer(b"ACGT", np.uint8)] = range(4)
    codes = table[np.frombuffer(text.encode(), np.uint8)]
    ends = max(len(codes) - order, 0)
    found, letters = np.zeros(ends, np.int64), np.ones(ends, bool)
    for shift in range(order + 1):
        part = codes[shift : shift + ends]
        found, letters = found * 4 + part, letters & (part >= 0)
    return found[letters]


def scores_of_model(
    loaded: LoadedModel, reference: str, found: Sequence[Substitution], context: int | None, downstream: int
) -> dict[str, NDArray[np.float64]]:
    """LLR of substitutions, and its two parts, means of both strands."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "held_out.fa"
        path.write_text(f">held_out\n{reference}\n")
        genome = Genome(path)
        edits = [Edit("held_out", one.place, one.place + 1, one.base.encode()) for one in found]
        reader = Reader(loaded.model, Seeds(run=loaded.config.run.seed), downstream=downstream)
        terms = {}
        for name in ("forward", "reverse"):
            strand = Strand(genome, "held_out", loaded.alphabet, name == "reverse")
            if context is None:
                terms[name] = walk(reader, strand, edits, lambda _: None)[None]
            else:
                terms[name] = windows(reader, strand, edits, context, lambda _: None)[None]
    numbers = values(terms)
    parts = {
        part: (numbers[f"llr_{part}_forward"] + numbers[f"llr_{part}_reverse"]) / 2
        for part in ("allele", "downstream")
    }
    return {"LLR": numbers["llr"], **parts}


@torch.no_grad()
def reach(loaded: LoadedModel, reference: str, number: int = 40) -> dict[int, float]:
    """How far the effect of random substitutions reaches: for numbers of bases after them, the correlation of the score
    up to there with that up to FARTHEST."""
    generator = np.random.default_rng(1)
    before, rows = min(loaded.config.data.length, 4096) - 1, []
    for place in generator.integers(before, len(reference) - FARTHEST, number):
        window = np.frombuffer(reference[place - before : place + 1 + FARTHEST].encode(), np.uint8)
        tokens = torch.tensor([[BOS, *loaded.alphabet.encode(window).tolist()]])
        changed = tokens.clone()
        changed[0, 1 + before] = (
            changed[0, 1 + before] - FIRST_LETTER + int(generator.integers(1, 4))
        ) % 4 + FIRST_LETTER
        both = torch.cat((tokens, changed))
        log_probs = loaded.model(both, seeds=Seeds(run=loaded.config.run.seed)).double().log_softmax(-1)
        old, new = log_probs[:, :-1].gather(2, both[:, 1:, None]).squeeze(2)
        rows.append((new - old)[before:].numpy().cumsum())
    sums = np.array(rows)
    return {bases: float(np.corrcoef(sums[:, bases], sums[:, -1])[0, 1]) for bases in REACHES}


def share(higher: NDArray[np.float64]) -> str:
    """The mean of 0, 0.5 and 1, with its standard error."""
    mean = higher.mean()
    return f"{mean:.3f} ± {math.sqrt(mean * (1 - mean) / len(higher)):.3f}"


def main() -> None:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "shards", "reference", "other"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument(
        "--context", type=int, nargs="*", default=[], help="bases before a variant; also: all"
    )
    parser.add_argument("--downstream", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    genome, (start, end) = sequence_of(options.reference), held_out(options.shards)
    reference = genome[start:end]
    natural, shared = compare(reference, sequence_of(options.other))
    position, reverse = codons(genome, start, end)
    pairs = pairs_of(reference, natural, shared, position, reverse, options.pairs)
    print(f"held out: [{start:,}, {end:,}), shared with the other strain: {shared.sum():,} places")
    print(f"natural substitutions: {len(natural):,}; pairs: {len(pairs):,}\n")
    found = [one for pair in pairs for one in pair]
    scores = {f"Markov {order}": markov(genome, start, end, order)(reference, found) for order in ORDERS}
    loaded = load_model(options.model)
    for context in [*options.context, None]:
        text = "all before" if context is None else f"{context:,} before"
        for part, numbers in scores_of_model(loaded, reference, found, context, options.downstream).items():
            scores[f"model, {text}, {part}"] = numbers
    codon = position[[real.place for real, _ in pairs]]
    groups = {"all": codon >= 0, **{f"codon {n}": codon == n for n in (1, 2, 3)}, "no gene": codon == OUTSIDE}
    print(f"| | {' | '.join(f'{name} ({chosen.sum():,})' for name, chosen in groups.items())} |")
    print("|---|" + "---|" * len(groups))
    rows = {}
    for name, numbers in scores.items():
        higher = np.sign(numbers[::2] - numbers[1::2]) / 2 + 0.5
        rows[name] = {group: float(higher[chosen].mean()) for group, chosen in groups.items() if chosen.any()}
        print(
            f"| {name} | {' | '.join(share(higher[chosen]) for chosen in groups.values() if chosen.any())} |"
        )
    correlations = reach(loaded, reference)
    print("\n| bases scored after | " + " | ".join(map(str, correlations)) + " |")
    print("|---|" + "---|" * len(correlations))
    print(f"| correlation with {FARTHEST} | " + " | ".join(f"{r:.3f}" for r in correlations.values()) + " |")
    if options.json:
        described = {
            "natural": len(natural),
            "pairs": {name: int(chosen.sum()) for name, chosen in groups.items()},
            "higher": rows,
            "reach": correlations,
            "model": {"step": loaded.source.step, "bases_of_a_window": loaded.config.data.length},
            "downstream": options.downstream,
            "machine": machine("cpu"),
            "versions": versions(("torch", "numpy", "mappy", "pyrodigal")),
        }
        options.json.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
