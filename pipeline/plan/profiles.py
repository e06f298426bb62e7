"""Profiles of hardware: `configs/hardware/NAME.yaml`, or a file of the user with the same keys."""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

import megabase
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.config.slurm import SlurmConfig
from megabase.pipeline.errors import UserError, first_line

CPU, CUDA = DEVICES = ("cpu", "cuda")
DIRECTORY = Path(megabase.__file__).parent / "configs" / "hardware"
DEFAULT_GPU = "h100"
_GIB = 1 << 30


@dataclass(frozen=True)
class Achieved:
    """Shares of the peaks that are reached, each above 0 and at most 1.

    Attributes:
        products: of `peak_tflops`, in matrix products.
        lsh: of `peak_tflops`, in LSH attention, hashing and sorting included.
        attention: of `peak_tflops`, in the other kinds of attention.
        memory: of `memory_gb_s`.
        node: of `node_gb_s`.
        network: of `network_gb_s`.
    """

    products: float = 0.5
    lsh: float = 0.05
    attention: float = 0.2
    memory: float = 0.6
    node: float = 0.75
    network: float = 0.75


@dataclass(frozen=True)
class Profile:
    """What one kind of hardware has and reaches. A device is a GPU, or one core of a CPU.

    Attributes:
        device: `cuda` or `cpu`.
        memory_gib: memory of a device; on CPUs that of a node, null: of this machine.
        reserved_gib: of it, for CUDA and NCCL rather than for tensors.
        usable: share of the rest that tensors can fill.
        host_memory_gib: memory of a node; null: of this machine.
        per_node: devices of a node; on CPUs ranks, where the config says nothing.
        peak_tflops: of dense products by precision ('32', 'bf16', '16').
        memory_gb_s: bandwidth of a device's memory.
        node_gb_s: bandwidth between the devices of a node, for one device and direction.
        network_gb_s: the same between nodes.
        host_gb_s: bandwidth between a device and host memory, in each direction.
        latency_us: of one collective.
        achieved: shares of the peaks that are reached.
        launch_ms: host time for the kernels of one branch, forward and backward.
        name: of the profile: the file's name.
    """

    device: str = CUDA
    memory_gib: float | None = None
    reserved_gib: float = 0.0
    usable: float = 0.95
    host_memory_gib: float | None = None
    per_node: int = 1
    peak_tflops: dict[str, float] = field(default_factory=dict)
    memory_gb_s: float = 1.0
    node_gb_s: float = 1.0
    network_gb_s: float = 1.0
    host_gb_s: float = 1.0
    latency_us: float = 0.0
    achieved: Achieved = field(default_factory=Achieved)
    launch_ms: float = 0.0
    name: str = ""

    def peak_flops(self, precision: str) -> float:
        """Peak FLOP/s of a device. Raises UserError if the profile does not have the precision."""
        if precision not in self.peak_tflops:
            raise UserError(
                f"--hardware {self.name}: peak_tflops has no precision {precision!r}, only"
                f" {', '.join(self.peak_tflops)}: add it, or set trainer.precision"
            )
        return self.peak_tflops[precision] * 1e12

    def with_machine(self) -> Profile:
        """The profile with the memory of this machine where it names none."""
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
        return replace(
            self,
            memory_gib=here if self.memory_gib is None else self.memory_gib,
            host_memory_gib=here if self.host_memory_gib is None else self.host_memory_gib,
        )


def names() -> list[str]:
    """The profiles of `configs/hardware/`."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def read_profile(choice: str) -> Profile:
    """A profile by its name, or from a file.

    Raises:
        UserError: there is no such profile or file (the message has the closest name), or a value cannot work.
    """
    path = Path(choice)
    if choice in names():
        path = DIRECTORY / f"{choice}.yaml"
    elif not path.is_file():
        close = difflib.get_close_matches(choice.lower().replace("_", "-"), names(), n=1, cutoff=0.4)
        hint = f": did you mean {close[0]}?" if close else " or file."
        raise UserError(
            f"--hardware {choice}: no such profile{hint} Take one of {', '.join(names())}, or a file of your own"
        )
    return _checked(path, _read(path)).with_machine()


def profile_of_gpus(kind: str) -> str | None:
    """The profile of what `slurm.gpus` names, the largest of several; None if there is none."""
    kind = kind.lower().replace("_", "-")
    if kind == "any":
        return DEFAULT_GPU
    found = [name for name in names() if name != CPU and (name == kind or name.startswith(f"{kind}-"))]
    return max(found, key=lambda name: read_profile(name).memory_gib or 0.0) if found else None


@dataclass(frozen=True)
class Hardware:
    """What a job gets.

    Attributes:
        profile: of the hardware.
        certain: the settings say so. Otherwise the memory of a device is a guess.
    """

    profile: Profile
    certain: bool


def hardware_of_job(slurm: SlurmConfig) -> Hardware | None:
    """The hardware that a job requests; None: a GPU without a profile. A job on CPUs may have no limit of memory."""
    memory = memory_of_node(slurm)
    if slurm.gpus is None:
        profile = read_profile(CPU)
        if memory is None:
            return Hardware(replace(profile, memory_gib=math.inf, host_memory_gib=math.inf), certain=False)
        return Hardware(with_memory(profile, slurm), certain=True)
    name = profile_of_gpus(slurm.gpus)
    return None if name is None else Hardware(with_memory(read_profile(name), slurm), slurm.gpus != "any")


def with_memory(profile: Profile, slurm: SlurmConfig) -> Profile:
    """The profile with the memory of a node that `slurm.mem` requests, if it does."""
    memory = memory_of_node(slurm)
    if memory is None:
        return profile
    if profile.device == CPU:
        return replace(profile, memory_gib=memory, host_memory_gib=memory)
    return replace(profile, host_memory_gib=memory)


def memory_of_node(slurm: SlurmConfig) -> float | None:
    """`slurm.mem` in GiB; None: it is not set, is all of the node (0), or sbatch will refuse it."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", (slurm.mem or "").upper())
    if not match or not int(match[1]):
        return None
    return int(match[1]) * {"K": 2.0**-20, "M": 2.0**-10, "": 2.0**-10, "G": 1.0, "T": 2.0**10}[match[2]]


def _read(path: Path) -> Profile:
    try:
        values: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--hardware {path} cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"--hardware {path} must hold keys and values, as configs/hardware/h100.yaml does")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Profile), values, {"name": path.stem})
        found = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        known = [name for name in Profile.__dataclass_fields__ if name != "name"]
        key = str(error.full_key or error.key)
        known += [f"achieved.{name}" for name in Achieved.__dataclass_fields__]
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
        raise UserError(f"--hardware {path}: unknown key {key!r}; {hint}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"--hardware {path}: {error.full_key}: {first_line(error)}") from None
    assert isinstance(found, Profile)
    return found


def _checked(path: Path, profile: Profile) -> Profile:
    """The profile. Raises UserError for a value that cannot be."""
    if profile.device not in DEVICES:
        raise UserError(f"--hardware {path}: device={profile.device!r}: choose {' or '.join(DEVICES)}")
    if profile.device == CUDA and (profile.memory_gib is None or profile.host_memory_gib is None):
        raise UserError(f"--hardware {path}: memory_gib and host_memory_gib must be given for device: cuda")
    of_node = ("memory_gib", "host_memory_gib", "per_node")
    positive = (*of_node, "memory_gb_s", "node_gb_s", "network_gb_s", "host_gb_s")
    values = {name: getattr(profile, name) for name in positive}
    values |= {f"peak_tflops.{precision}": peak for precision, peak in profile.peak_tflops.items()}
    for key, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"--hardware {path}: {key}={value}: must be above 0")
    shares = {f"achieved.{name}": share for name, share in vars(profile.achieved).items()}
    for key, share in {**shares, "usable": profile.usable}.items():
        if not 0 < share <= 1:
            raise UserError(f"--hardware {path}: {key}={share}: must be above 0 and at most 1")
    return profile


def cores_of_a_rank(config: RunConfig, ranks_of_a_node: int) -> float:
    """CPU cores of each rank of a run on CPUs: slurm.cpus_per_task, or this machine's cores divided by its ranks."""
    if config.slurm.cpus_per_task:
        return float(config.slurm.cpus_per_task)
    return len(os.sched_getaffinity(0)) / ranks_of_a_node
