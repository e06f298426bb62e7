"""From a config to its plan: the hardware, the ranks and the windows that it is for. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megabase.datamodules.alphabet import Alphabet
from megabase.datamodules.index.index_file import INDEX_NAME, read_index
from megabase.datamodules.index.segments import VALID, Segments
from megabase.datamodules.index.store import open_store
from megabase.datamodules.order.planning import plan_training
from megabase.datamodules.order.windows import WindowPlan
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.plan import profiles
from megabase.pipeline.plan.limits import changed, on_ranks, ranks_of
from megabase.pipeline.plan.profiles import CPU, DEFAULT_GPU, Profile
from megabase.pipeline.plan.run import Plan, plan

ALPHABET = "dna"
NOT_SET = "(none)"
"""data.shards of a config that does not set it."""

HOPELESS_S = 600.0
"""A step that would take longer on the CPUs of this machine is one for GPUs."""

_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Chosen:
    """A profile, and why.

    Attributes:
        profile: of the hardware.
        why: it was chosen.
    """

    profile: Profile
    why: str


def planned(
    config: RunConfig, hardware: str | None = None, ranks: int | None = None
) -> tuple[Plan, list[str]]:
    """The plan of a run, and what to say of how it was made. Sets `model.vocab_size`.

    Args:
        config: of the run, validated.
        hardware: name or file of a profile; None: it follows from the config and this machine (`choose`).
        ranks: on all nodes together; None: trainer.nodes x trainer.devices.

    Raises:
        UserError, DataError, ConfigError: the profile is unknown, or what `megabase train` would raise.
    """
    windows, vocab_size, notes = read_windows(config)
    config.model.vocab_size = vocab_size
    config.model.validate(config.data.length)
    if hardware is not None:
        chosen = Chosen(profiles.read_profile(hardware), f"--hardware {hardware}")
    else:
        chosen = choose(config, ranks)
    profile = profiles.with_memory(chosen.profile, config.slurm)
    config = placed(config, ranks, profile)
    precision = precision_of(config.trainer.precision, on_gpus=profile.device != CPU)
    config.trainer.check_device(gpu=profile.device != CPU)
    _check_deepspeed(config)
    notes.insert(0, f"Hardware: {profile.name} ({chosen.why}).")
    return plan(config, windows, precision, profile), notes


def _check_deepspeed(config: RunConfig) -> None:
    """Raise UserError for settings that DeepSpeed cannot use, as `megabase train` does. Few configs have any.

    Only then torch is imported, or DeepSpeed.
    """
    if not (config.zero.deepspeed or config.zero.overlap_comm):
        return
    from megabase.models.pretrained import empty
    from megabase.pipeline.zero import passthrough
    from megabase.pipeline.zero.settings import check_overlap

    passthrough.check(config, here=False)
    passthrough.check_ranks(config, ranks_of(config))
    check_overlap(config, empty(config.model).named_parameters())


def placed(config: RunConfig, ranks: int | None, profile: Profile) -> RunConfig:
    """The config on `ranks` ranks; None: on its own. Raises UserError if they cannot fill nodes evenly."""
    devices = config.trainer.devices or profile.per_node
    if ranks is None:
        return changed(config, "trainer.devices", devices)
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be 1 or more")
    found = on_ranks(config, ranks, devices)
    if found is None:
        raise UserError(
            f"--ranks {ranks} is not a multiple of the {devices} ranks of a node: take"
            f" {max(1, ranks // devices) * devices}, or set trainer.devices"
        )
    return found


def choose(config: RunConfig, ranks: int | None = None) -> Chosen:
    """The hardware that a config is for, as far as it says.

    `slurm.gpus` names it; null: CPUs. With "any", the default: the GPU of this machine; without one an H100, if the run
    has several nodes, more ranks than this machine has CPUs, or a step that would take its CPUs more than ten minutes.

    Raises:
        UserError: `slurm.gpus` names a GPU that has no profile.
    """
    gpus = config.slurm.gpus
    if gpus is None:
        return Chosen(profiles.read_profile(CPU), "slurm.gpus=null")
    if gpus != "any":
        name = profiles.profile_of_gpus(gpus)
        why = (
            f"slurm.gpus={gpus}"
            if name
            else f"slurm.gpus={gpus} has no profile; --hardware takes a file of your own"
        )
        return Chosen(profiles.read_profile(name or DEFAULT_GPU), why)
    if (here := gpu_here()) is not None:
        return Chosen(profiles.read_profile(here), "the GPU of this machine")
    cpus = len(os.sched_getaffinity(0))
    devices = config.trainer.devices or 1
    if config.trainer.nodes > 1 or (ranks or devices) > cpus:
        return Chosen(profiles.read_profile(DEFAULT_GPU), f"more ranks than the {cpus} CPUs of this machine")
    cpu = profiles.read_profile(CPU)
    precision = precision_of(config.trainer.precision, on_gpus=False)
    if precision != "16":
        step = plan(placed(config, ranks, cpu), None, precision, cpu).speed.step.total
        if step <= HOPELESS_S:
            return Chosen(cpu, "this machine has no GPU; --hardware h100 plans for one")
    return Chosen(profiles.read_profile(DEFAULT_GPU), "made for GPUs: the CPUs of this machine are too slow")


def gpu_here() -> str | None:
    """The profile of this machine's GPU, as its driver names it; None if there is no GPU or no profile of it."""
    for file in sorted(_DRIVER.glob("*/information")):
        words = set(file.read_text().lower().replace("-", " ").split())
        for name in profiles.names():
            if name != CPU and set(name.split("-")) <= words:
                return name
    return None


def read_windows(config: RunConfig) -> tuple[WindowPlan | None, int, list[str]]:
    """The training windows and the size of the vocabulary, from the index of the shards alone.

    Shards that do not exist yet are no error: then there are no windows, the alphabet is dna, and a note says so.

    Raises:
        DataError: the index is damaged, or does not fit `data.*`.
        UserError: see `check_validation`.
    """
    shards = config.data.shards
    if "://" not in shards and not (Path(shards) / INDEX_NAME).is_file() and not Path(shards).is_file():
        vocab_size = config.model.vocab_size or Alphabet.named(ALPHABET).vocab_size
        missing = (
            "data.shards is not set" if shards == NOT_SET else f"data.shards={shards} does not exist yet"
        )
        return (
            None,
            vocab_size,
            [f"{missing}: epochs are not known; the alphabet may be another than {ALPHABET}."],
        )
    index = read_index(open_store(shards))
    check_validation(config, index.segments)
    return plan_training(config.data, index.alphabet, index.segments), index.alphabet.vocab_size, []


def check_validation(config: RunConfig, segments: Segments) -> None:
    """Raise UserError if a run is to keep its best checkpoints, and there is no validation split to find them with."""
    if config.checkpoint.keep_best and VALID not in segments.splits():
        raise UserError(
            f"checkpoint.keep_best={config.checkpoint.keep_best}: {config.data.shards} has no validation split to find"
            " the best with: prepare it with --valid, or set checkpoint.keep_best=0"
        )
