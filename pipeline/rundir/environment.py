"""The environment of a run: versions, commit and hardware in `environment.json`, all packages in `packages.txt`."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from megabase.datamodules.files import publish, publish_json
from megabase.models.attention.kernels.dispatch import choose_backend
from megabase.models.device import processor_lines
from megabase.pipeline.rundir.paths import RunPaths

PACKAGES = (
    "megabase",
    "torch",
    "pytorch-lightning",
    "deepspeed",
    "webdataset",
    "mlflow",
    "omegaconf",
    "numpy",
)


@functools.cache  # every checkpoint needs them, and parsing packages' metadata takes 20 ms
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change what a run computes: {name: version}."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe() -> dict[str, Any]:
    """Versions, git commit of the code, command line, host, hardware, and the attention kernel for this hardware."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "attention": _kernel("cuda" if gpus else "cpu"),
        "slurm": {k: v for k, v in os.environ.items() if k.startswith("SLURM_JOB")},
    }


def packages() -> list[str]:
    """All installed packages as NAME==VERSION, as pip takes them."""
    return sorted({f"{found.name}=={found.version}" for found in distributions() if found.name})


def write(directory: Path) -> None:
    """Write `describe()` to `environment.json` of a run directory, and `packages()` beside it. Raises OSError."""
    paths = RunPaths(directory)
    publish_json(paths.environment, describe(), indent=1)
    publish(paths.packages, "".join(f"{package}\n" for package in packages()).encode())


def _kernel(device: str) -> str:
    x = torch.empty(1, 1, 1, 64, device=device)
    return choose_backend(x, x)


def _commit(directory: Path) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    names = processor_lines("model name")
    return names[0].split(":", 1)[1].strip() if names else platform.processor()
