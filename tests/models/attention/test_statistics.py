"""Statistics of LSH layers against a count over all pairs of positions."""

import math

import pytest
import torch

from megabase.models import Reformer, ReformerConfig, Seeds
from megabase.models.attention.kernels.dispatch import unit_keys
from megabase.models.attention.kernels.inputs import Rule, SortedOrder
from megabase.models.attention.statistics import QUERIES, lsh_statistics, measure
from megabase.models.layer_config import LSHConfig

LENGTH, ROUNDS, BUCKETS = 40, 3, 6


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query-keys (1, 2, length, 4) and buckets (2, rounds, length), of which bucket 0 is crowded."""
    generator = torch.Generator().manual_seed(seed)
    qk = torch.randn(1, 2, LENGTH, 4, generator=generator)
    buckets = torch.randint(-4, BUCKETS, (2, ROUNDS, LENGTH), generator=generator).clamp(min=0)
    return qk, buckets.int()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("real", [LENGTH, 27])
def test_statistics_equal_a_count_over_all_pairs(causal: bool, once: bool, real: int) -> None:
    qk, buckets = inputs(seed=real)
    rule = Rule(reach=3, attend="window", causal=causal, once=once, own="never")
    mask = (torch.arange(LENGTH) < real).expand(2, -1)
    found = measure(qk, SortedOrder.by_bucket(buckets, mask), BUCKETS, rule)

    queries = [int(x) for x in torch.linspace(0, 1, min(QUERIES, LENGTH)) * (real - 1)]
    balances, unmatched, truncated = [], 0, 0
    masses = []
    for row in range(2):
        keys = unit_keys(qk[0, row])
        meets: list[list[list[int]]] = []
        for number in range(ROUNDS):
            bucket = buckets[row, number, :real].tolist()
            counts = [bucket.count(b) for b in range(BUCKETS)]
            balances.append(real**2 / (BUCKETS * sum(c * c for c in counts)))
            near = []
            for q in range(real):
                before = [p for p in range(q) if bucket[p] == bucket[q]]
                after = [] if causal else [p for p in range(q + 1, real) if bucket[p] == bucket[q]]
                truncated += len(before) > rule.reach or len(after) > rule.reach
                near.append(before[-rule.reach :] + after[: rule.reach])
            meets.append(near)
        unmatched += sum(not any(meets[number][q] for number in range(ROUNDS)) for q in range(real))
        for q in queries:
            seen: set[int] = set()
            weights = []
            for number in range(ROUNDS):
                new = [p for p in meets[number][q] if not (once and p in seen)]
                seen |= set(new)
                weights.append(sum(math.exp(float(qk[0, row, q] @ keys[p])) for p in new))
            if sum(weights):
                masses.append([weight / sum(weights) for weight in weights])
    assert found.balance == pytest.approx(sum(balances) / len(balances))
    assert found.unmatched == pytest.approx(unmatched / (2 * real), abs=1e-6)
    assert found.truncated == pytest.approx(truncated / (2 * ROUNDS * real))
    assert found.mass == pytest.approx(
        [sum(each) / len(masses) for each in zip(*masses, strict=True)], rel=1e-4
    )


def test_a_rule_of_chunks_has_only_the_balance() -> None:
    qk, buckets = inputs(seed=1)
    rule = Rule(reach=8, attend="chunk", causal=True, once=False, own="alone")
    found = measure(qk, SortedOrder.by_bucket(torch.zeros_like(buckets)), BUCKETS, rule)
    assert found.balance == pytest.approx(1 / BUCKETS)
    assert found.unmatched is found.truncated is found.mass is None


def test_every_lsh_layer_of_a_pass_is_measured_and_its_result_stays() -> None:
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=9,
        dim=16,
        depth=4,
        heads=2,
        layers=["local", "lsh"],
        max_length=128,
        lsh=LSHConfig(chunk_length=16),
    )
    model = Reformer(config).eval()
    tokens = torch.randint(0, 9, (2, 128))
    with torch.no_grad():
        expected = model(tokens, seeds=Seeds(3))
        with lsh_statistics(model) as found:
            assert torch.equal(model(tokens, seeds=Seeds(3)), expected)
    assert list(found) == [1, 3]
    for each in found.values():
        assert each.mass is not None and sum(each.mass) == pytest.approx(1.0)
        assert 0 < each.balance <= 1 and each.unmatched is not None and each.unmatched < 0.5
    found.clear()
    model(tokens)
    assert not found
