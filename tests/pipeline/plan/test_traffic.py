"""What ranks send in a step, by hand."""

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.plan.parameters import small_parameters
from megabase.pipeline.plan.profiles import read_profile
from megabase.pipeline.plan.traffic import PERSISTENT, exchanged_bytes, seconds_of, transfers_of

MODEL = [
    "run.name=x",
    "data.shards=s",
    "model.dim=64",
    "model.heads=4",
    "model.depth=2",
    "model.vocab_size=9",
]


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        (0, {"gradients": 2 * 1000}),
        (1, {"gradients": 2 * 1000, "weights": 1000}),
        (2, {"gradients": 2 * 3 * 1000, "weights": 1000}),  # after each of 3 micro batches
    ],
)
def test_bytes_by_stage(stage: int, sent: dict[str, int]) -> None:
    config = load([], [*MODEL, f"zero.stage={stage}"])
    # A ring of 4 ranks sends 3/4 of the bytes once in a gather, twice in an all-reduce.
    found = {each.what: each.sent(4) for each in transfers_of(config, 500, 3, 2)}
    assert found == {what: bytes * 3 / 4 for what, bytes in sent.items()}


def test_stage_3_gathers_weights_for_each_micro_batch_except_small_tensors() -> None:
    config = load([], [*MODEL, "zero.stage=3"])
    small = small_parameters(config.model, PERSISTENT)
    gradients, weights = transfers_of(config, 10**6, 3, 2)
    assert gradients.bytes == 3 * 2 * 10**6
    assert weights.bytes == 2 * (3 * (10**6 - small) + small) and small > 0


def test_ranks_that_share_windows_exchange_what_docs_scale_says() -> None:
    settings = [*MODEL, "data.length=1024", "data.micro_batch=2", "trainer.sequence_ranks=4"]
    lsh = exchanged_bytes(load([], [*settings, "model.layers=[lsh]"]), 3, 2)
    # docs/scale.md: 9 x width x (P - 1) / P numbers for each of a rank's positions, in each of two layers.
    assert lsh == 2 * 9 * 64 * 3 / 4 * (1024 * 2 / 4 * 3) * 2
    assert exchanged_bytes(load([], [*settings, "model.layers=[full]"]), 3, 2) == lsh * 12 / 9
    assert exchanged_bytes(load([], [*settings, "model.layers=[local]"]), 3, 2) == 0
    assert exchanged_bytes(load([], [*settings[:-1], "model.layers=[lsh]"]), 3, 2) == 0


def test_the_network_is_what_a_ring_over_nodes_waits_for() -> None:
    config, h100 = load([], [*MODEL, "zero.stage=0"]), read_profile("h100")
    transfers = transfers_of(config, 10**9, 1, 2)
    one_node, two_nodes = seconds_of(transfers, 8, 1, h100), seconds_of(transfers, 8, 2, h100)
    assert two_nodes > 5 * one_node > 0
    assert seconds_of(transfers, 1, 1, h100) == 0
