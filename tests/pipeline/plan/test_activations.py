"""Activations of a pass, by hand, and what they must not depend on."""

import pytest

from megabase.models import FeedForwardConfig, LSHConfig, ReformerConfig
from megabase.pipeline.plan.activations import FEEDFORWARD, HEAD, HIDDEN, Work, activations_of

NOTHING, SMALL = Work(0.0, 0.0), FeedForwardConfig(chunk=1)
WORK = {"local": Work(1.0, 2.0), "lsh": Work(0.0, 1.0, rounds=8.0), FEEDFORWARD: NOTHING, HEAD: NOTHING}


def model(**more: object) -> ReformerConfig:
    return ReformerConfig(vocab_size=9, dim=16, depth=2, heads=2, **more)  # type: ignore[arg-type]


def test_the_branch_that_needs_the_most_counts() -> None:
    alone = model(layers=["local"], head_dim=4, feedforward=SMALL)
    found = activations_of(alone, 100, 2, "cuda", work=WORK)
    # One number of 4 bytes for each of 16 channels, two of 2 bytes for each of 2 heads x 4.
    assert (found.streams, found.work) == (16 * 16 * 100, 100 * (4 * 16 + 2 * 2 * 8))
    both = model(layers=["local", "lsh"], head_dim=4, lsh=LSHConfig(rounds=8), feedforward=SMALL)
    found = activations_of(both, 100, 2, "cuda", work=WORK)
    assert (found.largest, found.work) == ("lsh", 100 * (2 * 8 + 8 * 2 * 8))


@pytest.mark.parametrize(("positions", "tokens"), [(100, 100), (10**5, 16384)])
def test_a_chunk_of_the_feed_forward_does_not_grow_beyond_its_tokens(positions: int, tokens: int) -> None:
    nothing = dict.fromkeys(WORK, NOTHING)
    found = activations_of(model(), positions, 2, "cuda", work=nothing)
    assert (found.largest, found.work) == (FEEDFORWARD, HIDDEN * 64 * tokens * 2)
