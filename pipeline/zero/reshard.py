"""Resuming on another number of ranks or in another ZeRO stage, without converting the checkpoint first.

A new engine knows which elements of which parameters each rank keeps. A rank reads only its own elements from the files
of the ranks that wrote the checkpoint (`states.py`). Below stage 3 it passes them to DeepSpeed in the form in which
DeepSpeed saves them; in stage 3 it copies them into DeepSpeed's tensors. So nothing is written, and no rank waits for a
conversion. Weights and states keep their bits. Afterwards, only the order in which the ranks sum up gradients differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabase.pipeline.errors import RunError
from megabase.pipeline.zero.states import MOMENTS, WEIGHTS, Shards


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a parameter. In their vector on this rank they begin at element `offset`."""

    name: str
    start: int
    stop: int
    offset: int


# The vectors that DeepSpeed keeps on this rank: for each its size and its fragments.
Layout = list[tuple[int, list[Fragment]]]


def reshard(engine: deepspeed.DeepSpeedEngine, shards: Shards) -> dict[str, Any]:
    """Load a rank's part of a checkpoint into a new engine. All ranks call it.

    Args:
        engine: a new engine; its number of ranks and its stage may differ from the checkpoint's.
        shards: the checkpoint.

    Returns:
        The checkpoint's client state.

    Raises:
        RunError: the checkpoint has other parameters than the engine's module.
    """
    _check_names(engine, shards)
    prologue = engine._optimizer_has_ckpt_event_prologue()
    if prologue:
        engine.optimizer.checkpoint_event_prologue()
    stage = engine.zero_optimization_stage()
    if stage < 3:
        _load_weights(engine, shards)
    load = {0: _load_unsharded, 1: _load_partitioned, 2: _load_partitioned, 3: _load_sharded}[stage]
    load(engine, shards)
    if prologue:
        engine.optimizer.checkpoint_event_epilogue()
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, shards.client[counter])
    return dict(shards.client)


def _check_names(engine: deepspeed.DeepSpeedEngine, shards: Shards) -> None:
    own, saved = set(engine.param_names.values()) - set(shards.shared), set(shards.names)
    if own != saved:
        example = sorted(own ^ saved)[0]
        where = "the checkpoint, not in the model" if example in saved else "the model, not in the checkpoint"
        raise RunError(f"{shards.path}: {example} is in {where}: it belongs to another model")


@torch.no_grad()
def _load_weights(engine: deepspeed.DeepSpeedEngine, shards: Shards) -> None:
    """Load the weights that forward computes with, which every rank keeps unsharded."""
    for name, parameter in _named(engine, engine.module.parameters()):
        parameter.copy_(shards.read(name).view_as(parameter))


def _load_unsharded(engine: deepspeed.DeepSpeedEngine, shards: Shards) -> None:
    """Stage 0: every rank keeps all states, one vector per parameter."""
    optimizer = engine.optimizer
    if hasattr(
        optimizer, "fp16_groups"
    ):  # at 16 bits the model's weights, each with an fp32 weight in `fp32_groups`
        named = [list(_named(engine, group)) for group in optimizer.fp16_groups]
    else:
        named = [list(_named(engine, group["params"])) for group in optimizer.param_groups]

    def read(name: str, what: str) -> Tensor:
        return shards.read(name, what).view(shards.shapes[name])

    names = [name for group in named for name, _ in group]
    states = _numbered(_state(shards, partial(read, name)) for name in names)
    saved = optimizer.state_dict()
    if "fp32_groups" not in saved:
        optimizer.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
        return
    saved["fp32_groups"] = [[read(name, WEIGHTS) for name, _ in group] for group in named]
    saved["optimizer_state_dict"] = saved["optimizer_state_dict"] | {"state": states}
    optimizer.load_state_dict(saved)


def _load_partitioned(engine: deepspeed.DeepSpeedEngine, shards: Shards) -> None:
    """Stages 1 and 2: the parameters of a group are one vector, and each rank keeps a part of it."""
    optimizer = engine.optimizer
    layout: Layout = []
    for group, vector in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        fragments = []
        for name, parameter in _named(engine, group):
            if (
                mapping := parameter._hp_mapping
            ) is not None:  # None: this rank keeps nothing of the parameter
                start = mapping.lp_fragment_address.start
                stop = start + mapping.lp_fragment_address.numel
                fragments.append(Fragment(name, start, stop, mapping.hp_fragment_address.start))
        layout.append((vector.numel(), fragments))
    saved = optimizer.state_dict() | _scale(shards)
    states = saved["base_optimizer_state"]
    saved["single_partition_of_fp32_groups"] = [_vector(shards, vector, WEIGHTS) for vector in layout]
    vectors = _numbered(_state(shards, partial(_vector, shards, vector)) for vector in layout)
    saved["base_optimizer_state"] = states | {"state": vectors}
    # DeepSpeed expects the states of every rank, and reads only this rank's.
    states_of_ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    states_of_ranks[dist.get_rank()] = saved
    optimizer.load_state_dict(states_of_ranks, load_from_fp32_weights=True)


def _load_sharded(engine: deepspeed.DeepSpeedEngine, shards: Shards) -> None:
    """Stage 3: each parameter is padded and cut into equal parts, one for each rank.

    Loads one sub-group after the other. States that are mapped from files (`offload.py`) stay mapped.
    """
    optimizer, rank = engine.optimizer, dist.get_rank()
    for name, value in _scale(shards).items():
        setattr(optimizer, name, value)
    for number, group in enumerate(optimizer.fp16_groups):
        fragments, offset = [], 0
        for name, parameter in _named(engine, group):
            part = parameter.ds_tensor.ds_numel
            start, stop = (min(at * part, parameter.ds_numel) for at in (rank, rank + 1))
            fragments.append(Fragment(name, start, stop, offset))
            offset += part
        vector = (offset, fragments)
        weights = optimizer.fp32_partitioned_groups_flat[number]
        weights.data.copy_(_vector(shards, vector, WEIGHTS))
        if state := _state(shards, partial(_vector, shards, vector)):
            own = optimizer.state[weights]
            for what in MOMENTS:
                value = state[what]
                own[what] = own[what].copy_(value) if what in own else value.to(weights.device)
            own["step"] = state["step"]
        optimizer._reassign_or_swap_out_partitioned_parameters(number)


def _vector(shards: Shards, vector: tuple[int, list[Fragment]], what: str) -> Tensor:
    """The content of one vector of this rank, read from a checkpoint; zeros between and behind the fragments."""
    size, fragments = vector
    flat = torch.zeros(size)
    for part in fragments:
        end = part.offset + part.stop - part.start
        flat[part.offset : end] = shards.read(part.name, what, part.start, part.stop)
    return flat


def _state(shards: Shards, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """AdamW's state of a tensor, with the moments that `read` returns. Empty before AdamW's first step."""
    if not shards.optimizer_step:
        return {}
    return {"step": torch.tensor(shards.optimizer_step)} | {what: read(what) for what in MOMENTS}


def _numbered(states: Iterable[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """States by the number of their tensor, without empty ones, as in AdamW's `state_dict`."""
    return {number: state for number, state in enumerate(states) if state}


def _scale(shards: Shards) -> dict[str, Any]:
    """The fp16 loss scale. A checkpoint of stage 0 has other keys for it: empty then, and the scale starts again."""
    return shards.scaler if shards.layout.stage else {}


def _named(
    engine: deepspeed.DeepSpeedEngine, parameters: Iterable[nn.Parameter]
) -> Iterator[tuple[str, Any]]:
    """(name in the engine's module, parameter) of each parameter."""
    return ((engine.param_names[parameter], parameter) for parameter in parameters)
