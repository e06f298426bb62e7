"""Optimizer states on a disk (`zero.offload=nvme`), in checkpoints like all others.

DeepSpeed keeps the fp32 weights and AdamW's moments of each sub-group of parameters in swap files, and has in memory
only what it steps at the time. Beside a checkpoint it would copy those files: unhashed, of use to the same ranks only,
and without AdamW's step count and the loss scale. Here they are part of the checkpoint: mapped from the swap files,
so that they pass through the page cache and are never in memory as a whole. `reshard.py` reads them back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def attach(engine: Any) -> None:
    """Have a DeepSpeedEngine of stage 3 save states that are on a disk as if they were in memory."""
    optimizer = engine.optimizer
    state_dict = optimizer.state_dict
    optimizer.state_dict = lambda: _in_place_of(state_dict(), contents(optimizer))
    engine.zero_nvme_offload_optimizer = lambda: False  # else DeepSpeed copies the files


def contents(optimizer: Any) -> dict[int, Tensor]:
    """What is on a disk now, mapped: {id of the empty tensor in its place: 1-d tensor}. Good until the next step."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    return {
        id(tensor.compute_tensor): torch.from_file(
            tensor.swap_path, shared=False, size=info.numel(), dtype=info.dtype()
        )
        for info in (swapper.swap_params_info.values() if swapper else ())
        for tensor in info.tensors
    }


def _in_place_of(value: Any, known: Mapping[int, Tensor]) -> Any:
    """Nested dictionaries and lists with the tensors in `known` exchanged."""
    if isinstance(value, dict):
        return {key: _in_place_of(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_place_of(item, known) for item in value]
    return known.get(id(value), value)


def read_ahead_once() -> None:
    """Have DeepSpeed read each parameter from the disk once, however often it is used soon.

    A reversible model uses a layer twice in a row in backward; DeepSpeed's reading ahead stumbles over that.
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    swap_in = AsyncPartitionedParameterSwapper.swap_in

    @functools.wraps(swap_in)
    def once(swapper: Any, params: list[Any], *arguments: Any, **settings: Any) -> None:
        swap_in(swapper, list(dict.fromkeys(params)), *arguments, **settings)

    AsyncPartitionedParameterSwapper.swap_in = once
