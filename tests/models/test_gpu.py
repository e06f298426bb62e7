"""What the host knows about Triton, and that triton is imported only where kernels can run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megabase.models import gpu
from tests.models.interpreted import GPU, ROOT

USE_A_MODEL = """
import sys, torch
from megabase.models import Reformer, ReformerConfig
from megabase.models.chance import dropout
model = Reformer(ReformerConfig(vocab_size=9, dim=16, depth=2, heads=2, dropout=0.1)).train()
tokens = torch.zeros(1, 80, dtype=torch.int64)
model.head(model.body(tokens), tokens).backward()
sys.exit("triton was imported" if "triton" in sys.modules else 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="triton is needed here")
def test_without_a_gpu_training_does_not_import_triton():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", USE_A_MODEL], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("width", "side"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (8191, 8192), (8192, 8192)]
)
def test_the_side_of_a_tile_is_a_power_of_two_that_holds_the_width(width, side):
    assert gpu.padded(width) == side
