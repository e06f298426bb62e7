"""Load an exported model, score sequences with it, and generate new ones.

    megabase export runs/first first-model
    python examples/score_and_generate.py first-model

Needs a causal model that was trained on DNA. Runs on a CPU in seconds. Editors such as VS Code and Spyder run the
cells, which begin with `# %%`, one by one.
"""

# %% Load the model
import gzip
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from megabase.datamodules.alphabet import BOS, FIRST_LETTER, Alphabet
from megabase.models import generation
from megabase.models.pretrained import from_pretrained

if len(sys.argv) != 2:
    sys.exit("usage: python examples/score_and_generate.py EXPORT (what `megabase export` wrote)")
model = from_pretrained(sys.argv[1])  # a torch.nn.Module on the CPU, in evaluation mode
parameters = sum(weight.numel() for weight in model.parameters())
print(f"{sys.argv[1]}: {parameters:,} parameters, layers {', '.join(model.body.config.pattern)}")

# %% Sequences become tokens
dna = Alphabet.named("dna")


def tokens_of(sequence: np.ndarray) -> torch.Tensor:
    """Bytes (length,) -> tokens (1, 1 + length): the token that begins every sequence, then one for each base."""
    return torch.tensor([[BOS, *dna.encode(sequence).tolist()]])


genome = Path(__file__).resolve().parents[1] / "tests" / "data" / "lambda_phage.fna.gz"
bases = b"".join(gzip.decompress(genome.read_bytes()).split(b"\n")[1:])  # all lines but the FASTA header
# In the last tenth of the genome, on which a run with `--valid 0.1` does not train.
piece = np.frombuffer(bases[44_000:44_512], dtype=np.uint8)


# %% Score: how many bits does the model need for each base? 2 bits are no better than guessing
def bits_per_base(sequence: np.ndarray) -> float:
    """Mean of -log2 p(base | the bases before it)."""
    tokens = tokens_of(sequence)
    with torch.no_grad():
        nats = model.loss(tokens[:, :-1], tokens[:, 1:])  # each position predicts the next token
    return float(nats) / math.log(2) / len(sequence)


shuffled = np.random.default_rng(seed=1).permutation(piece)
repeated = np.tile(piece[:64], 8)
print(f"a piece of the genome   {bits_per_base(piece):.3f} bits per base")
print(f"its other strand        {bits_per_base(dna.reverse_complement(piece)):.3f}")
print(f"its bases, shuffled     {bits_per_base(shuffled):.3f}")
print(f"64 bases, eight times   {bits_per_base(repeated):.3f}")

# %% Which base comes next?
with torch.no_grad():
    logits = model(tokens_of(piece))  # (batch, 1 + length, vocabulary)
letters = range(FIRST_LETTER, FIRST_LETTER + len(dna.letters))
next_base = logits[0, -1, FIRST_LETTER : FIRST_LETTER + len(dna.letters)].softmax(-1)
print(
    "the next base           "
    + "  ".join(f"{b} {p:.2f}" for b, p in zip("ACGT", next_base.tolist(), strict=True))
)

# %% Generate: two continuations of the same bases. The seed decides; a sequence can be reproduced
prompt = tokens_of(piece).expand(2, -1)
generated = generation.generate(model, prompt, length=60, temperature=0.9, seed=1, allowed=letters)
for row in generated:
    sequence = dna.decode(row.numpy()).decode()
    counts = Counter(sequence)
    print(f"generated               {sequence}  GC {(counts['G'] + counts['C']) / len(sequence):.0%}")
