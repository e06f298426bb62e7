"""Building a model that no rank could hold: each layer is drawn whole, then every rank keeps its part of it.

So the weights are the same, bit for bit, as under the stages that do not shard them, and the most that a rank holds
at a time is its part of the model and one layer.
"""

from __future__ import annotations

import ctypes

import deepspeed
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from torch.nn import Module

# Of glibc: hands free memory back to the system. Without it, the holes that whole layers leave between the parts that
# stay add up to the whole model.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


class Sharded(deepspeed.zero.Init):
    """Within this context, the parameters of a module are sharded as soon as its __init__ is done.

    DeepSpeed's own has every new tensor in the run's precision, random numbers and what is computed from them
    included: other weights than from numbers in fp32 that are rounded once.
    """

    def __init__(self, config_dict_or_path: object) -> None:
        super().__init__(
            config_dict_or_path=config_dict_or_path, tensor_overrides=[DeepSpeedTensorOverride.device]
        )

    def _post_init_method(self, module: Module) -> None:
        for parameter in module.parameters(recurse=False):
            # A parameter of two modules is sharded already.
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self.dtype)
        super()._post_init_method(module)
        if next(module.parameters(recurse=False), None) is not None:
            _trim(0)
