"""AdamW for ZeRO stage 0 in fp32."""

import math

import torch

from megabase.pipeline.zero.adamw import PlainAdamW


def test_it_measures_the_norm_and_drops_an_update_only_if_drops_is_set() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    adam = PlainAdamW([weight], lr=0.1)

    def step(gradient: list[float], drops: bool) -> float:
        weight.grad = torch.tensor(gradient)
        adam.drops = drops
        adam.measure()
        adam.step()
        return float(adam._global_grad_norm)

    assert step([3.0, 4.0, 0.0], drops=True) == 5.0 and not adam.overflow
    before = weight.detach().clone(), {k: v.clone() for k, v in adam.state[weight].items()}
    assert math.isnan(step([math.nan, 4.0, 0.0], drops=True)) and adam.overflow
    assert torch.equal(weight, before[0])
    assert all(torch.equal(adam.state[weight][name], value) for name, value in before[1].items())
    assert bool(weight.isfinite().all())
    step([math.inf, 0.0, 0.0], drops=False)
    assert not adam.overflow and not bool(weight.isfinite().all())
