"""What fits: the longest window, the largest micro batch, the fewest ranks, and the nearest settings that fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megabase.datamodules.config import accumulation
from megabase.datamodules.errors import DataError
from megabase.models.checks import ConfigError
from megabase.pipeline.config.schema import CPU as OFFLOAD_CPU
from megabase.pipeline.config.schema import NONE, RunConfig
from megabase.pipeline.config.trainer import HOST as HOST_STREAMS
from megabase.pipeline.errors import UserError
from megabase.pipeline.plan.memory import DEVICE, HOST, Memory, memory_of
from megabase.pipeline.plan.profiles import CPU, Profile

_GIB = 1 << 30
_UNIT = 1024
_LONGEST = 1 << 40


@dataclass(frozen=True)
class Space:
    """What a run needs and what there is, in bytes.

    Attributes:
        needed: of a rank's device at once; on CPUs, of its part of the node.
        available: on it, for tensors.
        host_needed: of the ranks of a node, in host memory; 0 on CPUs.
        host_available: on the node.
    """

    needed: int
    available: int
    host_needed: int
    host_available: int

    @property
    def fits(self) -> bool:
        """Whether both fit."""
        return self.needed <= self.available and self.host_needed <= self.host_available


@dataclass(frozen=True)
class Fitting:
    """Which runs fit.

    Args:
        parameters: number of parameters of the model.
        precision: '32', 'bf16' or '16'.
        profile: of the hardware.
    """

    parameters: int
    precision: str
    profile: Profile

    def memory(self, config: RunConfig) -> Memory:
        """The memory of a rank."""
        return memory_of(config, self.parameters, ranks_of(config), self.precision, self.profile.device)

    def space(self, config: RunConfig) -> Space:
        """What a run needs and what there is."""
        profile, memory = self.profile, self.memory(config)
        assert profile.memory_gib is not None and profile.host_memory_gib is not None, "checked"
        devices = config.trainer.devices or 1
        gib = profile.memory_gib / (devices if profile.device == CPU else 1) - profile.reserved_gib
        return Space(
            needed=memory.peak(DEVICE),
            available=_bytes(gib * profile.usable),
            host_needed=memory.peak(HOST) * devices,
            host_available=_bytes(profile.host_memory_gib * profile.usable),
        )

    def fits(self, config: RunConfig) -> bool:
        """Whether the settings work together and the run fits."""
        return works(config) and self.space(config).fits

    def longest(self, config: RunConfig) -> int:
        """The longest window that fits, as a multiple of 1,024 bases and of the ranks that share it; 0 if none does."""
        unit = _UNIT * config.trainer.sequence_ranks

        def fits(units: int) -> bool:
            return self.space(changed(config, "data.length", units * unit)).fits

        return unit * largest(fits, _LONGEST // unit)

    def largest_micro_batch(self, config: RunConfig) -> int:
        """The largest micro batch that fits and divides the global batch; 0 if none does."""
        share = config.data.global_batch // config.data_ranks(ranks_of(config))
        fitting = [size for size in divisors(share) if self.fits(changed(config, "data.micro_batch", size))]
        return max(fitting, default=0)

    def fewest_ranks(self, config: RunConfig) -> int | None:
        """The fewest ranks that fit; None if no number does."""
        parts = config.trainer.sequence_ranks
        for micro_batches in divisors(config.data.global_batch // config.data.micro_batch):
            candidate = on_ranks(config, micro_batches * parts, self.profile.per_node)
            if candidate is not None and self.fits(candidate):
                return micro_batches * parts
        return None

    def nearest(self, config: RunConfig) -> list[str] | None:
        """The settings that are nearest to a config that does not fit and with which it does; None if none is found.

        A smaller micro batch first, because it changes nothing of what is computed; then sharding, offload, more ranks
        for each window, and a shorter window last.
        """
        for settings in self._candidates(config):
            candidate = config
            for key, value in settings.items():
                candidate = changed(candidate, key, value)
            if self.fits(candidate):
                return [f"{key}={value}" for key, value in settings.items()]
        longest = self.longest(config)
        return [f"data.length={longest}"] if longest else None

    def _candidates(self, config: RunConfig) -> Iterator[Mapping[str, object]]:
        """Changes of settings, the nearest first."""
        micro, stage = config.data.micro_batch, config.zero.stage
        yield from ({"data.micro_batch": size} for size in reversed(divisors(micro)[:-1]))
        stages = [{"zero.stage": more} for more in range(stage + 1, 4)]
        yield from stages
        least: dict[str, object] = {"data.micro_batch": 1} if micro > 1 else {}
        yield from ({**least, **more} for more in stages if least)
        if self.profile.device != CPU and config.zero.offload == NONE:
            yield {**least, "zero.stage": max(stage, 2), "zero.offload": OFFLOAD_CPU}
        parts = config.trainer.sequence_ranks
        for more in range(parts + 1, ranks_of(config) + 1):
            if more % parts == 0:
                yield {**least, "trainer.sequence_ranks": more}
                yield {**least, "trainer.sequence_ranks": more, "zero.stage": 3}
        if self.profile.device != CPU:
            yield {**least, "trainer.offload_streams": HOST_STREAMS}


def _bytes(gib: float) -> int:
    """Bytes of a number of GiB, which may be infinite."""
    return int(min(gib, float(1 << 40)) * _GIB)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where all numbers below fit as well; 0 if none does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def divisors(number: int) -> list[int]:
    """The divisors of a number, from 1 to itself."""
    low = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return low + [number // each for each in reversed(low) if each * each != number]


def changed(config: RunConfig, key: str, value: object) -> RunConfig:
    """A copy of a config with another value of SECTION.NAME."""
    section, name = key.split(".")
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})


def ranks_of(config: RunConfig) -> int:
    """The ranks of a config, on all nodes together."""
    return config.trainer.nodes * (config.trainer.devices or 1)


def on_ranks(config: RunConfig, ranks: int, per_node: int) -> RunConfig | None:
    """The config on so many ranks, as many as possible on each node; None if they cannot fill nodes evenly."""
    devices = min(ranks, per_node)
    if ranks % devices:
        return None
    return changed(changed(config, "trainer.devices", devices), "trainer.nodes", ranks // devices)


def works(config: RunConfig) -> bool:
    """Whether the settings work together."""
    try:
        config.check_sequence_ranks()
        accumulation(config.data.global_batch, config.data.micro_batch, config.data_ranks(ranks_of(config)))
    except (UserError, DataError, ConfigError):
        return False
    return True
