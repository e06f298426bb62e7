"""Whether the machine on which `megabase train` was typed can train a run: refused before a process is started.

Only a start from a shell is judged. Under SLURM or torchrun the launcher has chosen the machine and the ranks.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence

from megabase.models.flops import training_flops_per_token
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import CPU_CORE_FLOPS, Machine
from megabase.pipeline.ranks.environment import refuse_oversubscription
from megabase.pipeline.readable import counted, readable_time

# A step that takes this long on the CPUs, in seconds, at CPU_CORE_FLOPS: worth a warning, and refused.
SLOW_S = 30.0
HOPELESS_S = 600.0


def check_machine(
    config: RunConfig, devices: int, machine: Machine, arguments: Sequence[str], command: str = "train"
) -> None:
    """Check that a machine can train a run. A machine with GPUs passes.

    Args:
        config: of the run; its values have been checked.
        devices: ranks to start.
        machine: this one.
        arguments: the command line after `megabase COMMAND`, for the message.
        command: that was typed.

    Raises:
        UserError: a step would take very long on these CPUs, or there are more ranks than CPUs.
    """
    if machine.gpus:
        return
    seconds = seconds_per_step(config, machine.cpus)
    if seconds > HOPELESS_S:
        raise UserError(
            f"this machine has no GPU that torch can use, and this run is made for GPUs: on {_cpus(machine)}"
            f" {_estimate(config, seconds)}. For CPUs take configs/demo.yaml, or a smaller data.global_batch,"
            " data.length or model.dim"
        )
    settings = fitting_settings(config, machine.cpus)
    fitting = shlex.join(["megabase", command, *without(arguments, settings), *settings])
    refuse_oversubscription(devices, machine.cpus, fitting)


def warnings_about(config: RunConfig, machine: Machine) -> list[str]:
    """What to say when a run that seems to be meant for GPUs starts on CPUs; empty if nothing."""
    if machine.gpus:
        return []
    found = []
    in_job = "SLURM_JOB_ID" in os.environ and config.slurm.gpus
    if in_job:
        found.append(
            f"slurm.gpus={config.slurm.gpus}, but torch sees no GPU on this node: the run trains on CPUs (for a"
            " cluster without GPUs set slurm.gpus=null)"
        )
    elif machine.has_driver and not machine.hidden:
        found.append(
            "this machine has an NVIDIA driver, but torch sees no GPU: the run trains on CPUs. Look at `nvidia-smi`,"
            " and whether torch was built for CUDA: python -c 'import torch; print(torch.version.cuda)'"
        )
    seconds = seconds_per_step(config, machine.cpus)
    if seconds > SLOW_S:
        found.append(f"this run trains on {_cpus(machine)}, without a GPU: {_estimate(config, seconds)}")
    return found


def seconds_per_step(config: RunConfig, cpus: int) -> float:
    """Seconds of one optimizer step on CPUs that each compute CPU_CORE_FLOPS; most take several times as long."""
    # The shards decide the size of the vocabulary. What it adds does not matter here.
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 1)
    _, flops = training_flops_per_token(model, config.data.length)
    return flops * config.data.length * config.data.global_batch / (cpus * CPU_CORE_FLOPS)


def fitting_settings(config: RunConfig, cpus: int) -> list[str]:
    """The settings with which a run has as many ranks as fit the CPUs and the global batch."""
    batch, micro = config.data.global_batch, config.data.micro_batch
    for devices in range(cpus, 0, -1):
        if batch % (devices * micro) == 0:
            return [f"trainer.devices={devices}"]
    devices = next(devices for devices in range(cpus, 0, -1) if batch % devices == 0)
    share = batch // devices
    smaller = next(size for size in range(micro, 0, -1) if share % size == 0)
    return [f"trainer.devices={devices}", f"data.micro_batch={smaller}"]


def without(arguments: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The arguments that do not set what `settings` set."""
    keys = tuple(setting.partition("=")[0] + "=" for setting in settings)
    return [word for word in arguments if not word.startswith(keys)]


def _cpus(machine: Machine) -> str:
    return counted(machine.cpus, "CPU")


def _estimate(config: RunConfig, seconds: float) -> str:
    steps = config.trainer.max_steps
    rate = f"{CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s on each"
    return (
        f"a step takes {readable_time(seconds)} or more, and its {steps:,} steps {readable_time(seconds * steps)}"
        f" (at {rate}, which few CPUs sustain)"
    )
