"""Measures how exact megabase is, and prints the table of docs/exact.md.

    python -m benchmarks.exactness [--json FILE]

Every row is a claim, the figure measured now, and the test that checks the claim. Takes two or three minutes on a CPU
and needs the extra `test` (transformers). The references, such as dense attention and the ZeRO worker, are those of the
tests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.models import (
    FeedForwardConfig,
    LocalConfig,
    LSHConfig,
    Reformer,
    ReformerConfig,
    Seeds,
    generation,
)
from megabase.models.attention.lsh import hash_buckets, lsh_attention
from megabase.pipeline.rundir import environment
from tests.models.attention.test_lsh import count_pairs, dense, inputs, outputs_with_other_later_tokens
from tests.models.backward import kept_for_backward

SMALL = ReformerConfig(
    vocab_size=9,
    dim=32,
    depth=12,
    heads=2,
    dropout=0.1,
    lsh=LSHConfig(rounds=2, chunk_length=16, n_buckets=8),
    local=LocalConfig(window=16),
    feedforward=FeedForwardConfig(mult=2),
)


@dataclass
class Row:
    """A claim, the figure that was measured, and the tests that check the claim."""

    claim: str
    measured: str
    test: str


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Random bases."""
    return torch.randint(5, 9, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(config: ReformerConfig, dtype: torch.dtype, reverse: bool) -> Tensor:
    """Loss and all gradients of one pass, as one fp32 vector."""
    torch.manual_seed(1)
    model = Reformer(config).to(dtype).train()
    x = tokens(96)
    hidden = model.body(x, seeds=Seeds(1, 5, torch.arange(len(x))), reverse=reverse)
    loss = model.head(hidden, x.roll(-1, 1))
    loss.backward()
    return torch.cat([loss.detach().flatten(), *(p.grad.flatten().float() for p in model.parameters())])


def furthest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """Difference in norm, relative to b."""
    return ((a - b).norm() / b.norm()).item()


def reversible() -> Row:
    worst = 0.0
    for depth in (1, 12, 48):
        for dtype in (torch.float32, torch.bfloat16):
            for causal in (True, False):
                config = replace(SMALL, depth=depth, causal=causal)
                worst = max(
                    worst, furthest(*(gradients(config, dtype, reverse) for reverse in (True, False)))
                )
    return Row(
        "reversible training gives the loss and every gradient of ordinary training, bit for bit"
        " (depths 1, 12, 48; fp32, bf16; dropout; causal and not)",
        f"largest difference {worst:g}",
        "tests/models/test_reversible.py",
    )


def drift() -> Row:
    off = {}
    for dtype in (torch.float32, torch.bfloat16):
        config = replace(SMALL, dim=256, depth=48, residual="float")
        off[dtype] = relative(*(gradients(config, dtype, reverse) for reverse in (True, False)))
    return Row(
        "the same with floating-point streams (`residual: float`), for comparison: depth 48, dim 256",
        f"gradients off by {off[torch.float32]:.1e} (fp32), {off[torch.bfloat16]:.1e} (bf16), relative",
        "tests/models/test_reversible.py",
    )


def kept(depth: int, reverse: bool) -> int:
    """Bytes that autograd keeps for the backward pass, parameters not counted."""
    model = Reformer(replace(SMALL, depth=depth))

    def forward() -> Tensor:
        hidden = model.body(tokens(512), seeds=Seeds(), reverse=reverse)
        return model.head(hidden, tokens(512))

    return sum(x.numel() * x.element_size() for x in kept_for_backward(model, forward))


def memory() -> Row:
    ours = [kept(depth, True) for depth in (2, 12, 48)]
    ordinary = [kept(depth, False) for depth in (2, 12, 48)]

    def shown(values: list[int]) -> str:
        return ", ".join(f"{value / 2**20:.2f}" for value in values)

    return Row(
        "what is kept for the backward pass does not grow with depth (2, 12, 48 layers; MiB)",
        f"{shown(ours)}; ordinary training: {shown(ordinary)}",
        "tests/models/test_reversible.py",
    )


def lsh(qk: Tensor, v: Tensor, **changes: Any) -> Tensor:
    """LSH attention with the settings of the rows below, except for `changes`."""
    settings: dict[str, Any] = {"rounds": 4, "chunk_length": 7, "causal": True, "seed": 3, "n_buckets": 6}
    return lsh_attention(qk, v, **(settings | changes))


def once() -> Row:
    worst = 0.0
    qk, v = inputs()
    buckets = hash_buckets(qk, rounds=4, n_buckets=6, seed=3).flatten(0, 1)
    for attend, causal in (("window", True), ("window", False), ("chunk", True), ("chunk", False)):
        counts = torch.stack([count_pairs(b, 7, attend, causal) for b in buckets]).view(2, 2, 50, 50)
        expected = dense(qk, v, counts.clamp(max=1))
        out = lsh(qk, v, attend=attend, causal=causal, duplicates="once")
        worst = max(worst, furthest(out, expected))
    return Row(
        "`duplicates: once` is softmax over the union of the keys met in any round (fp32)",
        f"largest difference {worst:.1e}",
        "tests/models/attention/test_lsh.py",
    )


def causal_rule() -> Row:
    off = {}
    for attend in ("window", "chunk"):
        out, others = outputs_with_other_later_tokens(attend, 0)
        off[attend] = max(furthest(out, other) for other in others)
    return Row(
        "`attend: window`: nothing that comes later changes an output, except by rounding (fp32); `chunk`, the paper's"
        " rule, does not have this property",
        f"changed by {off['window']:.1e} at most; `chunk`: {off['chunk']:.2f}",
        "tests/models/attention/test_lsh.py",
    )


def kernels() -> Row:
    worst = 0.0
    for attend in ("window", "chunk"):
        found = []
        for backend in ("reference", "chunked", "native"):
            qk, v = (x.requires_grad_() for x in inputs(length=997, d=32))
            out = lsh(qk, v, attend=attend, chunk_length=64, n_buckets=16, duplicates="once", backend=backend)
            (out * torch.linspace(-1, 1, 997)[:, None]).sum().backward()
            assert qk.grad is not None and v.grad is not None
            found.append(torch.cat([out.flatten(), qk.grad.flatten(), v.grad.flatten()]))
        worst = max(worst, *(relative(other, found[0]) for other in found[1:]))
    return Row(
        "the kernels agree, forward and gradients (fp32, relative)",
        f"{worst:.1e}",
        "tests/models/attention/kernels/test_native.py",
    )


def rounds_curve() -> Row:
    qk, v = inputs(batch=2, heads=4, length=256, d=16, seed=5)
    qk = 3 * qk
    full = dense(qk, v, torch.ones(256, 256).tril(-1).expand(2, 4, -1, -1))
    errors = []
    for rounds in (1, 2, 4, 8, 16):
        runs = [
            lsh(qk, v, rounds=rounds, chunk_length=32, n_buckets=8, seed=seed, duplicates="once")
            for seed in range(4)
        ]
        errors.append(sum((run - full).square().mean().sqrt().item() for run in runs) / len(runs))
    return Row(
        "more rounds approach full attention (rms error at 1, 2, 4, 8, 16 rounds)",
        ", ".join(f"{error:.3f}" for error in errors),
        "tests/models/attention/test_lsh.py",
    )


def generating() -> Row:
    worst = 0.0
    for layers in (["local", "lsh"], ["full"], ["lsh"]):
        torch.manual_seed(2)
        positions = "none" if layers == ["lsh"] else "rotary"
        model = Reformer(replace(SMALL, depth=4, layers=layers, dropout=0.0, positions=positions)).eval()
        x = tokens(130)
        with torch.no_grad():
            whole = model(x, seeds=Seeds())
            state = generation.start(model, batch=len(x))
            steps = [generation.read(model, x[:, i : i + 1], state) for i in range(x.shape[1])]
        worst = max(worst, furthest(torch.stack(steps, 1), whole))
    return Row(
        "token by token from a state gives the logits of one pass over the whole prefix (fp32)",
        f"largest difference {worst:.1e}",
        "tests/models/test_reading.py",
    )


def reading() -> Row:
    torch.manual_seed(2)
    lsh = LSHConfig(rounds=4, chunk_length=16, n_buckets=64, duplicates="once")
    model = Reformer(replace(SMALL, depth=4, layers=["local", "lsh"], dropout=0.0, lsh=lsh)).eval()
    x = tokens(8192)
    with torch.no_grad():
        whole = model(x).log_softmax(-1)[:, :-1].gather(2, x[:, 1:, None]).squeeze(2)
    differences = []
    for size in (1000, 63):
        state = generation.start(model, batch=len(x))
        found = [generation.read_block(model, part, state).log_probs for part in x.split(size, dim=1)]
        differences.append((torch.cat(found, dim=1)[:, 1:] - whole).abs().flatten())
    median, most = torch.cat(differences).median().item(), torch.cat(differences).max().item()
    near = generation.near_borders(model, x, tolerance=1e-6)
    return Row(
        "blocks of 1,000 and of 63 tokens from a state give the log-probability of every token in one pass (8,192 "
        "tokens, fp32); query-keys within 1e-6 of the border of two buckets, which rounding can move",
        f"median difference {median:.1e}, largest {most:.1e}; {sum(near.near.values())} of {near.hashed:,}",
        "tests/models/test_reading.py",
    )


def huggingface() -> Row:
    from transformers import ReformerConfig as TheirConfig
    from transformers import ReformerModelWithLMHead

    from megabase.models.huggingface import from_huggingface, to_huggingface

    torch.manual_seed(3)
    theirs = ReformerModelWithLMHead(
        TheirConfig(
            attn_layers=["local", "local"],
            axial_pos_shape=[8, 16],
            axial_pos_embds_dim=[16, 48],
            hidden_size=64,
            num_attention_heads=4,
            attention_head_size=16,
            feed_forward_size=128,
            local_attn_chunk_length=16,
            vocab_size=13,
            is_decoder=True,
            max_position_embeddings=128,
            pad_token_id=0,
        )
    ).eval()
    ours = from_huggingface(theirs).eval()
    x = torch.randint(1, 13, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = furthest(ours(x), theirs(x).logits)
    back = to_huggingface(ours).state_dict()
    same = all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())
    return Row(
        "a transformers Reformer gives the same logits here (local layers, fp32), and converts back to the same bits",
        f"largest difference {off:.1e}; round trip {'identical' if same else 'DIFFERS'}",
        "tests/models/huggingface/test_convert.py",
    )


def zero() -> Row:
    from tests.pipeline.zero.zero_worker import ACCUMULATIONS, STAGES, main
    from tests.processes import run_ranks

    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "results.json"
        code, messages = run_ranks(2, main, str(output))
        if code != 0:
            raise SystemExit(f"the ZeRO ranks failed:\n{messages}")
        results = json.loads(output.read_text())
    off = {
        precision: max(
            abs(a - b)
            for stage in STAGES
            for accumulation in ACCUMULATIONS
            for a, b in zip(
                results[f"alone-{precision}-0.0"]["losses"],
                results[f"{stage}-{accumulation}-{precision}-0.0"]["losses"],
                strict=True,
            )
        )
        for precision in ("fp32", "bf16")
    }
    return Row(
        "ZeRO stages 0 to 3 on two ranks, with and without accumulation, train as one process does (3 steps)",
        f"losses differ by {off['fp32']:.1e} (fp32), {off['bf16']:.1e} (bf16)",
        "tests/pipeline/zero/test_zero.py",
    )


def elastic() -> Row:
    from megabase.datamodules.prepare.run import prepare
    from tests.conftest import DATA
    from tests.pipeline.training.test_resume import CHAIN, furthest, moved

    off = {}
    for precision in ("32", "bf16"):
        with tempfile.TemporaryDirectory() as directory:
            shards = Path(directory) / "shards"
            prepare([DATA / "lambda_phage.fna.gz"], shards, valid="0.1", progress=False)
            off[precision] = furthest(*moved(Path(directory), shards, precision))
    ranks, shared, stages = (", ".join(str(part[number]) for part in CHAIN) for number in (1, 2, 3))
    return Row(
        f"a run that is resumed on {ranks} ranks, of which {shared} share each window, at ZeRO stages {stages} (3 steps"
        " each) trains as one that stayed on two",
        f"losses differ by {off['32']:.1e} (fp32), {off['bf16']:.1e} (bf16), relative",
        "tests/pipeline/training/test_resume.py",
    )


ROWS: tuple[Callable[[], Row], ...] = (
    reversible,
    drift,
    memory,
    once,
    causal_rule,
    kernels,
    rounds_curve,
    generating,
    reading,
    huggingface,
    zero,
    elastic,
)


def main() -> None:
    """Measure and print all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the rows, with machine and versions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| claim | measured | tested by |\n|---|---|---|", flush=True)
    rows = []
    for measure in ROWS:
        rows.append(measure())
        print(f"| {rows[-1].claim} | {rows[-1].measured} | `{rows[-1].test}` |", flush=True)
    if options.json:
        machine = environment.describe()
        machine["command"] = "python -m benchmarks.exactness"  # without paths of this machine
        described = {"rows": [asdict(row) for row in rows], "machine": machine}
        options.json.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
