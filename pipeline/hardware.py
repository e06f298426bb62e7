"""Peak speeds of devices, for utilisation: what share of what the machine can do did training get?"""

from __future__ import annotations

import resource

import torch

# Dense matrix products at 16 bits, FLOP/s, from the vendors' data sheets; by the words of a device's name.
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


def precision_of(setting: str) -> str:
    """'32', 'bf16' or '16': what `trainer.precision` means on this machine."""
    if setting != "auto":
        return setting
    return "bf16" if torch.cuda.is_available() else "32"


def peak_flops(device: str, precision: str) -> float | None:
    """FLOP/s of the GPU named `device` in `precision` ('bf16', '16'); None where no data sheet here applies."""
    if precision == "32":
        return None
    words = device.replace("-", " ").split()
    fitting = [name for name in PEAK_16_BIT if set(name.split()) <= set(words)]
    return PEAK_16_BIT[max(fitting, key=len)] if fitting else None


def peak_memory() -> int:
    """Highest memory of this process so far in bytes: allocated on its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
