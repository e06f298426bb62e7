"""The file of a node: rows while it trains, a fresh number for each, and no harm if it cannot be written."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pynvml
import pytest

from megabase.pipeline.training import system
from megabase.pipeline.training.system import Measure, system_monitor


def rows(run: Path) -> list[dict[str, Any]]:
    found = list((run / "logs").glob("system-*.jsonl"))
    assert len(found) == 1
    return [json.loads(line) for line in found[0].read_text().splitlines()]


def test_a_node_is_measured_until_the_end_and_a_second_start_continues_the_numbers(tmp_path: Path) -> None:
    for start in range(2):
        with system_monitor(tmp_path, 0.02):
            while not (tmp_path / "logs").exists() or len(rows(tmp_path)) < 2 * (start + 1):
                time.sleep(0.01)
    measured = rows(tmp_path)
    assert [row["sample"] for row in measured] == list(range(len(measured)))
    for row in measured:
        assert row["memory_bytes"] > 0 and 0 < row["memory_percent"] <= 100 and row["cpu_percent"] >= 0
        assert row["network_sent_bytes_per_second"] >= 0 and row["disk_free_bytes"] > 0
    assert measured[-1]["time"] == pytest.approx(time.time(), abs=60)


def test_nothing_is_measured_at_an_interval_of_zero(tmp_path: Path) -> None:
    with system_monitor(tmp_path, 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("")  # a file, where a directory is needed
    with caplog.at_level(logging.WARNING, logger="megabase"), system_monitor(tmp_path, 0.01):
        time.sleep(0.1)
    assert len(caplog.records) == 1 and "this node is not measured any more" in caplog.text


def test_gpus_are_measured_and_what_one_does_not_have_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Used:
        gpu, used = 87, 40 << 30

    def no_power(handle: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(system, "_gpus", lambda: ["first", "second"])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda handle: Used)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: Used)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", no_power)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda handle, kind: 61)
    row = Measure(tmp_path).row()
    assert row["gpu_1_percent"] == 87 and row["gpu_0_memory_bytes"] == 40 << 30 and row["gpu_0_celsius"] == 61
    assert not any("watts" in name for name in row)
