"""Measures a node while it trains: CPUs, memory, network, GPUs. A thread of one process of every node.

Each node appends to a file of its own, `logs/system-NODE.jsonl`, so that nodes need not communicate and a node that
hangs loses nothing. The mirror of rank 0 sends all these files to MLflow. (MLflow's own monitor sends from every node
itself, and stops at the first request that fails.)
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from megabase.pipeline.rundir.journal import Row
from megabase.pipeline.rundir.paths import RunPaths

logger = logging.getLogger(__name__)


@contextmanager
def system_monitor(directory: Path, every_s: float) -> Iterator[None]:
    """Measure this node every `every_s` seconds until the block ends; 0: never. See `measure` for the rows.

    A file that cannot be written is reported once, and training goes on.

    Args:
        directory: the run directory.
        every_s: seconds between two rows.
    """
    if not every_s:
        yield
        return
    ended = threading.Event()
    path = RunPaths(directory).system(re.sub(r"[^\w.-]", "_", platform.node()))
    thread = threading.Thread(
        target=_watch, args=(path, directory, every_s, ended), daemon=True, name="system"
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(path: Path, directory: Path, every_s: float, ended: threading.Event) -> None:
    measure = Measure(directory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = path.read_bytes().count(b"\n") if path.exists() else 0
        with path.open("a") as file:
            while not ended.wait(every_s):
                file.write(json.dumps({"sample": number, **measure.row()}) + "\n")
                file.flush()
                number += 1
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error.strerror}): this node is not measured any more")


class Measure:
    """The state between two measurements of this node.

    Args:
        directory: the run directory, for the room on its file system.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._at = time.monotonic()
        self._network = psutil.net_io_counters()
        self._gpus = _gpus()
        psutil.cpu_percent()  # begins its interval

    def row(self) -> Row:
        """Measure.

        Returns:
            time (Unix time); since the last row: cpu_percent (of all CPUs), network_sent_bytes_per_second and
            network_received_bytes_per_second; now: memory_bytes (used) and memory_percent, disk_free_bytes of the run
            directory's file system, and for each GPU i of the node gpu_i_percent (of the time in which it computed),
            gpu_i_memory_bytes, gpu_i_watts and gpu_i_celsius.
        """
        now, network = time.monotonic(), psutil.net_io_counters()
        seconds = max(now - self._at, 1e-9)
        memory = psutil.virtual_memory()
        row: Row = {
            "time": time.time(),
            "cpu_percent": psutil.cpu_percent(),
            "memory_bytes": memory.total - memory.available,
            "memory_percent": memory.percent,
            "network_sent_bytes_per_second": (network.bytes_sent - self._network.bytes_sent) / seconds,
            "network_received_bytes_per_second": (network.bytes_recv - self._network.bytes_recv) / seconds,
        }
        with suppress(OSError):
            row["disk_free_bytes"] = shutil.disk_usage(self._directory).free
        self._at, self._network = now, network
        for number, gpu in enumerate(self._gpus):
            row |= {f"gpu_{number}_{name}": value for name, value in _gpu(gpu).items()}
        return row


def _gpus() -> list[Any]:
    """NVML's handles of the GPUs of this node; none without an NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu(handle: Any) -> Row:
    """What NVML says of a GPU; a figure that it does not have is left out."""
    import pynvml

    asked = {
        "percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }
    row: Row = {}
    for name, ask in asked.items():
        with suppress(pynvml.NVMLError):
            row[name] = ask()
    return row
