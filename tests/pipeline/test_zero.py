"""The reversible Reformer under ZeRO stages 0 to 3 equals one process that keeps every activation."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import supervise
from pipeline.preemption import StopRequest
from tests.pipeline.zero_worker import ACCUMULATIONS, PRECISIONS, STAGES, Trained

# Loss (absolute, nats) and weights (relative to the largest change of any weight). In fp32 only the order of sums
# differs; in bf16 each rank's gradients are rounded to 8 bits before they are added.
TOLERANCE = {"fp32": (2e-6, 1e-4), "bf16": (2e-3, 1e-1)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, trained by two processes."""
    output = tmp_path_factory.mktemp("zero") / "results.json"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r});"]
    command[-1] += f"from tests.pipeline.zero_worker import main; main({str(output)!r})"
    assert supervise(command, 2, StopRequest()) == 0
    loaded: dict[str, Any] = json.loads(output.read_text())
    return loaded


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "accumulation", "precision"), list(itertools.product(STAGES, ACCUMULATIONS, PRECISIONS))
)
def test_losses_and_weights_equal_the_single_process(
    results: dict[str, Any], stage: int, accumulation: int, precision: str
) -> None:
    alone, sharded = results[f"alone-{precision}"], results[f"{stage}-{accumulation}-{precision}"]
    of_loss, of_weights = TOLERANCE[precision]
    assert sharded["losses"] == pytest.approx(alone["losses"], abs=of_loss)
    before = {name: p.detach() for name, p in Trained().named_parameters()}
    assert sharded["weights"].keys() == alone["weights"].keys() == before.keys()
    for name, expected in alone["weights"].items():
        there, here = torch.tensor(expected), torch.tensor(sharded["weights"][name])
        start = before[name].bfloat16().float() if precision == "bf16" else before[name]
        moved = (there - start).abs().max()
        assert moved > 0, name
        rounding = there.abs().max() * 2**-8 if (stage, precision) == (0, "bf16") else 0.0
        assert (here - there).abs().max() <= of_weights * moved + rounding, name
