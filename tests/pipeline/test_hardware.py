"""What the hardware can do."""

import pytest
import torch

from megabase.pipeline.hardware import PEAK_16_BIT, peak_flops, peak_memory, precision_of


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", PEAK_16_BIT["H100"]),
        ("NVIDIA H100 PCIe", PEAK_16_BIT["H100 PCIe"]),
        ("NVIDIA A100-SXM4-80GB", PEAK_16_BIT["A100"]),
        ("NVIDIA A10G", PEAK_16_BIT["A10G"]),
        ("Some GPU", None),
    ],
)
def test_the_peak_of_a_gpu_follows_from_the_words_of_its_name(device: str, expected: float | None) -> None:
    assert peak_flops(device, "bf16") == expected
    assert peak_flops(device, "32") is None


def test_auto_is_bf16_on_gpus_only() -> None:
    assert precision_of("auto") == ("bf16" if torch.cuda.is_available() else "32")
    assert precision_of("16") == "16"


def test_memory_is_in_bytes() -> None:
    if not torch.cuda.is_available():
        assert 10 << 20 < peak_memory() < 1 << 42
