"""How Triton kernels are tested: compiled on a GPU; without one, interpreted in a separate process.

Triton decides when it is imported whether it interprets. So tests of kernels run only if there is a GPU or
TRITON_INTERPRET=1 is set. Otherwise `run_interpreted` runs their file in a process that has it set, which does not
change Triton for the other tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
CAN_RUN_KERNELS = GPU or os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process can run the kernels."""
DEVICE = torch.device("cuda" if GPU else "cpu")
ROOT = Path(__file__).parents[2]


def run_interpreted(file: str, temporary: Path, *options: str) -> None:
    """Run the tests of a file with Triton's interpreter. They must pass. options: for pytest."""
    command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, f"--basetemp={temporary / 'interpreted'}"],
        cwd=ROOT,
        # PYTEST_ADDOPTS could change what is printed.
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
