"""Building a model that is too large for one rank: each layer is initialised in full, then every rank keeps its part.

So the weights are the same, bit for bit, as under the stages that do not shard them, and a rank never holds more than
its part of the model and one full layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Container
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor
from torch.nn import Module

from megabase.models.attention.heads import AttentionBranch
from megabase.models.feedforward import FeedForwardBranch

# glibc's malloc_trim returns freed memory to the system. Without it the process would keep the freed memory of every
# full layer, because parts that stay lie between, and would need as much memory as the full model.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


class Sharded(deepspeed.zero.Init):
    """Within this context, the parameters of a module are sharded as soon as its __init__ is done.

    deepspeed.zero.Init makes every new tensor in the run's precision, including random numbers and results computed
    from them. Here weights are computed in fp32 and rounded once, as without sharding.
    """

    def __init__(self, config_dict_or_path: object) -> None:
        super().__init__(
            config_dict_or_path=config_dict_or_path,
            tensor_overrides=[DeepSpeedTensorOverride.device],
            # With hpZ, DeepSpeed would make the groups again for the second model of a process, which fails.
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        )

    def _post_init_method(self, module: Module) -> None:
        for parameter in module.parameters(recurse=False):
            # A parameter that two modules share is sharded already.
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self.dtype)
        super()._post_init_method(module)
        for parameter in module.parameters(recurse=False):
            _zero_padding(parameter)
        if next(module.parameters(recurse=False), None) is not None:
            _trim(0)


def gather_whole_branches(model: Module) -> None:
    """Let ZeRO stage 3 gather the parameters of a branch together.

    DeepSpeed gathers the parameters of a module when the module is called. But a branch, which computes some positions
    or heads at a time, uses the weights of the modules in it without calling them. So DeepSpeed is made to gather all
    of them when the branch is called. Call this function before DeepSpeed's engine is made. Without stage 3 it has no
    effect.
    """
    set_z3_leaf_modules(model, [AttentionBranch, FeedForwardBranch], raise_if_not_found=False)


def fill(model: Module, names: Container[str], value_of: Callable[[str], Tensor]) -> None:
    """Set weights of a model that may be sharded (stage 3). All ranks call it, before DeepSpeed's engine is made.

    Args:
        model: as every rank built it.
        names: of the parameters to set.
        value_of: name -> the full parameter. Called once for each, in order: on every rank, but on rank 0 alone for
            sharded parameters.
    """
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(value_of(name))
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value_of(name))


def _zero_padding(parameter: Any) -> None:
    """Set the end of a rank's part that belongs to no element to zero.

    Parts are equally long, so the last ones are padded. DeepSpeed leaves the padding uninitialised. It would make the
    states of a run differ between two starts, and could hold a NaN, with which a rank refuses to write a checkpoint.
    """
    part = parameter.ds_tensor.view(-1)
    left = parameter.ds_numel - dist.get_rank(parameter.ds_process_group) * part.numel()
    part[max(0, min(left, part.numel())) :].zero_()
