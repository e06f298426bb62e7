"""Train one small model with each kind of attention and compare them. Plain PyTorch: no Lightning, no DeepSpeed.

    python examples/compare_attention.py [STEPS]

`ReformerConfig.layers` is the only difference between the models. Runs on a CPU in seconds. With so few steps the
losses say little about which kind is better, so try more. Editors such as VS Code and Spyder run the cells, which begin
with `# %%`, one by one.
"""

# %% One genome, cut into windows
import gzip
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megabase.datamodules.alphabet import Alphabet
from megabase.models import Reformer, ReformerConfig, Seeds

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
LENGTH, BATCH = 512, 4

genome = Path(__file__).resolve().parents[1] / "tests" / "data" / "lambda_phage.fna.gz"
bases = b"".join(gzip.decompress(genome.read_bytes()).split(b"\n")[1:])  # all lines but the FASTA header
dna = Alphabet.named("dna")
tokens = torch.tensor(dna.encode(np.frombuffer(bases, dtype=np.uint8)).astype(np.int64))
split = len(tokens) * 9 // 10
train, valid = tokens[:split], tokens[split:]


def windows(source: torch.Tensor, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (len(starts), LENGTH): a label is the token after its input."""
    cut = torch.stack([source[start : start + LENGTH + 1] for start in starts])
    return cut[:, :-1], cut[:, 1:]


# %% One config for all models
config = ReformerConfig(vocab_size=dna.vocab_size, dim=64, depth=2, heads=2, causal=True)
config.lsh = replace(config.lsh, rounds=2, chunk_length=64)
config.local = replace(config.local, window=64)
kinds = {
    "local": ["local"],
    "lsh": ["lsh"],
    "local, lsh": ["local", "lsh"],  # the pattern is repeated to `depth`
    "performer": ["performer"],
    "full": ["full"],
}


# %% Train each
def trained(layers: list[str]) -> tuple[Reformer, float]:
    """A model with these layers after STEPS steps, and the median seconds of a step."""
    torch.manual_seed(1)  # initial weights; everything else follows from the seeds of a step
    model = Reformer(replace(config, layers=layers)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = np.random.default_rng(seed=1)  # the same windows for every kind
    seconds = []
    for step in range(STEPS):
        inputs, labels = windows(train, generator.integers(len(train) - LENGTH, size=BATCH).tolist())
        began = time.perf_counter()
        loss = model.loss(inputs, labels, seeds=Seeds(run=1, step=step)) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return model.eval(), sorted(seconds)[len(seconds) // 2]


# %% Compare: bits per base of bases that no model has seen, and the time of a step
inputs, labels = windows(valid, list(range(0, len(valid) - LENGTH, LENGTH)))
print(f"{'layers':12}  bits per base  ms per step   ({STEPS} steps of {BATCH} x {LENGTH} bases)")
for name, layers in kinds.items():
    model, seconds = trained(layers)
    with torch.no_grad():
        nats = model.loss(inputs, labels) / labels.numel()
    print(f"{name:12}  {float(nats) / math.log(2):13.4f}  {seconds * 1000:11.1f}")
