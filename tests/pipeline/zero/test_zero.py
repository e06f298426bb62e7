"""The reversible Reformer under ZeRO stages 0 to 3 equals one process that keeps every activation."""

import itertools
import json
from typing import Any

import pytest
import torch

from tests.pipeline.zero import zero_worker
from tests.pipeline.zero.zero_worker import (
    ACCUMULATIONS,
    CLIPS,
    OFFLOADS,
    OVERLAPS,
    PRECISIONS,
    STAGES,
    Trained,
)
from tests.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# Loss (absolute, nats) and weights (relative to the largest change of any weight). In fp32 only the order of sums
# differs; in bf16 each rank's gradients are rounded to 8 bits before they are added.
TOLERANCE = {"fp32": (2e-6, 1e-4), "bf16": (2e-3, 1e-1)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, trained by two processes."""
    output = tmp_path_factory.mktemp("zero") / "results.json"
    code, printed = run_ranks(2, zero_worker.main, str(output))
    assert code == 0, printed
    loaded: dict[str, Any] = json.loads(output.read_text())
    return loaded


@pytest.mark.parametrize(
    ("stage", "accumulation", "precision", "clip"),
    list(itertools.product(STAGES, ACCUMULATIONS, PRECISIONS, CLIPS)),
)
def test_losses_and_weights_equal_the_single_process(
    results: dict[str, Any], stage: int, accumulation: int, precision: str, clip: float
) -> None:
    of_loss, of_weights = TOLERANCE[precision]
    if precision == "bf16" and stage >= 2 and accumulation > 1:
        # These stages also add the micro batches' gradients in bf16. How far that moves a loss depends on the CPU:
        # 0.0015 and 0.0030 were seen.
        of_loss = 5e-3
    if precision == "bf16" and clip:
        # Steps are smaller, so a weight that rounds to another value, or a changed hash, differs relatively more: 0.33
        # was seen in the taps of the convolution, which move least.
        of_loss, of_weights = 1.5e-2, 0.4
    sharded = results[f"{stage}-{accumulation}-{precision}-{clip}"]
    compare(sharded, results[f"alone-{precision}-{clip}"], stage, precision, of_loss, of_weights)


@pytest.mark.parametrize(("stage", "accumulation"), list(itertools.product(STAGES, ACCUMULATIONS)))
def test_ranks_that_share_each_sequence_equal_the_single_process(
    results: dict[str, Any], stage: int, accumulation: int
) -> None:
    """The factor of the gradients is that of ranks with sequences of their own, in every stage."""
    alone, shared = results[f"alone-fp32-{CLIPS[-1]}"], results[f"shared-{stage}-{accumulation}"]
    compare(shared, alone, stage, "fp32", *TOLERANCE["fp32"])


@pytest.mark.parametrize(("stage", "precision"), OVERLAPS)
def test_communication_that_overlaps_changes_no_bit(
    results: dict[str, Any], stage: int, precision: str
) -> None:
    without = results[f"{stage}-{ACCUMULATIONS[-1]}-{precision}-{CLIPS[-1]}"]
    assert results[f"overlap-{stage}-{precision}"] == without


def test_a_second_copy_of_the_weights_changes_no_bit_and_no_checkpoint(results: dict[str, Any]) -> None:
    plain, hpz = (results["second-copies"][name] for name in ("plain", "hpz"))
    assert hpz["gathers"] > plain["gathers"] == 0
    assert hpz["losses"] == plain["losses"]
    assert hpz["resumed"] == plain["resumed"] == plain["losses"][3:]


def compare(
    sharded: dict[str, Any],
    alone: dict[str, Any],
    stage: int,
    precision: str,
    of_loss: float,
    of_weights: float,
) -> None:
    """Losses and weights are those of the single process, to these tolerances (see TOLERANCE)."""
    assert sharded["losses"] == pytest.approx(alone["losses"], abs=of_loss)
    before = {name: p.detach() for name, p in Trained().named_parameters()}
    assert sharded["weights"].keys() == alone["weights"].keys() == before.keys()
    for name, expected in alone["weights"].items():
        there, here = torch.tensor(expected), torch.tensor(sharded["weights"][name])
        start = before[name].bfloat16().float() if precision == "bf16" else before[name]
        moved = (there - start).abs().max()
        assert moved > 0, name
        # About the last bit of the largest weight as it is stored: a short run may move a weight by little more.
        rounding = there.abs().max() * (2**-8 if (stage, precision) == (0, "bf16") else 2**-23)
        assert (here - there).abs().max() <= of_weights * moved + rounding, name


@pytest.mark.parametrize(("stage", "precision"), list(itertools.product(STAGES, PRECISIONS)))
def test_the_size_of_an_update_is_that_of_the_weights_difference(
    results: dict[str, Any], stage: int, precision: str
) -> None:
    # Stage 0 in bf16 keeps the weights and moments themselves in bf16: a difference of 0.13 was seen.
    tolerance = 1e-3 if precision == "fp32" else 0.25 if stage == 0 else 0.1
    assert results[f"update-{stage}-{precision}"] == pytest.approx(results["update-alone"], rel=tolerance)


@pytest.mark.parametrize(("stage", "precision", "offload"), OFFLOADS)
def test_offload_changes_no_loss_and_a_resume_repeats_the_losses(
    results: dict[str, Any], stage: int, precision: str, offload: str
) -> None:
    losses = results[f"{stage}-{precision}-{offload}"]
    assert losses["resumed"] == losses["offloaded"]
    assert losses["offloaded"] == pytest.approx(losses["plain"], abs=TOLERANCE[precision][0])


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_halves_its_scale_after_an_overflow_and_a_resume_keeps_it(
    results: dict[str, Any], stage: int
) -> None:
    found = results[f"half-{stage}"]
    assert found["skipped"] == 1
    scales = found["scales"]
    assert scales[4] == scales[3] / 2  # the overflow
    assert max(scales) > scales[0]  # doubled by the good steps before
    scale, loss, after = found["resumed"]
    assert (scale, loss, after) == (scales[5], found["losses"][5], scales[6])


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_skips_overflowing_steps_at_its_least_scale_and_raises_nothing(
    results: dict[str, Any], stage: int
) -> None:
    assert (results[f"half-{stage}"]["lost"], results[f"half-{stage}"]["least"]) == (12, 1.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_is_sharded_while_it_is_built(results: dict[str, Any], precision: str) -> None:
    built = results[f"built-{precision}"]
    assert built["different"] == []
    # Half the model, which this rank keeps, one full layer, and free memory that the allocator keeps.
    assert built["peak"] < 0.75 * built["bytes"]
