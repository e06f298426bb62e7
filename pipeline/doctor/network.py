"""Whether two ranks of this machine can talk: over gloo, and with GPUs over NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megabase.pipeline.doctor.finding import Finding, note, ok, wrong
from megabase.pipeline.ranks.network import INTERFACE
from megabase.pipeline.ranks.supervisor import free_port

TIMEOUT_S = 60.0
"""Seconds for two processes to import torch, to meet and to sum two numbers."""


def check_ranks(backend: str, gpus: int = 0, timeout_s: float = TIMEOUT_S) -> Finding:
    """Start two ranks that sum a tensor.

    Args:
        backend: gloo or nccl.
        gpus: of this machine; NCCL needs two for two ranks, and is tried with one rank if there is one.
        timeout_s: for all of it.
    """
    ranks = min(2, gpus) if backend == "nccl" else 2
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", __name__, backend, str(timeout_s)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=timeout_s) for process in processes]
    except subprocess.TimeoutExpired:
        return wrong(
            backend, f"{ranks} ranks on this machine did not meet within {timeout_s:.0f} s", _way_out(backend)
        )
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        lines = [line for _, errors in printed for line in errors.splitlines() if line.strip()]
        return wrong(
            backend, f"{ranks} ranks failed: {lines[-1] if lines else 'no message'}", _way_out(backend)
        )
    if ranks == 1:
        return note(backend, "one rank starts; with a single GPU no connection is tried")
    interface = os.environ.get(INTERFACE)
    return ok(backend, f"two ranks summed a tensor over {interface or 'the default interface'}")


def _way_out(backend: str) -> str:
    if backend == "nccl":
        return "run it again with NCCL_DEBUG=INFO; on several networks set slurm.interface"
    return "set slurm.interface to a network interface that `ip -brief address` shows, such as lo for one machine"


def _rank(backend: str, timeout_s: float) -> None:
    """One of the ranks that `check_ranks` starts."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    number = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(number)
    if number.sum().item() != 1024 * sum(range(1, ranks + 1)):
        sys.exit("the sum over the ranks is wrong")
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(sys.argv[1], float(sys.argv[2]))
