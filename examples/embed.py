"""Embed a genome in bins, and draw two principal components of the states, coloured by the share of G and C.

    python examples/embed.py first-model [GENOME.fa] [PICTURE.png]

The model is a run directory or an export, trained on DNA. Without a genome it takes that of phage lambda: seconds on
a CPU.
"""

# %% Embed: what `megabase embed MODEL GENOME --pool bin:200 -o embedding.parquet` does
import gzip
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pysam
from pyarrow import parquet

from megabase.pipeline import cli

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if not 2 <= len(sys.argv) <= 4:
    sys.exit("usage: python examples/embed.py MODEL [GENOME.fa] [PICTURE.png]")
model = sys.argv[1]
picture = sys.argv[3] if len(sys.argv) == 4 else "embedding.png"
folder = Path(tempfile.mkdtemp())
if len(sys.argv) > 2:
    genome = Path(sys.argv[2])
else:
    packed = Path(__file__).resolve().parents[1] / "tests" / "data" / "lambda_phage.fna.gz"
    genome = folder / "lambda.fa"
    genome.write_bytes(gzip.decompress(packed.read_bytes()))
code = cli.main(["embed", model, str(genome), "-o", str(folder / "embedding.parquet"), "--pool", "bin:200"])
if code:
    sys.exit(code)

# %% The table: one row a bin; bins without letters are NaN
table = parquet.read_table(folder / "embedding.parquet")
states = np.stack(table["embedding"].to_numpy())
rows = table.drop_columns("embedding").to_pylist()
print(f"{len(states):,} bins, {states.shape[1]} numbers in each")

# %% What the bins are made of
with pysam.FastaFile(str(genome)) as fasta:
    letters = [fasta.fetch(row["record"], row["start"], row["end"]).upper() for row in rows]
bases = np.array([row["bases"] for row in rows])
gc = np.array([text.count("G") + text.count("C") for text in letters]) / np.maximum(bases, 1)

# %% Two principal components of all bins that have letters
known = np.isfinite(states[:, 0])
centred = states[known] - states[known].mean(axis=0)
_, sizes, directions = np.linalg.svd(centred, full_matrices=False)
components = centred @ directions[:2].T
shares = sizes**2 / (sizes**2).sum()
for number in range(2):
    correlation = np.corrcoef(components[:, number], gc[known])[0, 1]
    share = f"{shares[number]:.0%} of the variance"
    print(f"component {number + 1}: {share}, correlation with the share of G and C {correlation:+.2f}")

# %% A picture
figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
points = axes.scatter(*components.T, c=gc[known], s=8, cmap="viridis")
axes.set(xlabel=f"component 1 ({shares[0]:.0%})", ylabel=f"component 2 ({shares[1]:.0%})")
figure.colorbar(points, label="share of G and C in the bin")
figure.savefig(picture, dpi=110)
print(f"picture: {picture}")
