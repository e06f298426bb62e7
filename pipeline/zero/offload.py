"""Offload to a disk (`zero.offload=nvme`, `zero.offload_parameters=nvme`): host memory that is mapped from files.

DeepSpeed offloads to host memory, as with `cpu`; its tensors there are then moved into files that are mapped into
memory. When memory is short, the kernel writes their pages to the disk and reads them back on use. AdamW, the check for
bad numbers and the checkpoints use these tensors like any others.

DeepSpeed's own offload to a disk is not used. It does not check the results of its reads and writes (0.19.8), so a full
disk, or gradients of a part of a parameter that does not begin at a multiple of 512 bytes, give wrong numbers without
an error. Here the disk space is allocated at the start, and an error of the disk is a SIGBUS: the rank ends, and the
next start resumes from the last checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.pipeline.config.schema import NVME, ZeroConfig
from megabase.pipeline.ranks.groups import Group
from megabase.pipeline.readable import readable_size
from megabase.pipeline.zero.states import MOMENTS


def map_from_files(engine: Any, zero: ZeroConfig) -> None:
    """Move what an engine has offloaded to host memory into files in `zero.nvme_path`. All ranks call it.

    Args:
        engine: a new DeepSpeedEngine of stage 3.
        zero: if `offload` is nvme, AdamW's states, fp32 weights and fp32 gradients are moved; if `offload_parameters`
            is nvme, the weights that the forward pass uses.

    Raises:
        RunError: on every rank, if the disk of one of them has no space.
    """
    assert zero.nvme_path
    directory = Path(zero.nvme_path)
    states, parameters = zero.offload == NVME, zero.offload_parameters == NVME
    optimizer = engine.optimizer
    error = None
    try:
        for number, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
            if states:
                weights.data = _copy_in_file(directory, weights.detach())
                weights.grad = _copy_in_file(directory, weights.grad)
                # Made here, because AdamW would allocate them in memory at its first step.
                moments = {moment: _zeros_in_file(directory, weights) for moment in MOMENTS}
                optimizer.state[weights] = {"step": torch.tensor(0.0)} | moments
            if parameters:
                flat = optimizer.fp16_partitioned_groups_flat[number]
                flat.data = _copy_in_file(directory, flat.detach())
                optimizer._unflatten_partitioned_parameters(number)
        if parameters:
            optimizer.param_groups_fp16_flat_cpu_memory.clear()
    except OSError as caught:
        error = f"zero.nvme_path={directory} cannot hold what is offloaded: {caught.strerror or caught}"
    Group.of_all_ranks().check(error)


def _copy_in_file(directory: Path, tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor, mapped from a file of its own."""
    return _zeros_in_file(directory, tensor).copy_(tensor)


def _zeros_in_file(directory: Path, like: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `like`, mapped from a new file.

    The file is unlinked at once, so its space is freed however this process ends.

    Raises:
        OSError: the disk has no space.
    """
    size = like.numel() * like.element_size()
    if not size:
        return torch.zeros_like(like)
    descriptor, name = tempfile.mkstemp(prefix="megabase-", dir=directory)
    try:
        os.posix_fallocate(descriptor, 0, size)
        return torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}, {readable_size(size)} were requested at once"
        ) from None
    finally:
        os.close(descriptor)
        Path(name).unlink()
