"""`megabase bench data`: every contestant is measured, one that is missing is left out, bad input is refused first."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from megabase.datamodules.errors import DataError
from megabase.pipeline import cli
from megabase.pipeline.bench import contest, data, data_task, draw, readers
from megabase.pipeline.bench.contest import LeftOut, Reason
from megabase.pipeline.bench.data import DataOptions
from megabase.pipeline.bench.data_task import DataTask
from megabase.pipeline.errors import UserError

MIB = 1 << 20


OPTIONS = DataOptions(
    lengths="1k,8k",
    contestants="ours,ours-in-order,webdataset,webdataset-shuffled,copy",
    mebibytes=1,
    directory=None,
    repeat=2,
    seconds=None,
    json=None,
    picture=None,
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> readers.Records:
    return DataTask(tmp_path_factory.mktemp("records"), MIB).records(8192)


@pytest.mark.slow
def test_bench_data(tmp_path, capsys):
    path = tmp_path / "data.json"
    (tmp_path / "work").mkdir()
    sizes = ["--lengths", OPTIONS.lengths, "--mebibytes", "1", "--repeat", "2"]
    files = ["--directory", str(tmp_path / "work"), "--json", str(path)]
    assert cli.main(["bench", "data", *sizes, *files, "--contestants", str(OPTIONS.contestants)]) == 0
    assert not list((tmp_path / "work").iterdir())
    outcome = json.loads(path.read_text())
    assert outcome["benchmark"] == "data"
    assert outcome["machine"]["processor"]
    assert outcome["versions"]["webdataset"] == version("webdataset")
    assert outcome["tokens"] == {"1024": MIB, "8192": MIB}
    assert outcome["settings"]["micro_batch"] == {"1024": 128, "8192": 16}
    sweeps = {
        along: [p for p in outcome["points"] if p["along"] == along]
        for along in (data_task.LENGTH, data_task.RESUME)
    }
    names = str(OPTIONS.contestants).split(",")
    assert [(p["size"], p["contestant"]) for p in sweeps[data_task.LENGTH]] == [
        (size, name) for size in (1024, 8192) for name in names
    ]
    assert {p["contestant"] for p in sweeps[data_task.RESUME]} == {
        "ours",
        "webdataset",
        "webdataset-shuffled",
    }
    for point in outcome["points"]:
        assert point["left_out"] is None
        assert len(point["samples"]) == 2
        assert point["against_ours"] > 0
        assert point["peak_bytes"] is None
    printed = capsys.readouterr().out
    assert "M tokens/s" in printed
    assert all(label in printed for label in outcome["contestants"].values())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")
    again = tmp_path / "again.png"
    assert draw.main([str(path), str(again)]) == 0
    assert again.exists()


def test_a_peer_that_is_missing_is_left_out(monkeypatch, tmp_path, capsys):
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(readers, "version", missing)
    path = tmp_path / "data.json"
    options = replace(OPTIONS, lengths="8k", contestants="copy,litdata", repeat=1, json=path)
    assert data.run(options) == 0
    points = {(p["along"], p["contestant"]): p for p in json.loads(path.read_text())["points"]}
    assert points[data_task.LENGTH, "litdata"]["left_out"] == "not installed (pip install litdata)"
    assert points[data_task.LENGTH, "copy"]["left_out"] is None
    assert "not installed" in capsys.readouterr().out


def test_without_measured_memory_only_the_time_is_foreseen():
    before = [contest.Point("a", 1, [1.0], contest.Probe(1.0, None))]
    contest.foresee(contest.Entry("a", "A", 0.0), 1 << 30, before, contest.Budget(2.0, 1), free_bytes=1)
    with pytest.raises(LeftOut) as caught:
        contest.foresee(contest.Entry("a", "A", 0.0), 2, before, contest.Budget(0.5, 1), None)
    assert caught.value.reason == Reason("too slow (~1.0 s)", for_good=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"contestants": "ours,webdatset"}, "unknown contestant 'webdatset'; did you mean 'webdataset'?"),
        ({"lengths": "4q"}, "'4q' is not a length"),
        (
            {"lengths": "1M"},
            "--mebibytes 1: does not hold two batches of length 1,048,576: take --mebibytes 2",
        ),
        ({"mebibytes": 0}, "--mebibytes 0: must be above zero"),
        ({"repeat": 0}, "--repeat 0: must be above zero"),
        ({"seconds": -1.0}, "--seconds -1.0: must be above zero"),
        ({"directory": Path("no/such")}, "--directory no/such: no such directory"),
        ({"mebibytes": 1 << 30}, "--directory .* free, and records of every length take"),
        ({"json": Path("no/such/place.json")}, "--json no/such/place.json: cannot be written"),
        ({"picture": Path("x.jpg")}, "must end in .png"),
    ],
)
def test_bad_input_is_refused_before_any_work(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contest, "hold", lambda *_: pytest.fail("worked on bad input"))
    with pytest.raises((UserError, DataError), match=message.replace("?", r"\?")):
        data.run(replace(OPTIONS, **wrong))
    assert not list(tmp_path.iterdir())
