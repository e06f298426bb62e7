"""Where Triton kernels are tested: compiled where there is a GPU, else interpreted, in a process of its own.

Triton decides when it is imported whether it interprets. So that this disturbs no other test, and whoever imported it
first, tests of kernels run only where there is a GPU or TRITON_INTERPRET=1 is set; elsewhere `run_interpreted` runs
their file in a process that has it set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
HERE = GPU or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
ROOT = Path(__file__).parents[2]


def run_interpreted(file: str, temporary: Path, *options: str) -> None:
    """Run the tests of a file with Triton's interpreter, with more of pytest's options; they must pass."""
    command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, f"--basetemp={temporary / 'interpreted'}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
