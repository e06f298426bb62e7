"""lsh_attention equals its definition: dense attention over the pairs that are found, by brute force."""

import itertools

import pytest
import torch
from torch import Tensor

from megabase.models import ConfigError, LSHConfig, ReformerConfig, Seeds
from megabase.models.attention import lsh_attention
from megabase.models.attention.kernels.inputs import Rule
from megabase.models.attention.lsh import LSHAttention, hash_buckets
from megabase.models.layer_config import bucket_factors
from tests.quick import slow

RULES = list(itertools.product(["window", "chunk"], [True, False]))


def inputs(batch=2, heads=2, length=50, d=8, seed=0, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, d)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.randn(
        shape, generator=generator, dtype=dtype
    )


def unit_keys(qk: Tensor) -> Tensor:
    return qk / qk.square().mean(-1, keepdim=True).add(1e-6).sqrt() * qk.shape[-1] ** -0.5


def count_pairs(buckets: Tensor, chunk_length: int, attend: str, causal: bool) -> Tensor:
    """In how many rounds query i finds key j, (length, length), for buckets (rounds, length)."""
    length = buckets.shape[1]
    orders = [sorted(range(length), key=lambda i: (row[i], i)) for row in buckets.tolist()]
    counts = torch.zeros(length, length)
    for this, order in enumerate(orders):
        if attend == "chunk":
            chunks = [order[s : s + chunk_length] for s in range(0, length, chunk_length)]
            ring = orders[this - 1]
            before_first = ring[(length - 1) // chunk_length * chunk_length :]
            for chunk, before in zip(chunks, [before_first, *chunks], strict=False):
                for i in chunk:
                    for j in before + chunk:
                        counts[i, j] += 1
        else:
            row = buckets[this].tolist()
            for i in range(length):
                same_bucket = [j for j in order if row[j] == row[i]]
                place = same_bucket.index(i)
                for j in same_bucket[max(0, place - chunk_length) : place + chunk_length + 1]:
                    counts[i, j] += 1
    counts.fill_diagonal_(0)
    return counts.tril() if causal else counts


def dense(qk: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    """Attention with every pair weighted by its count (batch, heads, length, length); a row without pairs keeps v."""
    scores = qk @ unit_keys(qk).mT + counts.log()
    empty = counts.sum(-1, keepdim=True) == 0
    return torch.where(empty, v, scores.masked_fill(empty, 0.0).softmax(-1) @ v)


@pytest.mark.parametrize(("attend", "causal"), RULES)
@pytest.mark.parametrize("duplicates", ["once", "average"])
@pytest.mark.parametrize("backend", [slow("reference"), "chunked"])
def test_equals_dense_attention_over_the_pairs_found(attend, causal, duplicates, backend):
    qk, v = inputs()
    buckets = hash_buckets(qk, rounds=4, n_buckets=6, seed=3)
    counts = torch.stack([count_pairs(b, 7, attend, causal) for b in buckets.flatten(0, 1)]).view(
        2, 2, 50, 50
    )
    if duplicates == "once":
        counts = counts.clamp(max=1)
    out = lsh_attention(
        qk,
        v,
        rounds=4,
        chunk_length=7,
        causal=causal,
        seed=3,
        n_buckets=6,
        attend=attend,
        duplicates=duplicates,
        backend=backend,
    )
    torch.testing.assert_close(out, dense(qk, v, counts), atol=1e-5, rtol=1e-5)


def outputs_with_other_later_tokens(attend: str, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Outputs at positions 0..39 of a sequence, and of sequences that differ from position 40 on only."""
    qk, v = inputs(length=64, seed=seed)
    other_qk, other_v = inputs(length=96, seed=seed + 1000)

    def run(qk: Tensor, v: Tensor) -> Tensor:
        return lsh_attention(
            qk,
            v,
            rounds=3,
            chunk_length=8,
            causal=True,
            seed=seed,
            n_buckets=4,
            attend=attend,
            duplicates="once",
        )[:, :, :40]

    changed = [
        (
            torch.cat((qk[:, :, :40], other_qk[:, :, 40:64]), 2),
            torch.cat((v[:, :, :40], other_v[:, :, 40:64]), 2),
        ),
        (torch.cat((qk, other_qk[:, :, 64:]), 2), torch.cat((v, other_v[:, :, 64:]), 2)),
        (qk[:, :, :40], v[:, :, :40]),
    ]
    return run(qk, v), [run(*pair) for pair in changed]


@pytest.mark.parametrize("seed", range(3))
def test_window_is_strictly_causal(seed):
    out, others = outputs_with_other_later_tokens("window", seed)
    for other in others:
        torch.testing.assert_close(other, out, atol=0, rtol=1e-6)


def test_chunk_is_not_strictly_causal():
    out, others = outputs_with_other_later_tokens("chunk", 0)
    assert all((other - out).abs().max() > 1e-3 for other in others)


@pytest.mark.parametrize("seed", range(3))
def test_window_finds_the_same_keys_whatever_comes_later(seed):
    buckets = torch.randint(0, 4, (3, 64), generator=torch.Generator().manual_seed(seed))
    found = count_pairs(buckets, 8, "window", True)[:40, :40]
    assert torch.equal(found, count_pairs(buckets[:, :40], 8, "window", True))
    v = torch.eye(64)[None, None]
    # With one-hot values the output is the weights.
    for length in (40, 41, 64):
        out = lsh_attention(
            torch.ones(1, 1, length, 4),
            v[:, :, :length],
            rounds=3,
            chunk_length=8,
            causal=True,
            seed=0,
            buckets=buckets[None, None, :, :length],
        )
        counts = found + torch.eye(40) * (found.sum(-1, keepdim=True) == 0)
        assert torch.equal(out[0, 0, :40, :40] > 0, counts > 0)


@pytest.mark.parametrize(("attend", "causal"), RULES)
@pytest.mark.parametrize("duplicates", ["once", "average"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_padding_changes_nothing_for_real_tokens(attend, causal, duplicates, backend):
    qk, v = inputs(batch=3, length=37)
    buckets = hash_buckets(qk, rounds=3, n_buckets=4, seed=1)
    mask = torch.zeros(3, 37, dtype=torch.bool)
    mask[0, :37], mask[1, :20], mask[2, torch.arange(0, 37, 3)] = True, True, True
    setting = {"rounds": 3, "chunk_length": 5, "causal": causal, "seed": 1, "backend": backend}
    setting |= {"attend": attend, "duplicates": duplicates}
    out = lsh_attention(qk, v, buckets=buckets, mask=mask, **setting)
    assert not out.transpose(1, 2)[~mask].any()
    for i in range(3):
        real = mask[i]
        alone = lsh_attention(
            qk[i : i + 1, :, real], v[i : i + 1, :, real], buckets=buckets[i : i + 1, :, :, real], **setting
        )
        torch.testing.assert_close(out[i : i + 1, :, real], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rounds", "length"), [(1, 64), (3, 64), (2, 32)])
def test_chunk_equals_the_transformers_layer_given_its_buckets(causal, rounds, length):
    from transformers import ReformerConfig as HuggingFaceConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    torch.manual_seed(0)
    config = HuggingFaceConfig(
        hidden_size=32,
        num_attention_heads=2,
        attention_head_size=8,
        num_hashes=rounds,
        num_buckets=4,
        lsh_attn_chunk_length=16,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=causal,
    )
    # In fp64: the references' self score of -1e5 leaves fp32 two digits of the weights if a position has no other key.
    layer = LSHSelfAttention(config, layer_idx=0).double()
    hidden = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    buckets = torch.randint(0, 4, (2, 2, rounds, length))
    theirs = layer(hidden, buckets=buckets + 4 * torch.arange(rounds)[:, None]).hidden_states
    qk, v = (p(hidden).view(2, length, 2, 8).transpose(1, 2) for p in (layer.query_key, layer.value))
    ours = lsh_attention(
        qk, v, rounds=rounds, chunk_length=16, causal=causal, seed=0, attend="chunk", buckets=buckets
    )
    ours = ours.transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(theirs)
    wanted = (hidden, layer.query_key.weight, layer.value.weight)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(theirs, wanted, grad), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("attend", ["window", "chunk"])
def test_more_rounds_approach_full_attention(attend):
    qk, v = inputs(batch=2, heads=4, length=256, d=16, seed=5)
    qk = 3 * qk
    full = dense(qk, v, (torch.ones(256, 256).tril(-1)).expand(2, 4, -1, -1))
    errors = []
    for rounds in (1, 2, 4, 8, 16):
        runs = [
            lsh_attention(
                qk,
                v,
                rounds=rounds,
                chunk_length=32,
                causal=True,
                seed=seed,
                n_buckets=8,
                attend=attend,
                duplicates="once",
            )
            for seed in range(4)
        ]
        errors.append(sum((run - full).square().mean().sqrt().item() for run in runs) / 4)
    print(attend, "rms error at 1, 2, 4, 8, 16 rounds:", [round(e, 4) for e in errors])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3


@pytest.mark.parametrize("length", [1, 2, 13, 97, 1009])
@pytest.mark.parametrize("attend", ["window", "chunk"])
def test_sequences_of_any_length_give_finite_numbers(length, attend):
    qk, v = inputs(batch=1, heads=1, length=length, d=4)
    out = lsh_attention(qk, v, rounds=2, chunk_length=16, causal=True, seed=0, attend=attend)
    assert out.shape == v.shape
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])


@pytest.mark.slow
def test_a_length_that_no_block_divides():
    qk, v = inputs(batch=1, heads=1, length=65_537, d=8)
    qk.requires_grad_()
    out = lsh_attention(qk, v, rounds=2, chunk_length=64, causal=True, seed=0, n_buckets=1024)
    out.sum().backward()
    assert qk.grad is not None
    assert qk.grad.isfinite().all()


def test_hash_is_a_function_of_its_seed_and_finds_neighbours():
    qk, _ = inputs(batch=1, heads=2, length=400, d=16)
    hashed = hash_buckets(qk, rounds=3, n_buckets=16, seed=9)
    state = torch.get_rng_state()
    assert torch.equal(hashed, hash_buckets(qk, rounds=3, n_buckets=16, seed=9))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(hashed, hash_buckets(qk, rounds=3, n_buckets=16, seed=10))
    assert not torch.equal(hashed[:, :, 0], hashed[:, :, 1])
    assert torch.equal(hashed, hash_buckets(5 * qk, rounds=3, n_buckets=16, seed=9))
    opposite = hash_buckets(-qk, rounds=3, n_buckets=16, seed=9)
    assert torch.equal(opposite, (hashed + 8) % 16)
    near = hash_buckets(qk + 0.1 * torch.randn_like(qk), rounds=3, n_buckets=16, seed=9)
    assert (near == hashed).float().mean() > 0.7
    assert hashed.unique().numel() == 16


def test_many_buckets_are_two_factors():
    assert bucket_factors(128) == [128]
    assert bucket_factors(1024) == [32, 32]
    assert bucket_factors(2048) == [32, 64]
    assert bucket_factors(260) == [10, 26]
    qk, _ = inputs(batch=1, heads=1, length=5000, d=16)
    hashed = hash_buckets(qk, rounds=1, n_buckets=1024, seed=0)
    assert hashed.min() >= 0
    assert hashed.max() < 1024
    assert hashed.unique().numel() > 500


def test_hash_and_result_do_not_depend_on_the_other_sequences():
    qk, v = inputs(batch=4)
    setting = {"rounds": 2, "chunk_length": 8, "causal": True, "seed": 4, "n_buckets": 8}
    whole = lsh_attention(qk, v, **setting)
    torch.testing.assert_close(lsh_attention(qk[2:3], v[2:3], **setting), whole[2:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attend": "windows"}, "did you mean 'window'"),
        ({"duplicates": "one"}, "did you mean 'once'"),
        ({"backend": "chunk"}, "did you mean 'chunked'"),
        ({"rounds": 0}, "rounds=0"),
        ({"chunk_length": 0}, "chunk_length=0"),
        ({"n_buckets": 7}, "take 8"),
        ({"n_buckets": 300 + 2}, "take 304"),
        ({"mask": torch.ones(2, 50)}, "mask"),
        ({"buckets": torch.zeros(2, 2, 1, 50)}, "buckets"),
    ],
)
def test_settings_that_cannot_work_say_why(change, message):
    qk, v = inputs()
    setting = {"rounds": 2, "chunk_length": 8, "causal": True, "seed": 0} | change
    with pytest.raises(ConfigError, match=message):
        lsh_attention(qk, v, **setting)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("reach", [1, 4, slow(100)])
@pytest.mark.parametrize("prompt", [0, slow(2), 40])
def test_a_cache_finds_the_keys_that_one_pass_finds(prompt, reach, once, own):
    """With one-hot values the output is the weights."""
    length, rounds, heads = 64, 3, 2
    lsh = LSHConfig(rounds, reach, n_buckets=4, duplicates="once" if once else "average")
    layer = LSHAttention(ReformerConfig(dim=8, heads=heads, head_dim=length, lsh=lsh), 0).double()
    cache = layer.new_cache(1, Seeds())
    generator = torch.Generator().manual_seed(reach)
    buckets = torch.randint(0, 4, (1, heads, rounds, length), generator=generator, dtype=torch.int32)
    qk = torch.randn(1, heads, length, length, generator=generator, dtype=torch.float64)
    v = torch.eye(length, dtype=torch.float64).expand(1, heads, -1, -1)
    expected = lsh_attention(
        qk,
        v,
        rounds=rounds,
        chunk_length=reach,
        causal=True,
        seed=0,
        own=own,
        duplicates=lsh.duplicates,
        buckets=buckets,
        backend="reference",
    )
    keys = unit_keys(qk)
    if prompt:
        cache.add(keys[:, :, :prompt], v[:, :, :prompt], buckets[..., :prompt])
        rule = Rule(reach, "window", causal=True, once=once, own="alone" if own else "never")
        weights = cache.attend(qk[:, :, :prompt], rule)
        torch.testing.assert_close(weights, expected[:, :, :prompt], atol=1e-12, rtol=0)
    for i in range(prompt, length):
        one = slice(i, i + 1)
        own_value = v[:, :, one] if own else torch.zeros_like(v[:, :, one])
        weights = cache.attend_one(qk[:, :, one], buckets[..., one], own_value, once=once)
        cache.add_one(keys[:, :, one], v[:, :, one], buckets[..., one])
        assert torch.equal(weights > 0, expected[:, :, one] > 0)
        torch.testing.assert_close(weights, expected[:, :, one], atol=1e-12, rtol=0)
