"""Building a model that is too large for one rank: each layer is initialised in full, then every rank keeps its part.

So the weights are the same, bit for bit, as under the stages that do not shard them, and a rank never holds more than
its part of the model and one full layer.
"""

from __future__ import annotations

import ctypes

import deepspeed
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from torch.nn import Module

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
            config_dict_or_path=config_dict_or_path, tensor_overrides=[DeepSpeedTensorOverride.device]
        )

    def _post_init_method(self, module: Module) -> None:
        for parameter in module.parameters(recurse=False):
            # A parameter that two modules share is sharded already.
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self.dtype)
        super()._post_init_method(module)
        if next(module.parameters(recurse=False), None) is not None:
            _trim(0)
