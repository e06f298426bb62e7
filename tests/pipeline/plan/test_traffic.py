"""What ranks send in a step: by hand, and counted on gloo ranks."""

import dataclasses
import json
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.plan.limits import changed
from megabase.pipeline.plan.parameters import count_parameters, small_parameters
from megabase.pipeline.plan.profiles import read_profile
from megabase.pipeline.plan.traffic import (
    ALL_GATHER,
    ALL_REDUCE,
    PERSISTENT,
    REDUCE_SCATTER,
    exchanged_bytes,
    seconds_of,
    transfers_of,
)
from tests.pipeline.plan import traffic_worker
from tests.processes import run_ranks

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


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_bytes_that_gloo_ranks_send_are_those_of_the_formulas(ranks: int, tmp_path: Path) -> None:
    code, printed = run_ranks(ranks, traffic_worker.main, str(tmp_path / "counted.json"))
    assert code == 0, printed
    counted = json.loads((tmp_path / "counted.json").read_text())
    names = {
        ALL_REDUCE: "all_reduce",
        ALL_GATHER: "all_gather_into_tensor",
        REDUCE_SCATTER: "reduce_scatter_tensor",
    }
    run = load([], ["run.name=x", "data.shards=s", f"data.length={traffic_worker.LENGTH}"])
    for stage in traffic_worker.STAGES:
        config = dataclasses.replace(changed(run, "zero.stage", stage), model=traffic_worker.model("full"))
        parameters = sum(count_parameters(config.model).values())
        expected = {
            names[each.how]: each.bytes
            for each in transfers_of(config, parameters, traffic_worker.ACCUMULATION, 4)
        }
        # DeepSpeed pads what it shards. One rank has nothing to gather.
        found = counted[f"stage {stage}"]
        if ranks > 1:
            assert found == pytest.approx(expected, rel=0.01), stage
        else:
            assert set(found) <= set(expected)
    for kind in traffic_worker.KINDS:
        shared = changed(run, "trainer.sequence_ranks", ranks)
        config = dataclasses.replace(shared, model=traffic_worker.model(kind))
        assert counted[kind] == exchanged_bytes(config, 1, 4), kind
