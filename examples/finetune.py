"""Fine-tune a model to tell genes from what lies between them, and measure it beside k-mers.

    make demo
    python examples/finetune.py runs/demo runs/genes --mode lora

Needs `pip install 'megabase[finetune]' pyrodigal`. Finds the genes of E. coli 536 with Pyrodigal, cuts stretches of
200 bases out of genes and out of the gaps between them, writes them to OUT.csv, and runs `megabase finetune` on it.
The last tenth of the genome, on which the demo does not train, is for test. More options and settings may follow;
`--bases N` takes the first N bases of the genome only.
"""

# %% The genome, and its genes
import argparse
import csv
import gzip
import itertools
import subprocess
import sys
from pathlib import Path

import pyrodigal

LENGTH = 200
GENOME = Path(__file__).resolve().parent / "data" / "ecoli_536.fna.gz"

parser = argparse.ArgumentParser(usage="python examples/finetune.py MODEL OUT [--bases N] [...]")
parser.add_argument("model")
parser.add_argument("out", type=Path)
parser.add_argument("--bases", type=int)
options, more = parser.parse_known_args()

genome = b"".join(gzip.decompress(GENOME.read_bytes()).split(b"\n")[1:])[: options.bases].decode()
finder = pyrodigal.GeneFinder()
finder.train(genome)
genes = sorted((gene.begin - 1, gene.end) for gene in finder.find_genes(genome))
print(f"{len(genes):,} genes in {len(genome):,} bases", flush=True)

# %% Stretches of LENGTH bases: the middle of each gene, and as many side by side as fit each gap
inside = [(begin + end - LENGTH) // 2 for begin, end in genes if end - begin >= LENGTH]
gaps = [(end, begin) for (_, end), (begin, _) in itertools.pairwise(genes)]
between = [start for first, last in gaps for start in range(first, last - LENGTH + 1, LENGTH)]
every = max(len(inside) // len(between), 1)  # about as many of one class as of the other
places = sorted([(start, "gene") for start in inside[::every]] + [(start, "between") for start in between])


# %% A table with splits: the last tenth of the genome for test, the tenth before it for validation
def split_of(start: int) -> str:
    """By the place in the genome."""
    return "train" if start < 0.8 * len(genome) else "valid" if start < 0.9 * len(genome) else "test"


options.out.parent.mkdir(parents=True, exist_ok=True)
table = options.out.with_suffix(".csv")
with table.open("w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["sequence", "label", "split"])
    rows.writerows([genome[start : start + LENGTH], label, split_of(start)] for start, label in places)
print(f"{len(places):,} stretches of {LENGTH} bases in {table}", flush=True)

# %% Train, and print the result. The same command goes on after a stop
command = ["megabase.pipeline.cli", "finetune", options.model, str(table), "-o", str(options.out), *more]
sys.exit(subprocess.run([sys.executable, "-m", *command]).returncode)
