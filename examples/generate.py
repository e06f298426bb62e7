"""Generate sequences without a restriction site, with a chosen share of G and C; how likely does the model find them?

    python examples/generate.py first-model [OUTPUT.fa]

The model is a run directory or an export, trained on DNA. Takes seconds on a CPU.
"""

# %% Draw: what `megabase generate MODEL --length 200 -n 8 --forbid GAATTC --gc 0.45:0.55 -o OUTPUT.fa` does
import json
import math
import sys
from pathlib import Path

import dnaio

from megabase.pipeline import cli

if len(sys.argv) not in (2, 3):
    sys.exit("usage: python examples/generate.py MODEL [OUTPUT.fa]")
model, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) == 3 else "generated.fa")
ECORI = "GAATTC"
code = cli.main(
    ["generate", model, "-o", str(output), "--length", "200", "-n", "8", "--seed", "1"]
    + ["--forbid", ECORI, "--gc", "0.45:0.55"]
)
if code:
    sys.exit(code)

# %% Read the letters and the numbers
with dnaio.open(output) as reader:
    sequences = {record.id: record.sequence for record in reader}
lines = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]

# %% Each sequence: bits per base by the model, the share of G and C, and its least likely base
print("sequence        bits/base   G+C   least likely base")
for line in sorted(lines, key=lambda line: line["nats"]):
    sequence = sequences[line["name"]]
    assert ECORI not in sequence
    share = sum(base in "GC" for base in sequence) / len(sequence)
    bits = line["nats"] / line["length"] / math.log(2)
    least = min(line["log_probs"])
    place = line["log_probs"].index(least)
    print(f"{line['name']:15} {bits:9.3f} {share:6.2f}   {sequence[place]} at {place + 1}, {least:.2f} nats")
