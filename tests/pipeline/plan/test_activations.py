"""Activations of a pass, by hand, and what they must not depend on."""

import pytest

from megabase.models import FeedForwardConfig, LSHConfig, ReformerConfig
from megabase.models.attention import by_heads
from megabase.models.feedforward import CPU_CHUNK, GPU_CHUNK
from megabase.pipeline.plan.activations import (
    CHUNKS,
    EXCHANGED,
    FEEDFORWARD,
    GROUPED,
    HEAD,
    HIDDEN,
    IN_GROUPS,
    Work,
    activations_of,
    groups_of,
)

NOTHING, SMALL = Work(0.0), FeedForwardConfig(chunk=1)
WORK = {
    "local": Work(1.0, heads=2.0),
    "lsh": Work(0.0, heads=1.0, sums=2.0, rounds=8.0),
    FEEDFORWARD: NOTHING,
    HEAD: NOTHING,
}


def model(**more: object) -> ReformerConfig:
    return ReformerConfig(vocab_size=9, dim=16, depth=2, heads=2, **more)  # type: ignore[arg-type]


def test_the_branch_that_needs_the_most_counts() -> None:
    alone = model(layers=["local"], head_dim=4, feedforward=SMALL)
    found = activations_of(alone, 100, 2, "cuda", work=WORK)
    # One number of 2 bytes for each of 16 channels, two for each of 2 heads x 4.
    assert (found.streams, found.work) == (16 * 16 * 100, 100 * (2 * 16 + 2 * 2 * 8))
    both = model(layers=["local", "lsh"], head_dim=4, lsh=LSHConfig(rounds=8), feedforward=SMALL)
    found = activations_of(both, 100, 2, "cuda", work=WORK)
    assert (found.largest, found.work) == ("lsh", 100 * ((2 + 2 * 4) * 8 + 8 * 2 * 8))


def test_what_ranks_that_share_a_sequence_receive_counts() -> None:
    alone = model(layers=["local"], feedforward=SMALL)
    apart, shared = (activations_of(alone, 100, 2, "cuda", parts=parts, work=WORK).work for parts in (1, 2))
    assert shared - apart == 100 * EXCHANGED * 16 * 2


def test_heads_in_groups_need_a_share_of_what_all_need() -> None:
    positions = GROUPED["cpu"] // 16 + 1
    assert groups_of(model(), "lsh", positions, "cpu") == 2
    assert (
        groups_of(model(), "lsh", positions - 1, "cpu")
        == groups_of(model(), "linformer", positions, "cpu")
        == 1
    )
    assert groups_of(model(), "lsh", 100 * positions, "cpu") == 2  # no more than heads
    assert groups_of(model(), "lsh", 100 * positions, "cpu", parts=2) == 1  # of one rank
    alone = model(layers=["local"], feedforward=SMALL)
    found = activations_of(alone, positions, 4, "cpu", work=WORK)
    assert found.work == positions * 4 * ((1 + IN_GROUPS) * 16 + 2 * 8)


@pytest.mark.parametrize(("positions", "tokens"), [(100, 100), (10**5, 16384)])
def test_a_chunk_of_the_feed_forward_does_not_grow_beyond_its_tokens(positions: int, tokens: int) -> None:
    nothing = dict.fromkeys(WORK, NOTHING)
    found = activations_of(model(), positions, 2, "cuda", work=nothing)
    assert (found.largest, found.work) == (FEEDFORWARD, HIDDEN * 64 * tokens * 2)


def test_the_limits_are_those_of_the_model() -> None:
    assert GROUPED == by_heads.LIMIT
    assert CHUNKS == {"cpu": CPU_CHUNK, "cuda": GPU_CHUNK}
