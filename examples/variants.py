"""Which changes of a start codon does a model find unlikely? Write a VCF, score it, read the table.

    megabase export runs/first first-model
    python examples/variants.py first-model

Needs a causal model that was trained on DNA. Runs on a CPU in seconds. Editors such as VS Code and Spyder run the
cells, which begin with `# %%`, one by one.
"""

# %% The genome: phage lambda, as plain FASTA
import gzip
import sys
import tempfile
from pathlib import Path

from pyarrow import parquet

from megabase.pipeline import cli

if len(sys.argv) != 2:
    sys.exit("usage: python examples/variants.py MODEL (a run directory, or what `megabase export` wrote)")
folder = Path(tempfile.mkdtemp())
packed = Path(__file__).resolve().parents[1] / "tests" / "data" / "lambda_phage.fna.gz"
genome = folder / "lambda.fa"
genome.write_bytes(gzip.decompress(packed.read_bytes()))
name = genome.read_text().split()[0].removeprefix(">")
bases = "".join(genome.read_text().split("\n")[1:])

# %% All single changes of the first codon of gene S, a deletion and an insertion. VCF counts from 1
START = 45_186
variants = [
    (place, bases[place - 1], base)
    for place in range(START, START + 3)
    for base in "ACGT"
    if base != bases[place - 1]
]
variants += [(START, bases[START - 1 : START + 2], bases[START - 1])]  # the last two bases of ATG are deleted
variants += [(START, bases[START - 1], bases[START - 1] + "GC")]
header = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
lines = [f"{name}\t{place}\t.\t{old}\t{new}\t.\t.\t.\n" for place, old, new in variants]
(folder / "start.vcf").write_text(header + "".join(lines))

# %% Score them: 400 bases before and 100 after each, and 20 random variants of the same lengths for each
scores = folder / "scores.parquet"
code = cli.main(
    ["variants", sys.argv[1], str(folder / "start.vcf"), "--genome", str(genome), "-o", str(scores)]
    + ["--context", "400", "--downstream", "100", "--null", "20"]
)
if code:
    sys.exit(code)

# %% The table: sorted by what is unusual. LLR above 0: the model finds ALT likelier than REF
rows = parquet.read_table(scores).to_pylist()
print("position  kind       change       LLR     forward  reverse  z among random ones")
for row in sorted(rows, key=lambda row: row["llr_null_z"]):
    change = f"{row['ref']}>{row['alt']}"
    print(
        f"{row['position']:<9} {row['kind']:<10} {change:<10} {row['llr']:7.3f}  {row['llr_forward']:7.3f}  "
        f"{row['llr_reverse']:7.3f}  {row['llr_null_z']:6.2f}"
    )
