"""The journal as points: each (metric, step) once, with the time of the step's first pass."""

import json
import math
from pathlib import Path

from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.rundir.journal import Journal
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.points import Points, StepTimes
from tests.pipeline.tracking.runs import time_of, write


def config_in(tmp_path: Path) -> RunConfig:
    config = RunConfig()
    config.run.root, config.run.name = str(tmp_path), "r"
    config.directory.mkdir()
    return config


def test_times_of_steps_are_those_of_their_first_pass() -> None:
    times = StepTimes()
    assert times.of(0) is None and times.reached == -1
    times.add({"step": 0, "time": 1.0, "started": True})
    times.add({"step": 2, "time": 3.1, "step_times": [2.0, 3.0]})
    times.add({"step": 1, "time": 8.0, "started": True})  # from a checkpoint of step 1
    times.add({"step": 4, "time": 9.9, "step_times": [9.0, 9.5, 9.8]})
    times.add({"step": 6, "time": 20.0})  # a row of an older version, or one that lost its times
    times.add({"step": 9})
    assert [times.of(step) for step in range(8)] == [1000, 2000, 3000, 9500, 9800, 20000, 20000, None]


def test_a_row_of_the_journal_waits_for_the_time_of_its_step(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    paths = RunPaths(config.directory)
    points = Points(config.directory)
    assert points.new(complete=False) == []
    Journal(paths.metrics, 0).append([{"step": 1, "loss": 0.5}])
    assert points.new(complete=False) == []
    Journal(paths.performance, 0).append([{"step": 1, "time": 7.0, "step_times": [6.5]}])
    assert points.new(complete=False) == [
        ("train/restarts", 0.0, 7000, 1),
        ("train/loss", 0.5, 6500, 1),
        ("train/perplexity", math.exp(0.5), 6500, 1),
    ]
    Journal(paths.metrics, 1).append([{"step": 2, "loss": 0.25}])
    assert points.new(complete=False) == []
    assert next(point[:2] for point in points.new(complete=True)) == ("train/loss", 0.25)


def test_every_reader_finds_the_same_points_whenever_it_begins(tmp_path: Path) -> None:
    """So a point that two processes send is stored once."""
    config = config_in(tmp_path)
    early = Points(config.directory)
    write(config, 1, 40)
    found = early.new(complete=False)
    write(config, 31, 60, again=1000.0)
    found += early.new(complete=False)
    late = Points(config.directory)
    late.skip({"train/loss": 20})
    assert late.new(complete=True) == [
        point for point in found if point.name != "train/loss" or point.step > 20
    ]
    losses = [point for point in found if point.name == "train/loss"]
    assert [point.step for point in losses] == list(range(1, 61))
    assert losses[39].ms == round(time_of(40) * 1000) and losses[40].ms == round(time_of(41, 1000.0) * 1000)
    assert [point.value for point in found if point.name == "train/restarts"] == [0, 1] and late.restarts == 1


def test_what_is_not_a_measurement_is_no_metric(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    write(config, 1, 1, markov_0_bits_per_base=2.0, full_markov_1_bits_per_base=1.9, bad="nan")
    names = {point.name for point in Points(config.directory).new(complete=True)}
    assert names == {"train/loss", "train/perplexity", "speed/tokens_per_second", "train/restarts"}
    RunPaths(config.directory).finetune.touch()  # its loss is not that of predicting letters
    assert {point.name for point in Points(config.directory).new(complete=True)} == names - {
        "train/perplexity"
    }
    assert "step_times" in json.loads(RunPaths(config.directory).performance.read_text().splitlines()[-1])


def test_the_files_of_nodes_are_sent_with_their_own_numbers_and_times(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    write(config, 1, 3)
    for node in ("n1", "n2"):
        path = RunPaths(config.directory).system(node)
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "".join(f'{{"sample": {i}, "time": {i + 5}.5, "cpu_percent": 90}}\n' for i in range(3))
        )
    points = Points(config.directory)
    points.skip({"system/n2/cpu_percent": 1})
    found = [point for point in points.new(complete=False) if point.name.startswith("system/")]
    assert sorted(found) == [
        *(("system/n1/cpu_percent", 90.0, 5500 + 1000 * i, i) for i in range(3)),
        ("system/n2/cpu_percent", 90.0, 7500, 2),
    ]
    with RunPaths(config.directory).system("n1").open("a") as file:
        file.write('{"sample": 3, "time": 9.0, "cpu_percent": 50}\n{"sample": 4')
    assert points.new(complete=False) == [("system/n1/cpu_percent", 50.0, 9000, 3)]
