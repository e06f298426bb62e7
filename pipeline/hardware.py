"""Peak speeds of devices, for utilisation: what share of what the machine can do did training get?"""

from __future__ import annotations

import resource

import torch

# Dense matrix products at 16 bits, FLOP/s, from the vendors' data sheets. The longest name that fits is taken.
PEAK_16_BIT = {
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40": 181e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "V100": 125e12,
}


def peak_flops(precision: str) -> float | None:
    """FLOP/s of this rank's GPU in `precision` ('bf16', '16'); None where no data sheet applies (CPUs, fp32)."""
    if not torch.cuda.is_available() or precision == "32":
        return None
    name = torch.cuda.get_device_name()
    fitting = [key for key in PEAK_16_BIT if key in name]
    return PEAK_16_BIT[max(fitting, key=len)] if fitting else None


def peak_memory() -> int:
    """Highest memory of this process so far in bytes: allocated on its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
