"""What the hardware can do: precision, peak speed and memory, from which a run computes its utilisation (MFU)."""

from __future__ import annotations

import resource

import torch

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


def precision_of(setting: str) -> str:
    """The precision that a value of `trainer.precision` selects on this machine: '32', 'bf16' or '16'."""
    if setting != "auto":
        return setting
    return "bf16" if torch.cuda.is_available() else "32"


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
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
