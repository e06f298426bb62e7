"""The GPUs and CPUs, and whether the attention kernels work on them."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path

import torch

from megabase.models.attention import lsh_attention
from megabase.models.attention.kernels.dispatch import choose_backend
from megabase.pipeline.doctor.finding import Finding, note, ok, wrong
from megabase.pipeline.hardware import Machine, peak_flops
from megabase.pipeline.readable import counted, readable_size

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference of a kernel's result from the reference's, of values of about 1."""
LEAST_FILES = 4096
"""Open files that a rank may need: shards, readers of data, connections to other ranks."""
LEAST_SHARED = 1 << 30
"""Bytes of /dev/shm, through which the readers of data pass their batches."""


def check_device(machine: Machine) -> list[Finding]:
    """The GPUs, or the CPUs of a machine without."""
    if machine.gpus:
        names = {torch.cuda.get_device_name(number) for number in range(machine.gpus)}
        memory = torch.cuda.get_device_properties(0).total_memory
        found = [
            ok(
                "GPUs",
                f"{machine.gpus} x {', '.join(sorted(names))}, {readable_size(memory)}, CUDA {torch.version.cuda}",
            )
        ]
        if any(peak_flops(name, "bf16") is None for name in names):
            found.append(
                note("MFU", f"the peak speed of {', '.join(sorted(names))} is not known: no MFU is shown")
            )
        return found
    if machine.hidden:
        return [note("GPUs", "CUDA_VISIBLE_DEVICES is empty: this process must not use any", "unset it")]
    if machine.has_driver:
        return [
            wrong(
                "GPUs",
                f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU",
                "look at `nvidia-smi`; install a torch that is built for CUDA, not newer than the driver",
            )
        ]
    return [
        note("GPUs", f"none: a training here runs on {counted(machine.cpus, 'CPU')}; a job may run on GPUs")
    ]


def check_kernel(device: torch.device) -> Finding:
    """Compile and run the fast attention kernel of a device, and compare it with the reference."""
    what = "GPU kernel" if device.type == "cuda" else "CPU kernel"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    qk, v = (torch.randn(1, 2, 512, 64, generator=generator).to(device, dtype) for _ in range(2))
    reasons: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            backend = choose_backend(qk, v)
        if backend == "chunked":
            reason = str(reasons[0].message) if reasons else "the fast kernel does not run here"
            return wrong(what, reason, "install g++" if device.type == "cpu" else "pip install triton")
        out, expected = (
            lsh_attention(qk, v, rounds=2, chunk_length=32, causal=True, seed=1, backend=name).float()
            for name in (backend, "reference")
        )
    except Exception as error:  # of a compiler, of Triton or of CUDA: of any type
        return wrong(
            what, f"it fails: {type(error).__name__}: {str(error).splitlines()[0]}", "see the versions above"
        )
    difference = (out - expected).abs().max().item()
    if not difference < TOLERANCE[dtype]:
        return wrong(
            what,
            f"{backend} differs from the reference by {difference:.2g}",
            "report it with this table; lsh_attention(..., backend='chunked') is slower and right",
        )
    return ok(what, f"{backend}: compiled, and equal to the reference within {difference:.1g}")


def check_limits(
    files: int | None = None, shared: Path = Path("/dev/shm"), least_shared: int = LEAST_SHARED
) -> list[Finding]:
    """The limits of a process that a training reaches first.

    Args:
        files: open files allowed; None: those of this process.
        shared: the file system of shared memory.
        least_shared: bytes that it should have.
    """
    if files is None:
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = most if files == resource.RLIM_INFINITY else files
    found = []
    if 0 <= files < LEAST_FILES:
        found.append(
            note(
                "open files",
                f"at most {files:,} for each process",
                f"ulimit -n {LEAST_FILES}, before training",
            )
        )
    if shared.is_dir():
        import shutil

        size = shutil.disk_usage(shared).total
        if size < least_shared:
            found.append(
                wrong(
                    "shared memory",
                    f"{shared} has {readable_size(size)}: readers of data pass their batches through it",
                    "data.workers=0; in Docker: --shm-size=8g",
                )
            )
    return found or [ok("limits", "open files and shared memory suffice")]
