"""What the hardware can do: CPUs and GPUs, precision, peak speed and memory, from which a run computes its MFU.

Importing this file imports no torch, which takes seconds.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

# Peak FLOP/s of dense matrix products at 16 bits, from the vendors' data sheets. A key matches a GPU whose name has
# all the key's words; of several such keys the longest counts.
PEAK_16_BIT = {
    "V100": 125e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A40": 150e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}

# FLOP/s of one CPU core that few programs reach: in fp32, two multiply-adds of 512 bits in each of 1.5 billion cycles.
CPU_CORE_FLOPS = 1e11


@dataclass(frozen=True)
class Machine:
    """A machine, as this process sees it.

    Attributes:
        cpus: CPUs that this process may use.
        gpus: GPUs that torch can use.
        has_driver: an NVIDIA driver is loaded, whether or not torch can use it.
        hidden: somebody has hidden the GPUs: CUDA_VISIBLE_DEVICES is empty.
    """

    cpus: int
    gpus: int
    has_driver: bool = False
    hidden: bool = False

    @classmethod
    def this(cls) -> Machine:
        """The machine that this process runs on."""
        import torch

        return cls(
            cpus=len(os.sched_getaffinity(0)),
            gpus=torch.cuda.device_count(),
            has_driver=Path("/proc/driver/nvidia/version").exists(),
            hidden=os.environ.get("CUDA_VISIBLE_DEVICES") == "",
        )


def precision_of(setting: str, *, on_gpus: bool | None = None) -> str:
    """The precision that a value of `trainer.precision` selects: '32', 'bf16' or '16'.

    Args:
        setting: the value.
        on_gpus: whether the run is on GPUs; None: as far as this machine has some.
    """
    if setting != "auto":
        return setting
    if on_gpus is None:
        import torch

        on_gpus = torch.cuda.is_available()
    return "bf16" if on_gpus else "32"


def peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU.

    Args:
        device: name of the GPU, as torch reports it.
        precision: '32', 'bf16' or '16'.

    Returns:
        None in precision 32, and for a GPU that is not in PEAK_16_BIT.
    """
    if precision == "32":
        return None
    words = device.replace("-", " ").split()
    matching = [name for name in PEAK_16_BIT if set(name.split()) <= set(words)]
    return PEAK_16_BIT[max(matching, key=len)] if matching else None


def peak_memory() -> int:
    """The largest memory of this process so far, in bytes: allocated on its GPU, or resident if there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
