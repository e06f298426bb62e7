"""Write what a model finds at every base of a genome as bigWig files, and draw a stretch of them.

    python examples/tracks.py first-model [GENOME.fa] [REGION] [PICTURE.png]

The model is a run directory or an export, trained on DNA; REGION is RECORD:START-END. Without a genome it takes that of
phage lambda: seconds on a CPU. A genome browser shows the same files: open hub.txt in the directory that is printed.
"""

# %% Score: what `megabase score MODEL GENOME -o scores.parquet --track logp,entropy,acgt` does
import gzip
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pyBigWig

from megabase.pipeline import cli

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if not 2 <= len(sys.argv) <= 5:
    sys.exit("usage: python examples/tracks.py MODEL [GENOME.fa] [RECORD:START-END] [PICTURE.png]")
model = sys.argv[1]
picture = sys.argv[4] if len(sys.argv) == 5 else "tracks.png"
folder = Path(tempfile.mkdtemp())
if len(sys.argv) > 2:
    genome = Path(sys.argv[2])
else:
    packed = Path(__file__).resolve().parents[1] / "tests" / "data" / "lambda_phage.fna.gz"
    genome = folder / "lambda.fa"
    genome.write_bytes(gzip.decompress(packed.read_bytes()))
code = cli.main(
    ["score", model, str(genome), "-o", str(folder / "scores.parquet"), "--track", "logp,entropy,acgt"]
)
if code:
    sys.exit(code)
tracks = folder / "scores.tracks"
print(f"hub: {tracks / 'hub.txt'}")

# %% Which stretch?
with pyBigWig.open(str(tracks / "logp.forward.bw")) as file:
    lengths = file.chroms()
record, _, place = (sys.argv[3] if len(sys.argv) > 3 else "").rpartition(":")
record = record or next(iter(lengths))
start, end = (int(x) for x in place.split("-")) if place else (20_000, 20_080)


def values(name: str) -> np.ndarray:
    """The values of the stretch, NaN where a base was not scored."""
    with pyBigWig.open(str(tracks / f"{name}.bw")) as file:
        return np.array(file.values(record, start, end))


for strand in ("forward", "reverse"):
    mean = np.nanmean(values(f"logp.{strand}"))
    print(f"{record}:{start}-{end} {strand}: {-mean / np.log(2):.3f} bits per base")

# %% A picture: the prediction at every base, and how likely the model found the base that is there
colors = {"A": "#2ca02c", "C": "#1f77b4", "G": "#ffa500", "T": "#d62728"}
figure, rows = plt.subplots(4, 1, figsize=(9, 5), sharex=True, layout="constrained")
for row, strand in zip((0, 2), ("forward", "reverse"), strict=True):
    bottom, places = np.zeros(end - start), np.arange(start, end)
    for base, color in colors.items():
        height = values(f"{base}.{strand}")
        rows[row].bar(places, height, bottom=bottom, width=1.0, color=color, label=base)
        bottom += np.nan_to_num(height)
    rows[row].set(ylabel=f"p, {strand}", ylim=(0, 1))
    rows[row + 1].bar(places, values(f"logp.{strand}"), width=1.0, color="#1f77b4", label="log p of the base")
    rows[row + 1].step(
        places, -values(f"entropy.{strand}"), where="mid", color="black", label="expected: −entropy"
    )
    rows[row + 1].set(ylabel="nats", ylim=(-4, 0))
for row, number in ((0, 4), (1, 2)):  # above the panels
    rows[row].legend(
        ncols=number,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize="small",
        borderpad=0,
    )
rows[3].set_xlabel(f"position in {record}")
figure.savefig(picture, dpi=110)
print(f"picture: {picture}")
